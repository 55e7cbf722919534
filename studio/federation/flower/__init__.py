"""A federation over a network, by Flower: the same server and clients, its messages, TLS and node authentication.

Flower's requirements hold back those of the app (typer, rich, fastapi, starlette, protobuf), so it is installed in an
environment of its own (extra ``federated``). Only modules below this one import it.
"""
