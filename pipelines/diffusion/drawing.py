"""One call of the diffusers pipeline: what is asked for, the sampler, reports of each step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from adapters.progress import Monitor, Progress, check
from pipelines.diffusion.preview import preview
from pipelines.diffusion.samplers import sampler


@dataclass(frozen=True)
class Request:
    """What a call asks for.

    Attributes:
        size: height and width of the pictures.
        call: what the diffusers pipeline is told unchanged.
        given: generators to use instead of the seed's.
        callback, callback_tensors: the caller's own callback_on_step_end and what it wants to see.
    """

    prompt: str
    negative: str
    images: int
    guided: bool
    seed: int
    size: tuple[int, int]
    call: Mapping[str, Any]
    monitor: Monitor
    preview_every: int
    given: Any = None
    callback: Any = None
    callback_tensors: tuple[str, ...] = ()

    def generators(self) -> Any:
        """One per picture, so that a picture is the same whatever the number of pictures; or what was given."""
        if self.given is not None:
            return self.given
        return [torch.Generator().manual_seed(self.seed + k) for k in range(self.images)]


BeforeStep = Callable[[int, torch.Tensor], dict[str, Any]]
"""(number of the next step, latents) -> what changes before it: {} or {"latents": ...}."""


@contextmanager
def sampling(pipe: Any, name: str, flow: bool) -> Iterator[Any]:
    """A fresh sampler in place of the pipeline's own, and no progress bar, for the time of a call."""
    own, bar = pipe.scheduler, dict(getattr(pipe, "_progress_bar_config", {}))
    fresh = sampler(name, own, flow)
    try:
        pipe.scheduler = fresh
        pipe.set_progress_bar_config(disable=True)
        yield fresh
    finally:
        pipe.scheduler = own
        pipe.set_progress_bar_config(**bar)


def draw(
    pipe: Any,
    run: Any,
    request: Request,
    arguments: Mapping[str, Any],
    generators: Any,
    before_step: BeforeStep | None = None,
) -> Any:
    """Let the diffusers pipeline draw, while ``run`` is attached; returns what it returned."""
    report = _reporter(run, request, before_step)
    if "callback_on_step_end" in inspect.signature(type(pipe).__call__).parameters:
        told: dict[str, Any] = {"callback_on_step_end": report}
        if request.callback_tensors:
            told["callback_on_step_end_tensor_inputs"] = list(dict.fromkeys(("latents", *request.callback_tensors)))
    else:  # T2I-Adapter's pipelines have the older callback, which can only look on

        def look(index: int, timestep: Any, latents: torch.Tensor) -> None:
            report(pipe, index, timestep, {"latents": latents})

        told = {"callback": look, "callback_steps": 1}
    return pipe(**request.call, **arguments, generator=generators, **told)


def joined(images: Sequence[Any]) -> Any:
    """The pictures of several calls, tensors or lists, as those of one."""
    return torch.cat(list(images)) if isinstance(images[0], torch.Tensor) else [one for part in images for one in part]


def one_after_the_other(results: Sequence[Any]) -> Any:
    """What several calls of a diffusers pipeline returned, as if it were of one."""
    made = results[0]
    made.images = joined([result.images for result in results])
    if getattr(made, "nsfw_content_detected", None):
        made.nsfw_content_detected = [flag for result in results for flag in result.nsfw_content_detected]
    return made


def _reporter(run: Any, request: Request, before_step: BeforeStep | None) -> Any:
    """diffusers' callback: move to the next step, correct the latents, report, stop if asked."""
    total, every = len(run.steps), request.preview_every

    def on_step_end(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        run.step = index + 1
        picture = None
        if every and (index + 1) % every == 0 and index + 1 < total:
            picture = preview(pipe, tensors["latents"], *request.size)
        request.monitor.report(Progress("sampling", index + 1, total, preview=picture))
        check(request.monitor)
        changed = before_step(index + 1, tensors["latents"]) if before_step and index + 1 < total else {}
        if request.callback is None:
            return changed
        return {**changed, **(request.callback(pipe, index, timestep, {**tensors, **changed}) or {})}

    return on_step_end
