"""Which language trainings can share one base in memory, and their run; without torch until they run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from adapters.errors import InputError
from studio import library
from studio.library import packaged
from studio.schema import JobConfig
from studio.training.device import launched
from studio.training.language import experts

SAME = ("base", "quantization", "dtype", "device", "attention", "gradient_checkpointing", "tf32")
"""Keys in which all must agree."""


def check(configs: Mapping[str, JobConfig]) -> None:
    """Refuse trainings that cannot run together.

    Args:
        configs: name of the file or job -> its configuration.

    Raises:
        InputError: naming the file or job and the key.
    """
    if len(configs) < 2:
        raise InputError("Training together takes at least two configurations on one base.")
    if launched():
        raise InputError("Adapters are trained together by one process: start it without a launcher.")
    first = next(iter(configs))
    for name in configs:
        _check_one(name, configs[name])
        for key in SAME:
            own, theirs = _value(configs[name], key), _value(configs[first], key)
            if own != theirs:
                raise InputError(
                    f"{name}: {key} is '{own}', but '{theirs}' in {first}: adapters that are trained together share "
                    "it; make it equal, or train them one by one."
                )


def run(works: Sequence[Callable[[Any], Any]]) -> list[Any]:
    """Run them; see :func:`studio.training.drivers.packed.run`."""
    from studio.training.drivers import packed

    return packed.run(works)


def _value(config: Any, key: str) -> Any:
    value = getattr(config, key)
    return str(library.resolve_language(value)) if key == "base" and value not in packaged.known() else value


def _check_one(name: str, config: Any) -> None:
    for key, asked, why in _ALONE:
        if asked(config):
            raise InputError(f"{name}: {key} needs the base alone ({why}): leave it out, or train it by itself.")


_ALONE: tuple[tuple[str, Callable[[Any], Any], str], ...] = (
    ("neftune_alpha", lambda c: c.neftune_alpha, "its noise depends on the size of the batch"),
    ("method", lambda c: experts.frozen(c.method), "its gates need a pass of the base of their own"),
    ("tracker", lambda c: c.tracker not in ("none", "tensorboard"), "it follows one run per process"),
    ("dropout", lambda c: c.dropout and c.gradient_checkpointing, "recomputed passes would draw other numbers"),
    ("perturb", lambda c: c.perturb != "none" and c.gradient_checkpointing, "recomputed passes would draw other noise"),
)
"""(key, whether a configuration asks for it, why it cannot share a pass)."""
