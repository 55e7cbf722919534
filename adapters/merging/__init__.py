"""Merging adapters into one file, and extracting an adapter from two models; one method per module."""
