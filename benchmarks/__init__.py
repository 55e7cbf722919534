"""Programs that measure what the documentation states; their results are in ``benchmarks/results``.

A package of its own, because some libraries (Opacus) install one of the same name, which would hide these.
"""
