"""Composition methods, one per file: a ``METHOD`` entry with the method's properties, and the function it names,
(strengths, ...) -> list[Step].

The list is the catalogue's, so it includes methods of installed packages. A method that does more in a step than its
gates express also has, in the module of its entry, a class ``Run``, derived from
:class:`pipelines.diffusion.denoise.Denoising`. Importing this package does not load torch.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from adapters import catalogue
from adapters.catalogue import Method
from pipelines.diffusion.methods.properties import Properties
from pipelines.diffusion.methods.step import Step, Strengths

__all__ = ["Properties", "Step", "Strengths", "find", "names", "plan_steps", "properties", "runner", "usual"]


def names(suits: Callable[[Properties], bool] = lambda _: True) -> tuple[str, ...]:
    """Names of the methods whose properties satisfy ``suits``, in the order of ``position``."""
    found = [(method.typed(Properties), method.name) for method in catalogue.stage("compose")]
    return tuple(name for known, name in sorted(found, key=lambda pair: pair[0].position) if suits(known))


def usual(regional: bool) -> str:
    """The default method, with regions or without."""
    return names(lambda known: known.regional == regional)[0]


def find(name: str) -> Method:
    """The method called ``name``; raises :class:`~adapters.errors.InputError` if there is none."""
    return catalogue.find("compose", name)


def properties(name: str) -> Properties:
    """The properties of the method called ``name``; raises as :func:`find`."""
    return find(name).typed(Properties)


def plan_steps(name: str, strengths: Strengths, **options: Any) -> list[Step]:
    """The method's steps, from the strengths and those of the options that its function takes."""
    steps: Any = find(name).load()
    known = inspect.signature(steps).parameters
    made: list[Step] = steps(strengths, **{key: value for key, value in options.items() if key in known})
    return made


def runner(name: str) -> Any:
    """The class that runs the method's steps: its own ``Run``, or :class:`pipelines.diffusion.denoise.Denoising`."""
    from pipelines.diffusion.denoise import Denoising

    module = importlib.import_module(find(name).entry.partition(":")[0])
    return getattr(module, "Run", Denoising)
