"""Adapter layers: kinds in files, PEFT's layer variant, gated and folded adapters on a model."""
