"""Composition methods, one per file: a ``METHOD`` entry that names a function (strengths, ...) -> list[Step].

A method that does more in a step than its gates say also has a class ``Run``, a
:class:`pipelines.diffusion.denoise.Denoising` of its own.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from functools import cache
from typing import Any

from adapters.catalogue import Method
from adapters.errors import InputError, nearest
from pipelines.diffusion.methods.step import Step, Strengths

__all__ = ["Step", "Strengths", "find", "names", "plan_steps", "runner"]


@cache
def _methods() -> dict[str, Method]:
    modules = (importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__))
    return {module.METHOD.name: module.METHOD for module in modules if hasattr(module, "METHOD")}


def names() -> tuple[str, ...]:
    """The composition methods there are."""
    return tuple(sorted(_methods()))


def find(name: str) -> Method:
    """The method called ``name``.

    Raises:
        InputError: there is none; the message lists the possible ones.
    """
    if name not in _methods():
        raise InputError(f"Unknown method '{name}'{nearest(name, names())}: possible are {', '.join(names())}.")
    return _methods()[name]


def plan_steps(name: str, strengths: Strengths, **options: Any) -> list[Step]:
    """What the method does at every step; it is given those of the options that it has."""
    steps: Any = find(name).load()
    known = inspect.signature(steps).parameters
    made: list[Step] = steps(strengths, **{key: value for key, value in options.items() if key in known})
    return made


def runner(name: str) -> Any:
    """The class that does the method's steps: its own ``Run``, or :class:`pipelines.diffusion.denoise.Denoising`."""
    from pipelines.diffusion.denoise import Denoising

    module = importlib.import_module(find(name).entry.partition(":")[0])
    return getattr(module, "Run", Denoising)
