"""The one pipeline this process keeps loaded, so that the next picture from the same base starts at once."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adapters.errors import StudioError
from studio import library, silence
from studio.composition import recipes
from studio.composition.schema import ModelChoice
from studio.library import cache

_kept: tuple[tuple[str, ...], Any, dict[tuple[str, str], Any]] | None = None
"""The choice, its pipeline, and pipelines for other tasks with the same models, by task and ControlNet."""


@contextmanager
def pipeline(choice: ModelChoice, task: str = "", controlnet: str = "") -> Iterator[Any]:
    """The :class:`pipelines.diffusion.MultiLoRAPipeline` for ``choice``, without adapters.

    With a ``task`` it is that of :meth:`~pipelines.diffusion.MultiLoRAPipeline.for_task`. Adapters loaded meanwhile are
    unloaded again. After an unexpected error the pipeline is dropped, because its state is unknown.
    """
    global _kept
    key = _key(choice)
    kept = _kept  # another thread may release it meanwhile; this use keeps its own reference
    if kept is None or kept[0] != key:
        release()
        kept = _kept = (key, _load(choice), {})
    pipe = _of_task(*kept[1:], task, controlnet) if task else kept[1]
    try:
        with pipe:
            yield pipe
    except StudioError:
        raise
    except BaseException:
        release()
        raise


def release() -> None:
    """Free the memory of the kept pipeline."""
    global _kept
    if _kept is None:
        return
    _kept = None
    gc.collect()
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _load(choice: ModelChoice) -> Any:
    from pipelines.diffusion import MultiLoRAPipeline

    silence.loading_bars()
    return MultiLoRAPipeline.from_pretrained(
        library.resolve_pipeline(choice.base), family=choice.family, dtype=choice.dtype, device=choice.device,
        attention=choice.attention, memory=choice.memory, quantization=choice.quantization, denoiser=choice.denoiser,
    )  # fmt: skip


def _of_task(pipe: Any, known: dict[tuple[str, str], Any], task: str, controlnet: str) -> Any:
    place = Path(controlnet).expanduser()
    network = f"{controlnet} {cache.stamp(place)}" if controlnet and place.exists() else controlnet
    if (task, network) not in known:
        for key in [key for key in known if key[1] not in ("", network)]:
            del known[key]  # only one ControlNet is in memory at a time
        known[task, network] = pipe.for_task(task, **({"controlnet": controlnet} if controlnet else {}))
    return known[task, network]


def _key(choice: ModelChoice) -> tuple[str, ...]:
    """Identifies a loaded pipeline: the choice, and the state of the base's files."""
    place = library.resolve_pipeline(choice.base)
    used = [Path(place), Path(choice.denoiser or place)]
    used += recipes.others_of(used[1], choice) if choice.denoiser else []
    stamps = [cache.stamp(path) if path.exists() else "" for path in used]
    chosen = (choice.family, choice.dtype, choice.device, choice.attention, choice.memory, choice.quantization)
    return (place, choice.denoiser, *stamps, *chosen)
