"""Bases that fit: weights in few bits (backends, storage), and methods that make smaller bases."""

L4Q_FILE = "l4q.safetensors"
"""Beside an adapter that was trained through a rounding: all that the rounding needs."""
