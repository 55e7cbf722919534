"""Smaller bases: the jobs that make them, one module of ``methods`` each, and ``studio compress``."""
