"""Several language trainings on one base: each runs the second driver, unchanged; they share passes through the base.

Every member is an ordinary run in a thread of its own, but only one thread runs at a time: a member has its turn until
it asks for a pass of its next batch. When all have asked, those with batches of similar length go through the base
together (:mod:`adapters.layers.packed`); then each computes its loss and the gradient of its part of the base's output,
and one backward pass goes through the base for all. What a member needs for itself (its own model object around the
shared weights, optimiser, schedule, clipping, accumulation, checkpoints, measures, samples, export) is the code of a
run that is alone. A member that has ended, was stopped or has failed leaves; the others go on.

Measures and samples use the member's own model. Dropout of an adapter draws the numbers it would draw alone; a base
with dropout of its own draws others.
"""

from __future__ import annotations

import inspect
import os
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor, nn

from adapters.errors import InputError
from adapters.layers.packed import Layout, Segment, draws, own_layers, pack, tie, twin
from pipelines.language.loading import LanguageModel, open_model, open_tokenizer
from pipelines.language.loading import Task as ModelTask

PADDING = 0.25
"""Batches share a pass while at most this share of it is padding."""

Work = Callable[["Member"], Any]


def run(works: Sequence[Work]) -> list[Any]:
    """Run trainings on one base together.

    Args:
        works: each runs one training, with the :class:`Member` it is given, to its end.

    Returns:
        What each returned, or the exception that ended it.
    """
    together = _Pack()
    members = [Member(together, work) for work in works]
    together.steps(members)
    return [member.outcome for member in members]


class Member:
    """One training of several; what it shares with the others goes through here.

    Attributes:
        outcome: what its work returned, or the exception that ended it.
        asked: the pass it waits for.
    """

    def __init__(self, together: _Pack, work: Work) -> None:
        self._pack, self._work = together, work
        self._mine, self._theirs = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._live, name="training member", daemon=True)
        self._world = _World.now()
        self._error: BaseException | None = None
        self._body: Any = None
        self._layers: dict[str, nn.Module] = {}
        self._draws = self._joint = self._steps = False
        self.outcome: Any = None
        self.asked: _Pass | None = None

    # ---------------------------------------------------------------- turns
    def advance(self, error: BaseException | None = None) -> bool:
        """Let it run until it asks for the next pass (forward or backward); returns whether it does.

        Args:
            error: what is raised where it waits.
        """
        self._error = error
        with self._world.instead():
            if self._thread.ident is None:
                self._thread.start()
            else:
                self._mine.release()
            interrupted = self._turn()
        if interrupted is not None:
            raise interrupted
        return self.asked is not None

    def _turn(self) -> KeyboardInterrupt | None:
        """Wait until its turn is over; an interrupt meanwhile is returned."""
        found = None
        while True:
            try:
                self._theirs.acquire()
            except KeyboardInterrupt as error:
                found = error
            else:
                return found

    def _live(self) -> None:
        try:
            self.outcome = self._work(self)
        except BaseException as error:
            self.outcome = error
        finally:
            self.asked = None
            self._theirs.release()

    def _wait(self) -> None:
        self._theirs.release()
        self._mine.acquire()
        if self._error is not None:
            raise self._error

    # ---------------------------------------------------------------- what a training calls
    def open(self, source: str, task: ModelTask, **options: Any) -> LanguageModel:
        """As :func:`pipelines.language.loading.open_model`, with the weights that the others use."""
        return self._pack.open(source, task, **options)

    def join(self, model: Any, accelerator: Any, checkpointing: bool, dtype: torch.dtype) -> None:
        """Let the training passes of ``model`` (with its adapter) share the base.

        Args:
            accelerator: the run's own, which calls backward.
            checkpointing: activations are recomputed.
            dtype: of the passes; below fp32 they run in autocast.

        Raises:
            InputError: an architecture without a body that its heads share.
        """
        whole = model.get_base_model()
        body: Any = whole.base_model
        if body is whole:
            kind = whole.config.model_type
            raise InputError(f"A {kind} model has no body apart from its head: train its adapters one by one.")
        self._body, alone = body, body.forward
        takes = inspect.signature(alone)

        def forward(*args: Any, **more: Any) -> Any:
            if not (self._steps and torch.is_grad_enabled()):  # X-LoRA looks at the base first, without gradients
                return alone(*args, **more)
            self._steps = False
            given = takes.bind(*args, **more).arguments
            names = [name for name in _INPUTS if given.get(name) is not None]
            self.asked = _Pass({name: given[name] for name in names}, checkpointing, dtype)
            self._wait()
            return self.asked.result if self.asked.shared else alone(*args, **more)

        body.forward, backward = forward, accelerator.backward

        def deferred(loss: Tensor, **more: Any) -> None:
            if self.asked is not None and self.asked.shared and self._joint:
                self.asked.loss = loss if accelerator.scaler is None else accelerator.scaler.scale(loss)
            else:
                backward(loss, **more)

        accelerator.backward = deferred

    @property
    def joint(self) -> bool:
        """Its loss may depend on what its layers did on the way (routers): it goes into the one backward pass whole."""
        return self._joint

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around a training step's pass: the next call of the body is shared."""
        self._steps = True
        try:
            yield
        finally:
            self._steps = False

    def backward(self) -> None:
        """Called after a pass's backward: returns when the gradient has gone through the base, too."""
        if self.asked is not None and self.asked.shared:
            self._wait()
        self.asked = None

    # ---------------------------------------------------------------- what the others need of it
    @property
    def layers(self) -> dict[str, nn.Module]:
        """Its own layers in the body."""
        if not self._layers:
            self._layers = own_layers(self._body)
            self._draws = any(draws(layer) for layer in self._layers.values())
            self._joint = not all(type(layer).__module__.startswith("peft.") for layer in self._layers.values())
            if self.asked is not None and self.asked.checkpointing and self._draws:
                raise InputError(
                    "With gradient_checkpointing, an adapter with dropout or random parts needs the base alone: set "
                    "dropout to 0, or train it as a job of its own."
                )
        return self._layers

    def segment(self, first: int) -> Segment:
        """Its place in a batch, from row ``first`` on."""
        assert self.asked is not None
        rows = slice(first, first + self.asked.rows)
        return Segment(rows, self.asked.width, self.layers, *([self._world.drawing] if self._draws else []))


