"""Bases that fit: weights in few bits (backends, storage), and methods that make smaller bases."""
