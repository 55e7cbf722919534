"""The loops that run a session's steps: our own on accelerate, or transformers' Trainer."""