_INPUTS = ("input_ids", "attention_mask", "position_ids")


@dataclass
class _Pass:
    """A batch that a member wants to send through the base.

    Attributes:
        given: its inputs (rows, width).
        result: the body's output for it, whose tensors are leaves; None when it goes alone.
        leaves: (part of the shared output, leaf of the member).
        loss: of a member whose loss has other ways into the base, for the shared backward.
    """

    given: dict[str, Tensor]
    checkpointing: bool
    dtype: torch.dtype
    result: Any = None
    leaves: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    loss: Tensor | None = None

    @property
    def rows(self) -> int:
        return self.given["input_ids"].shape[0]

    @property
    def width(self) -> int:
        return self.given["input_ids"].shape[1]

    @property
    def shared(self) -> bool:
        return self.result is not None

    def take(self, output: Any, segment: Segment, width: int, joint: bool) -> None:
        """Cut this pass's part out of the body's output for a batch of rows of ``width``; a leaf unless ``joint``."""
        self.result = type(output)(**{
            name: self._part(value, segment, width, joint) for name, value in output.items() if torch.is_tensor(value)
        })  # fmt: skip

    def _part(self, value: Tensor, segment: Segment, width: int, joint: bool) -> Tensor:
        part = value[segment.rows]
        if part.dim() > 2 and part.shape[1] == width:
            part = part[:, : segment.width]
        if joint or not part.requires_grad:
            return part
        leaf = part.detach().requires_grad_()
        self.leaves.append((part, leaf))
        return leaf


class _Pack:
    """What the members share: the base, and the passes through it."""

    def __init__(self) -> None:
        self._opened: dict[ModelTask, Any] = {}
        self._bodies: list[Any] = []
        self._body: Any = None
        self._layout = Layout()
        self._members: Sequence[Member] = ()

    def open(self, source: str, task: ModelTask, **options: Any) -> LanguageModel:
        """A base for one more member; the weights are in memory once."""
        if task in self._opened:
            return LanguageModel(twin(self._opened[task]), open_tokenizer(source, options["chat_template"]), source)
        base = open_model(source, task, **options)
        if self._bodies:
            tie(base.model.base_model, self._bodies[0])
        if base.fresh:  # a head that starts at random, from the member's own seed
            self._bodies.append(twin(base.model.base_model))
        else:
            self._opened[task] = twin(base.model)
            self._bodies.append(self._opened[task].base_model)
        return base

    def steps(self, members: Sequence[Member]) -> None:
        """Let all members run to their ends."""
        self._members = members
        stop: BaseException | None = None
        groups = [[member] for member in members]
        while groups:
            for group in groups:
                try:
                    if stop is None and len(group) > 1:
                        self._together(group)
                    else:
                        for member in group:
                            member.advance(stop)
                except KeyboardInterrupt as error:  # it stops every member at its next pass
                    stop = error
            groups = alike([member for member in members if member.asked is not None])

    def _together(self, group: Sequence[Member]) -> None:
        """One pass of all of ``group`` through the base, forward and backward."""
        passes = [member.asked for member in group if member.asked is not None]
        width, first, segments = max(one.width for one in passes), 0, []
        try:
            body = self._prepared(passes[0])
            for member, one in zip(group, passes, strict=True):
                segments.append(member.segment(first))
                first += one.rows
        except InputError as error:
            for member in group:
                member.advance(error)
            return
        with self._layout.of(segments, width):
            try:
                device = next(body.parameters()).device.type
                with torch.autocast(device, passes[0].dtype, enabled=passes[0].dtype != torch.float32):
                    output = body(**stacked([one.given for one in passes], width, _padding(body)))
                for member, one, segment in zip(group, passes, segments, strict=True):
                    one.take(output, segment, width, member.joint)
                del output
                going = [one for member, one in zip(group, passes, strict=True) if member.advance()]
                ends: list[tuple[Tensor, Tensor | None]]
                ends = [(part, leaf.grad) for one in going for part, leaf in one.leaves if leaf.grad is not None]
                ends += [(one.loss, None) for one in going if one.loss is not None]
                if ends:
                    torch.autograd.backward([end for end, _ in ends], [grad for _, grad in ends])
            except Exception as error:  # out of memory, for example: it ends them all
                for member in group:
                    if member.asked is not None:
                        member.advance(error)
                return
        for member in group:
            if member.asked is not None:
                member.advance()

    def _prepared(self, one: _Pass) -> Any:
        """The shared body with a packed layer wherever a member has one of its own."""
        if self._body is None:
            self._body = max(self._bodies, key=lambda body: sum(1 for _ in body.parameters()))
            self._body.train().config.use_cache = False
            if one.checkpointing:
                self._body.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            waiting = [member for member in self._members if member.asked is not None]
            pack(self._body, {name for member in waiting for name in member.layers}, self._layout)
        return self._body


