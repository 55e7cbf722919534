"""How A and B start, one paper per module; :mod:`adapters.initialise.start` puts the result into a model.

``W0`` (out, in) is frozen, ``A`` (r, in), ``B`` (out, r), update ``s B A``. A start away from zero keeps a frozen copy
as an offset (:mod:`adapters.layers.variant`): the base is never changed.
"""
