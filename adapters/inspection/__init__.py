"""Inspecting adapters: what they change, and how they interfere."""
