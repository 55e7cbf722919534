"""Adapters of the library as the frozen experts of an X-LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.catalogue import find, stage
from adapters.errors import InputError
from adapters.formats.mixture import base_named, different_bases
from studio import library
from studio.library.scan import own_name

if TYPE_CHECKING:
    from adapters.layers.experts.xlora import Expert


def frozen(method: str) -> bool:
    """Whether a method mixes adapters that exist, instead of making experts."""
    return any(one.name == method and one.properties.get("frozen") for one in stage("layers"))


def places(config: Any) -> dict[str, Path]:
    """Name -> place of the adapters in ``experts``, in their order; separated by commas, or else by spaces.

    Raises:
        InputError: there is none, one is named twice, or one cannot be used.
    """
    text = config.experts or ""
    given = [part.strip() for part in (text.split(",") if "," in text else text.split())]
    given = [part for part in given if part]
    if not given:
        raise InputError(f"{config.method} mixes adapters that you have: name them in experts, separated by commas.")
    found: dict[str, Path] = {}
    for part in given:
        place = library.resolve_adapter(part)
        name = part if not Path(part).expanduser().exists() else own_name(place)
        if name in found:
            raise InputError(f"Two experts are called '{name}': name each adapter once.")
        found[name] = place
    return found


def read(config: Any, model: Any) -> list[Expert]:
    """The experts, fitted to the model.

    Raises:
        InputError: one cannot be read, or does not fit the base.
    """
    from adapters.layers.experts.xlora import expert
    from pipelines.language.adapters import read_fitting

    return [expert(name, read_fitting(place, model, config.base)) for name, place in places(config).items()]


def remark(config: Any) -> str:
    """Words for people if the experts are for different bases; else nothing."""
    if not frozen(getattr(config, "method", "lora")):
        return ""
    return different_bases({name: base_named(place) for name, place in places(config).items()})


def options(config: Any) -> Any:
    """The classifier's options."""
    import inspect

    from adapters.layers.experts.classifier import ClassifierOptions

    choices: Any = find("layers", config.method).load()
    values = {name: getattr(config, name) for name in inspect.signature(choices).parameters}
    return ClassifierOptions.of(choices(**values)["classifier"])