def alike(members: Sequence[Member]) -> list[list[Member]]:
    """Members whose batches are similar enough in length to share a pass, shortest first."""
    groups: list[list[Member]] = []
    for member in sorted(members, key=lambda member: member.asked.width if member.asked else 0):
        if groups and _padded([*groups[-1], member]) <= PADDING:
            groups[-1].append(member)
        else:
            groups.append([member])
    return groups


def _padded(members: Sequence[Member]) -> float:
    """The share of padding if they go together (beyond what their own batches hold)."""
    passes = [member.asked for member in members if member.asked is not None]
    whole = max(one.width for one in passes) * sum(one.rows for one in passes)
    return 1 - sum(one.rows * one.width for one in passes) / whole


def stacked(batches: Sequence[dict[str, Tensor]], width: int, pad: int) -> dict[str, Tensor]:
    """Inputs of a body for the rows of all ``batches`` (rows, width each), padded on the right to ``width``.

    Where a batch keeps several samples of a row apart by their positions, all do: a row is then one sample, and its
    padding another.
    """
    ids = torch.cat([_longer(batch["input_ids"], width, pad) for batch in batches])
    if not any("position_ids" in batch for batch in batches):
        return {
            "input_ids": ids,
            "attention_mask": torch.cat([_longer(batch["attention_mask"], width, 0) for batch in batches]),
        }
    return {"input_ids": ids, "position_ids": torch.cat([_positions(batch, width) for batch in batches])}


def _positions(batch: dict[str, Tensor], width: int) -> Tensor:
    """Positions (rows, width): those of the samples, then padding, which counts anew."""
    if "position_ids" in batch:
        given = batch["position_ids"]
        tail = torch.arange(width - given.shape[1], device=given.device).expand(len(given), -1)
        return torch.cat([given, tail], dim=1)
    lengths = batch["attention_mask"].sum(dim=1, keepdim=True)
    places = torch.arange(width, device=lengths.device).expand(len(lengths), -1)
    return torch.where(places < lengths, places, places - lengths)


def _longer(rows: Tensor, width: int, fill: int) -> Tensor:
    return nn.functional.pad(rows, (0, width - rows.shape[1]), value=fill)


def _padding(body: Any) -> int:
    return int(getattr(body.config, "pad_token_id", None) or 0)


# ------------------------------------------------------------------------------------------------ one per process


@dataclass
class _World:
    """What a process has once and every member needs for itself: random numbers, accelerate's state, the folder."""

    seeds: _Seeds
    states: list[dict[str, Any]]
    folder: Path | None

    @classmethod
    def now(cls) -> _World:
        folder = None
        with suppress(OSError):  # it may have been deleted
            folder = Path.cwd()
        return cls(_Seeds.now(), [dict(kind._shared_state) for kind in _SHARED], folder)

    def _restore(self) -> None:
        self.seeds.restore()
        for kind, state in zip(_SHARED, self.states, strict=True):
            kind._shared_state.clear()
            kind._shared_state.update(state)
        if self.folder is not None and self.folder.is_dir():
            os.chdir(self.folder)

    @contextmanager
    def instead(self) -> Iterator[None]:
        """Inside, this is the process's; afterwards it is as it was left, and the process's as before."""
        before = _World.now()
        self._restore()
        try:
            yield
        finally:
            self.__dict__.update(_World.now().__dict__)
            before._restore()

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Inside, torch draws the member's random numbers."""
        before = _Torch.now()
        self.seeds.torch.restore()
        try:
            yield
        finally:
            self.seeds.torch = _Torch.now()
            before.restore()


_SHARED: tuple[Any, ...] = (PartialState, AcceleratorState, GradientState)


@dataclass
class _Torch:
    """The state of torch's generators."""

    cpu: Tensor
    cuda: list[Tensor]

    @classmethod
    def now(cls) -> _Torch:
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)


@dataclass
class _Seeds:
    """The state of all generators of the process."""

    torch: _Torch
    python: Any
    numpy: Any

    @classmethod
    def now(cls) -> _Seeds:
        return cls(_Torch.now(), random.getstate(), np.random.get_state())

    def restore(self) -> None:
        self.torch.restore()
        random.setstate(self.python)
        np.random.set_state(self.numpy)
