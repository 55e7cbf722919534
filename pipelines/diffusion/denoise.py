"""The two hooks on the denoiser that make any diffusers pipeline compose adapters.

The pipeline calls its denoiser once per step (twice in Flux with true guidance). Before that call the gates of the
step are set; if adapters predict separately, the batch is repeated adapter-major

    (z, c)  ->  (z, c_1) ... (z, c_n)      n adapters x batch (x 2 guidance halves inside each)

and after it the n predictions are reduced to one, so scheduler and guidance need no change. With ``adapter_batch`` the
n predictions are made in several calls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from adapters.layers.folded import Blocks
from adapters.layers.gated import Gates, alone
from pipelines.diffusion.families import Encoding, Family
from pipelines.diffusion.families.base import joined, repeat
from pipelines.diffusion.methods.composite import reduce
from pipelines.diffusion.methods.step import Step, TextAdapters

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Denoising:
    """The hooks of one run: set the gates of the current step, repeat the batch and reduce the predictions.

    Args:
        family: names of the denoiser's arguments.
        gates: gates of the joined adapters.
        steps: what each step does.
        texts: for each step, the name of the encoding of each of its predictions.
        encodings: the encodings by name.
        given: the name of the encoding that the pipeline itself was given.
        adapter_batch: most predictions per call; None = all.
    """

    def __init__(
        self,
        family: Family,
        gates: Gates,
        steps: Sequence[Step],
        texts: Sequence[Sequence[TextAdapters]],
        encodings: Mapping[TextAdapters, Encoding],
        given: TextAdapters,
        adapter_batch: int | None = None,
    ) -> None:
        self.family, self.gates, self.steps, self.texts = family, gates, steps, texts
        self.encodings, self.given = encodings, given
        self.adapter_batch = adapter_batch
        self.step = 0
        self.calls = 0
        self.output = 0  # which of the denoiser's predictions is reduced
        self._in_step = (-1, 0)  # the step, and which of its calls of the denoiser this is
        self._pending: tuple[Arguments, list[list[int]]] | None = None
        self._roles: dict[tuple[Any, ...], tuple[str, ...]] = {}

    @contextmanager
    def attached(self, *denoisers: nn.Module) -> Any:
        """Attach the hooks to the denoisers, of which the pipeline calls one at each step; removed on exit."""
        with ExitStack() as stack:
            for denoiser in denoisers:
                before = denoiser.register_forward_pre_hook(self._before, with_kwargs=True)
                stack.callback(before.remove)
                after = denoiser.register_forward_hook(self._after, with_kwargs=True)
                stack.callback(after.remove)
            yield self

    def predictions(self, step: Step) -> list[int]:
        """Numbers of the separate predictions of a step; empty if all adapters share one."""
        return separate(step)

    def set_gates(self, step: Step, predictions: Sequence[int], batch: int) -> None:
        """Gates for some of the step's predictions, each of ``batch`` samples."""
        adapters = [step.active[k] for k in predictions]
        if len(adapters) == 1:
            self.gates.joint(blocks(step, predictions)[0])
        else:
            self.gates.grouped(adapters, [step.gates[i] for i in adapters])

    def reduce(self, predictions: Tensor) -> Tensor:
        """All predictions (predictions * batch, ...) as one (batch, ...)."""
        return reduce(predictions, len(self.steps[min(self.step, len(self.steps) - 1)].active))

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """Set the gates of this step and repeat the batch if adapters predict separately."""
        self.calls += 1
        args, kwargs = named(args, kwargs, self.family.positional)
        self._in_step = (self.step, self._in_step[1] + 1 if self._in_step[0] == self.step else 0)
        step = self.steps[min(self.step, len(self.steps) - 1)]
        predictions = self.predictions(step)
        if not predictions:
            self._pending = None
            self.gates.joint(step.gates)
            return self._with_text(args, kwargs, [0], 1)
        chunks = chunked(predictions, self.adapter_batch)
        self._pending = (args, kwargs), chunks
        return self._chunk(args, kwargs, step, chunks[0])

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Make the predictions that did not fit into the first call, and reduce all to one."""
        if self._pending is None:
            return None
        (given, named), chunks = self._pending
        step = self.steps[min(self.step, len(self.steps) - 1)]
        parts = [self._tensors(output)]
        for chunk in chunks[1:]:
            more_args, more_kwargs = self._chunk(given, named, step, chunk)
            parts.append(self._tensors(module.forward(*more_args, **more_kwargs)))
        self._pending = None
        made = []
        for number, of in enumerate(zip(*parts, strict=True)):
            self.output = number
            made.append(self.reduce(torch.cat(of) if len(of) > 1 else of[0]))
        self.output = 0
        return _replaced(output, made)

    def _tensors(self, output: Any) -> list[Tensor]:
        """The predictions of picture and, in some families, sound."""
        return [_tensor(output[number]) for number in range(self.family.outputs)]

    def _chunk(self, args: tuple[Any, ...], kwargs: dict[str, Any], step: Step, predictions: list[int]) -> Arguments:
        """Gates and arguments for some of the step's predictions."""
        # lists are copied because a UNet pops T2I-Adapter's residuals
        kwargs = {name: list(value) if isinstance(value, list) else value for name, value in kwargs.items()}
        self.set_gates(step, predictions, self._batch(args, kwargs))
        return self._with_text(args, kwargs, predictions, len(predictions))

    def _with_text(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], predictions: list[int], count: int
    ) -> Arguments:
        """The arguments repeated ``count`` times, with the encoding of each prediction in place."""
        texts = [self.texts[min(self.step, len(self.texts) - 1)][k] for k in predictions]
        own_text = any(active != self.given for active in texts)
        if count == 1 and not own_text:
            return args, kwargs
        batch = self._batch(args, kwargs)
        wide = tuple(repeat(value, count, batch) for value in args)
        more = {name: self.family.repeat(name, value, count, batch) for name, value in kwargs.items()}
        if own_text:
            axes = self.family.batch_axes
            passed = {kind: _at(kwargs, path) for path, kind in self.family.text_arguments.items()}
            given = {kind: _moved(value, axes.get(kind, 0), 0) for kind, value in passed.items()}
            present = {kind: value for kind, value in given.items() if value is not None}
            role = self._role(present)
            halves = [_of_role(self.encodings[active], role) for active in texts]
            made = self.family.passed({kind: as_batch([half[kind] for half in halves]) for kind in halves[0]})
            for path, kind in self.family.text_arguments.items():
                if kind in present:
                    text = self.family.argument(kind, made[kind], given[kind])
                    more = _put(more, path, _moved(_like(text, given[kind]), 0, axes.get(kind, 0)))
                elif not bool(made[kind].all()):  # pipelines leave out a mask that hides nothing
                    more = _put(more, path, made[kind].to(next(iter(present.values())).device))
        return wide, more

    def _batch(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
        """Number of samples of a call of the denoiser."""
        known = ("sample", *self.family.batch_arguments, *self.family.list_arguments)
        return len(args[0] if args else next(kwargs[name] for name in known if name in kwargs))

    def _role(self, given: Mapping[str, Any]) -> tuple[str, ...]:
        """Which halves of the encoding the pipeline passed, in order (compared once per tensor).

        If prompt and negative prompt are equal, the first pass of a step is the positive one, as in diffusers.

        Args:
            given: name in the encoding -> what was passed.
        """
        key = tuple((part.data_ptr(), tuple(part.shape)) for value in given.values() for part in _parts(value))
        if key in self._roles:
            return self._roles[key]
        encoding = self.encodings[self.given]
        roles: list[tuple[str, ...]] = [("positive",)]
        if encoding.negative is not None:
            both = ("positive", "negative") if self.family.positive_first else ("negative", "positive")
            roles = [both, *roles, ("negative",)]
        made = {role: self.family.passed(_of_role(encoding, role)) for role in roles}

        def fits(role: tuple[str, ...], kind: str, value: Any) -> bool:
            return _same(self.family.argument(kind, made[role][kind], value), value)

        fitting = [role for role in roles if all(fits(role, kind, value) for kind, value in given.items())]
        if not fitting:
            raise RuntimeError(f"the pipeline passed {', '.join(given)} that are not the encoded prompt")
        if len(fitting) == 1:
            self._roles[key] = fitting[0]
        return fitting[min(self._in_step[1], len(fitting) - 1)]


def separate(step: Step) -> list[int]:
    """Numbers of the separate predictions of a step; empty if all adapters share one."""
    return list(range(len(step.active))) if step.separate and len(step.active) > 1 else []


def chunked(predictions: list[int], most: int | None) -> list[list[int]]:
    """Predictions split into calls of the denoiser, each of at most ``most`` (None = all in one)."""
    size = most or max(1, len(predictions))
    return [predictions[i : i + size] for i in range(0, len(predictions), size)]


def blocks(step: Step, predictions: Sequence[int]) -> Blocks:
    """The gates of one call of the denoiser for some of a step's separate ``predictions``; empty = the only one."""
    if not predictions:
        return (step.gates,)
    adapters = [step.active[k] for k in predictions]
    return alone(adapters, [step.gates[i] for i in adapters], len(step.gates))


def known_calls(kind: type[Denoising], steps: Sequence[Step], adapter_batch: int | None) -> list[Blocks]:
    """The gates of every call of the denoiser; empty if runs of this ``kind`` set them in their own way."""
    names = ("_before", "predictions", "set_gates", "_chunk")
    if any(getattr(kind, name) is not getattr(Denoising, name) for name in names):
        return []
    return [blocks(step, chunk) for step in steps for chunk in chunked(separate(step), adapter_batch) or [[]]]


def named(args: tuple[Any, ...], kwargs: dict[str, Any], names: Sequence[str]) -> Arguments:
    """Arguments by position and name, the first of them with these ``names`` instead of positions."""
    return args[len(names) :], {**dict(zip(names, args, strict=False)), **kwargs}


def _of_role(encoding: Encoding, role: Sequence[str]) -> dict[str, Any]:
    halves = [getattr(encoding, half) for half in role]
    return {kind: as_batch([half[kind] for half in halves]) for kind in halves[-1]}


def _parts(value: Any) -> list[Tensor]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _same(ours: Any, theirs: Any) -> bool:
    pairs = list(zip(_parts(ours), _parts(theirs), strict=False))
    return len(_parts(ours)) == len(_parts(theirs)) and all(
        one.shape == other.shape and torch.equal(one.to(other), other) for one, other in pairs
    )


def as_batch(values: Sequence[Any]) -> Any:
    """Tensors or lists of several samples as one batch."""
    if len(values) == 1:
        return values[0]
    if isinstance(values[0], Tensor):
        return joined(list(values))
    return [part for value in values for part in value]


def _moved(value: Any, source: int, target: int) -> Any:
    """``value`` with the axis ``source`` at ``target``."""
    return value if source == target else value.movedim(source, target)


def _like(value: Any, given: Any) -> Any:
    """``value`` in the dtype and on the device of ``given``."""
    return value.to(given) if isinstance(value, Tensor) else [part.to(given[0]) for part in value]


def _at(values: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    for key in path:
        values = values[key]
    return values


def _put(values: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """``values`` with another value at ``path``; the originals are not changed."""
    first, *rest = path
    return {**values, first: _put(values[first], tuple(rest), value) if rest else value}


def _tensor(found: Any) -> Tensor:
    """A prediction with the batch in front; some denoisers return a list with one entry per sample."""
    return torch.stack(found) if isinstance(found, list) else found


def _replaced(output: Any, tensors: Sequence[Tensor]) -> Any:
    """The denoiser's output with other predictions."""
    made: list[Any] = [
        list(tensor.unbind()) if isinstance(output[number], list) else tensor for number, tensor in enumerate(tensors)
    ]
    if isinstance(output, tuple):
        return (*made, *output[len(made) :])
    for name, tensor in zip(list(output), made, strict=False):
        output[name] = tensor
    return output
