"""Who turns the steps of a session: an accelerate loop of our own, or transformers' Trainer."""
