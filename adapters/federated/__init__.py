"""Federated fine-tuning: what the server makes of its clients' adapters, one paper per module, and the client's part.

A rule is a pure function ``aggregate(replies, weights, options) -> Aggregate`` on named tensors
(:mod:`adapters.federated.state`); it knows no network and no trainer. :mod:`adapters.federated.participant` puts the
server's tensors into a model before a training and collects what was trained after it.
"""
