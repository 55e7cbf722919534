"""Vision-language models: loading them with their processor, adapters under the language model, answers to pictures."""
