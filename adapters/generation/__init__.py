"""Making the LoRA of a task without training it, by a model learnt from other adapters; one method per module."""
