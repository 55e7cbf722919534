"""One call of the diffusers pipeline: its request, the sampler, and reports of each step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from adapters.progress import Monitor, Progress, check
from pipelines.diffusion.preview import preview
from pipelines.diffusion.samplers import check_noise, sampler


@dataclass(frozen=True)
class Request:
    """The request of a call.

    Attributes:
        images: number of pictures.
        guided: every prediction has two halves.
        size: height and width of the pictures in pixels.
        call: arguments passed on to the diffusers pipeline.
        preview_every: steps between previews; 0 = none.
        given: generators to use instead of the seed's.
        callback, callback_tensors: the caller's own callback_on_step_end and the names of its tensors.
        noise: the noise levels that the plan was made with; empty if none was needed.
        image: the picture that the call starts from, or edits.
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
    noise: tuple[float, ...] = ()
    image: Any = None

    def generators(self) -> Any:
        """One generator per picture, so that a picture does not depend on the number of pictures; or those given."""
        if self.given is not None:
            return self.given
        return generators(range(self.seed, self.seed + self.images))


def generators(seeds: Iterable[int]) -> list[torch.Generator]:
    """A random generator for each seed."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


BeforeStep = Callable[[int, torch.Tensor], dict[str, Any]]
"""(number of the next step, latents) -> changes before it: {} or {"latents": ...}."""


@contextmanager
def sampling(pipe: Any, name: str, flow: bool) -> Iterator[Any]:
    """Inside, the pipeline has a fresh sampler (which is yielded) and no progress bar; restored on exit."""
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
    """Call the diffusers pipeline while ``run`` is attached; returns its result.

    Args:
        run: the attached hooks, whose ``step`` is advanced.
        request: what is requested.
        arguments: the encoded prompt, and initial latents if any.
        generators: random generators of the call.
        before_step: may correct the latents before each step after the first.
    """
    report = _reporter(run, request, before_step)
    if "callback_on_step_end" in inspect.signature(type(pipe).__call__).parameters:
        callback: dict[str, Any] = {"callback_on_step_end": report}
        if request.callback_tensors:
            callback["callback_on_step_end_tensor_inputs"] = list(dict.fromkeys(("latents", *request.callback_tensors)))
    else:  # T2I-Adapter's pipelines have the older callback, which cannot change the latents

        def observe(index: int, timestep: Any, latents: torch.Tensor) -> None:
            report(pipe, index, timestep, {"latents": latents})

        callback = {"callback": observe, "callback_steps": 1}
    with own_randomness(arguments, generators):
        return pipe(**request.call, **arguments, generator=generators, **callback)


@contextmanager
def own_randomness(arguments: Mapping[str, Any], generators: Any) -> Iterator[None]:
    """Inside, torch's own generator begins at the seed too; restored on exit.

    diffusers' ControlNet pipeline of SD3 samples the latents of the control picture from it, so that no picture would
    repeat.

    Args:
        arguments: the encoded prompt, which lies on the device of the call.
    """
    parts = [part for value in arguments.values() for part in (value if isinstance(value, list) else [value])]
    used = {part.device for part in parts if isinstance(part, torch.Tensor) and part.device.type == "cuda"}
    first = generators[0] if isinstance(generators, list) else generators
    with torch.random.fork_rng(used):
        torch.manual_seed(first.initial_seed())
        yield


def pictures(result: Any) -> Any:
    """The pictures in a diffusers pipeline's result, or its videos."""
    return result.images if hasattr(result, "images") else result.frames


def stills(result: Any) -> list[Any]:
    """The pictures in a diffusers pipeline's result, or the first frame of each of its videos."""
    return list(result.images) if hasattr(result, "images") else [frames[0] for frames in result.frames]


def joined(images: Sequence[Any]) -> Any:
    """The pictures of several calls (tensors or lists) as those of one."""
    return torch.cat(list(images)) if isinstance(images[0], torch.Tensor) else [one for part in images for one in part]


def one_after_the_other(results: Sequence[Any]) -> Any:
    """The results of several calls of a diffusers pipeline as one result."""
    made = results[0]
    setattr(made, "images" if hasattr(made, "images") else "frames", joined([pictures(result) for result in results]))
    if getattr(made, "nsfw_content_detected", None):
        made.nsfw_content_detected = [flag for result in results for flag in result.nsfw_content_detected]
    return made


def _reporter(run: Any, request: Request, before_step: BeforeStep | None) -> Any:
    """diffusers' callback: advance the step, report, stop if cancelled, correct the latents."""
    total, every = len(run.steps), request.preview_every

    def on_step_end(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        run.step = index + 1
        if index == 0 and request.noise:
            check_noise(pipe.scheduler, request.noise)
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
