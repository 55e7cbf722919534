"""Initialisations of A and B, one paper per module; :mod:`adapters.initialise.start` applies them to a model.

``W0`` (out, in) is frozen, ``A`` (r, in), ``B`` (out, r), update ``s B A``. Where the update does not start at zero, a
frozen copy is subtracted as an offset (:mod:`adapters.layers.variant`): the base is never changed.
"""
