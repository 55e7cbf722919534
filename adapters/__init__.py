"""Low-rank adapters on any torch model: files, layers and the mathematics of combining them.

Nothing in this package depends on diffusers, the application or its pages.
"""
