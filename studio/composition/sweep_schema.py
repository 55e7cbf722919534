"""A sweep: the same composition over values of one or several settings, e.g. ``fox=0:1.2:7`` and ``seed=1,2,3``."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from typing import Any, ClassVar

from pydantic import Field, model_validator

from adapters.errors import InputError, nearest
from studio.composition.region_schema import REGIONAL_METHODS
from studio.composition.schema import ComposeConfig
from studio.schema import JobConfig

FORM = "NAME=FROM:TO:COUNT or NAME=VALUE,VALUE"
SETTINGS = {"seed": int, "steps": int, "guidance_scale": float, "method": str}
"""Settings that can be swept, besides the adapters' weights and the checkpoint."""
ALSO = {"guidance": "guidance_scale", "cfg": "guidance_scale"}
CHECKPOINT = "checkpoint"
MOST = 256
"""Maximum pictures of a sweep."""

_SPAN = re.compile(r"([^:]+):([^:]+):(\d+)")


class Axis(JobConfig):
    """One setting and its values."""

    name: str = Field(description="seed, steps, guidance, method, checkpoint, or an adapter's name for its weight.")
    values: list[float | str] = Field(description="Its values, in order.")


class SweepConfig(ComposeConfig):
    """One picture per combination of values, everything else the same."""

    kind: ClassVar[str] = "sweep"

    axes: list[Axis] = Field(description="What to vary; the last one runs from left to right in the grid.")
    batch: int = Field(
        1, ge=1, le=64, description="Pictures of a sweep made in one pass, where only seeds (or, with merge, weights) "
        "differ: faster, each as if made alone but for rounding. 1 = to the bit.",
    )  # fmt: skip

    @model_validator(mode="after")
    def _fits(self) -> SweepConfig:
        names = [axis.name for axis in self.axes]
        if not names:
            raise ValueError("say what to vary, as in fox=0:1.2:7")
        if len(set(names)) != len(names):
            raise ValueError("a setting is swept twice: give all its values at once")
        count = math.prod(len(axis.values) for axis in self.axes)
        if count > MOST:
            raise ValueError(f"that makes {count} pictures, but at most {MOST} are made at once: give fewer values")
        for axis in self.axes:
            self._check(axis)
        return self

    def _check(self, axis: Axis) -> None:
        adapters = [use.name or use.path for use in self.adapters]
        if axis.name == CHECKPOINT:
            if len(adapters) != 1:
                raise ValueError("a sweep over checkpoints needs exactly one adapter, whose place they take")
        elif axis.name not in (*SETTINGS, *adapters):
            known = ", ".join(["seed", "steps", "guidance", "method", CHECKPOINT, *adapters])
            raise ValueError(f"'{axis.name}' cannot be swept{nearest(axis.name, [*SETTINGS, *adapters])}: {known} can")
        elif axis.name not in SETTINGS and any(isinstance(value, str) for value in axis.values):
            raise ValueError(f"the weights of '{axis.name}' must be numbers")

    def combinations(self) -> Iterator[tuple[tuple[str, ...], ComposeConfig]]:
        """Labels (one per axis) and the composition of every picture; the last axis varies fastest."""
        whole = self.model_dump(mode="json", exclude={"axes", "batch"})
        for values in itertools.product(*(axis.values for axis in self.axes)):
            config: dict[str, Any] = {**whole, "images": 1}
            for axis, value in zip(self.axes, values, strict=True):
                config = _with(config, axis.name, value)
            labels = tuple(_label(axis.name, value) for axis, value in zip(self.axes, values, strict=True))
            yield labels, ComposeConfig.parse(config, source=", ".join(labels))


def parse_axis(text: str) -> dict[str, Any]:
    """The values of an :class:`Axis` from ``NAME=FROM:TO:COUNT`` or ``NAME=VALUE,VALUE``.

    Raises:
        InputError: it is neither, or a value is not of the setting's kind.
    """
    name, equals, written = (part.strip() for part in text.partition("="))
    name = ALSO.get(name, name)
    if not (name and equals and written):
        raise InputError(f"A sweep is written {FORM}, as in fox=0:1.2:7 or seed=1,2,3; got '{text}'.")
    kind = SETTINGS.get(name, str if name == CHECKPOINT else float)
    span = _SPAN.fullmatch(written) if kind is not str else None
    parts = [part.strip() for part in written.split(",") if part.strip()]
    try:
        values = _spread(span) if span else [part if kind is str else float(part) for part in parts]
    except ValueError:
        raise InputError(f"'{text}': the values of {name} are numbers, as in {name}=0:1.2:7 or {name}=1,2,3.") from None
    if not values or any(isinstance(value, float) and not math.isfinite(value) for value in values):
        raise InputError(f"'{text}': give at least one finite value.")
    if kind is int and any(value != int(value) for value in values):
        raise InputError(f"'{text}': the values of {name} are whole numbers.")
    return {"name": name, "values": values}


def _spread(span: re.Match[str]) -> list[float]:
    """Values from the first to the last at equal distances."""
    first, last, count = float(span[1]), float(span[2]), int(span[3])
    if not 1 <= count <= MOST:
        raise InputError(f"'{span[0]}': the number of values must lie between 1 and {MOST}.")
    step = (last - first) / max(1, count - 1)
    return [round(first + number * step, 6) for number in range(count)]


def _with(config: dict[str, Any], name: str, value: float | str) -> dict[str, Any]:
    if name == "method" and value not in REGIONAL_METHODS:
        config = {**config, "regions": []}
    if name in SETTINGS:
        return {**config, name: SETTINGS[name](value)}
    uses = [dict(use) for use in config["adapters"]]
    if name == CHECKPOINT:
        uses[0] |= {"path": str(value), "name": uses[0]["name"] or uses[0]["path"]}
    else:
        for use in uses:
            if name in (use["name"], use["path"]):
                use["weight"] = float(value)
    return {**config, "adapters": uses}


def _label(name: str, value: float | str) -> str:
    written = value if isinstance(value, str) else f"{value:g}" if name != "seed" else str(int(value))
    return f"{name.removesuffix('_scale')} {written}"
