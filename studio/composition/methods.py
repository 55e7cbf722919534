"""Properties of composition methods for schemas, commands and pages. Loads no torch."""

from __future__ import annotations

from pipelines.diffusion.methods import Properties, names, properties, usual


def with_regions() -> tuple[str, ...]:
    """The methods that use regions; the others refuse them."""
    return names(lambda known: known.regional)


def known(name: str) -> Properties:
    """The properties of a method; for an unknown name (refused elsewhere) those of an ordinary one."""
    return properties(name) if name in names() else Properties()


__all__ = ["known", "names", "usual", "with_regions"]
