"""Federated training: several clients train an adapter together without showing each other their data.

``schema`` is the configuration; ``partition`` and ``clients`` say who has what; ``client`` is what a client does with a
message and ``server`` what the server makes of the replies, both without a network. ``engine`` lets them talk in one
process (the job ``federate``); :mod:`studio.federation.flower` lets them talk over one, with Flower.
"""
