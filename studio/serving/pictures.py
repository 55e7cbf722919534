"""Pictures over HTTP: requests with different prompts, seeds and adapters are drawn in one forward pass per step.

Requests that share size, steps, guidance, negative prompt and sampler become one batch; every picture has its own row
of gates (:mod:`pipelines.diffusion.varied`), so each is the one that it would be by itself. Regions, DoRA and distilled
adapters have one setting for the whole batch: such requests are drawn alone.
"""

from __future__ import annotations

import asyncio
import base64
import io
import logging
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from adapters.errors import InputError, nearest
from adapters.progress import Silent
from studio import devices, library
from studio.library import Record, scan
from studio.serving.adapters import UnknownModelError
from studio.serving.engine import QueueFullError

_log = logging.getLogger(__name__)
_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")
WAITING = 256
"""Pictures that wait at most."""

PIXELS = 2048 * 2048
"""Most pixels of a picture, so that one request does not take all memory."""


class Use(BaseModel):
    """An adapter of a picture, and its strength."""

    model_config = ConfigDict(extra="forbid")

    name: str
    weight: float = Field(default=1.0, ge=-10, le=10)


class Place(BaseModel):
    """A part of the picture with its own adapters and prompt: x0, y0, x1, y1 as fractions."""

    model_config = ConfigDict(extra="forbid")

    box: tuple[float, float, float, float]
    adapters: list[str] = Field(min_length=1)
    prompt: str | None = None


class PictureAsked(BaseModel):
    """POST /v1/images/generations; the fields from ``negative_prompt`` on are extensions."""

    model_config = ConfigDict(extra="forbid")

    prompt: str
    model: str = ""
    n: int = Field(default=1, ge=1, le=10)
    size: str | None = None
    response_format: Literal["b64_json"] | None = None
    user: str | None = None
    negative_prompt: str = ""
    steps: int | None = Field(default=None, ge=1, le=200)
    guidance_scale: float | None = Field(default=None, ge=0, le=50)
    scheduler: str = "default"
    seed: int = Field(default=0, ge=0, lt=2**32)
    adapters: list[Use] = []
    regions: list[Place] = []


@dataclass(eq=False)
class Picture:
    """One picture that waits."""

    prompt: str
    weights: dict[str, float]
    seed: int
    shared: tuple[Any, ...]  # size, steps, guidance, negative prompt, sampler
    regions: tuple[Place, ...] = ()
    done: Future[Any] = field(default_factory=Future)


class PictureService:
    """Draws on one base.

    Args:
        pipe: the pipeline, without adapters.
        name: of the base.
        records: the adapters that can be asked for.
        most: pictures per batch.
    """

    def __init__(self, pipe: Any, name: str, records: Callable[[], Sequence[Record]], most: int = 8) -> None:
        self.pipe, self.name, self.records, self.most = pipe, name, records, most
        self.batches: list[int] = []
        self._waiting: list[Picture] = []
        self._wake = threading.Condition()
        self._stopping = False
        self._thread: threading.Thread | None = None

    @classmethod
    def open(cls, base: str, device: str, dtype: str, folders: Sequence[Path]) -> PictureService:
        """Load a base of pictures; adapters come from ``folders`` (none = the library).

        Raises:
            InputError: there is no such base.
        """
        from pipelines.diffusion import MultiLoRAPipeline

        place = library.resolve_pipeline(base)
        pipe = MultiLoRAPipeline.from_pretrained(
            place, "auto", dtype, devices.resolve(device), "auto", "none", "none", ""
        )

        def records() -> Sequence[Record]:
            found = [one for folder in folders for one in scan.in_folder(folder)] if folders else library.adapters()
            return [one for one in found if one.family == pipe.family.name and not one.problem]

        return cls(pipe, Path(base).name, records)

    def start(self) -> None:
        """Draw in a thread of its own until :meth:`close`."""
        self._thread = threading.Thread(target=self._run, name="pictures", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread; pictures that wait are given up."""
        self._stopping = True
        with self._wake:
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()
        for one in self._waiting:
            one.done.cancel()

    # ------------------------------------------------------------------------------------------ HTTP
    def add(self, app: Any) -> None:
        """Add the route."""
        app.post("/v1/images/generations")(self.generate)

    def cards(self) -> list[dict[str, Any]]:
        """The base and its adapters, for the list of models."""
        card = {"object": "model", "created": 0, "owned_by": "adapter-studio"}
        found = [card | {"id": self.name, "root": self.name, "parent": None}]
        return found + [card | {"id": f"{self.name}:{one.name}", "root": str(one.path), "parent": self.name}
                        for one in self.records()]  # fmt: skip

    async def generate(self, asked: PictureAsked) -> dict[str, Any]:
        """The pictures as PNG in base64."""
        weights = {one.name: one.weight for one in asked.adapters}
        model = asked.model.removeprefix(f"{self.name}:")
        if model and model != self.name:
            weights.setdefault(model, 1.0)
        for place in asked.regions:
            weights |= {name: weights.get(name, 1.0) for name in place.adapters}
        await asyncio.to_thread(self._check, weights)
        shared = (self._size(asked.size), asked.steps, asked.guidance_scale, asked.negative_prompt, asked.scheduler)
        pictures = [
            Picture(asked.prompt, weights, asked.seed + k, shared, tuple(asked.regions)) for k in range(asked.n)
        ]
        self.submit(pictures)
        made = await asyncio.gather(*(asyncio.wrap_future(one.done) for one in pictures))
        return {"created": int(time.time()), "data": [{"b64_json": _png(one)} for one in made]}

    def _check(self, weights: dict[str, float]) -> None:
        known = [one.name for one in self.records()]
        for name in weights:
            if name not in known:
                raise UnknownModelError(f"There is no adapter '{name}' for {self.name}{nearest(name, known)}.")

    def _size(self, text: str | None) -> tuple[int | None, int | None]:
        if text in (None, "auto"):
            return None, None
        found = _SIZE.fullmatch(text or "")
        if not found:
            raise InputError(f"size is width x height in pixels, such as 512x512, got '{text}'.")
        width, height = int(found[1]), int(found[2])
        if width * height > PIXELS:
            raise InputError(f"size {text} is more than the {PIXELS / 1e6:.1f} million pixels that are drawn here.")
        return width, height

    # ------------------------------------------------------------------------------------------ drawing
    def submit(self, pictures: Sequence[Picture]) -> None:
        """Let pictures wait for their turn.

        Raises:
            QueueFullError: too many wait.
        """
        with self._wake:
            if len(self._waiting) + len(pictures) > WAITING:
                raise QueueFullError(f"{len(self._waiting)} pictures are waiting already: try again later.")
            self._waiting += pictures
            self._wake.notify()

    def _run(self) -> None:
        while not self._stopping:
            with self._wake:
                if not self._waiting:
                    self._wake.wait(5.0)
            if batch := self._next():
                try:
                    made = self.draw(batch)
                except Exception as error:
                    if not isinstance(error, InputError):
                        _log.exception("drawing failed")
                    for one in batch:
                        one.done.set_exception(error)
                else:
                    for one, image in zip(batch, made, strict=True):
                        one.done.set_result(image)

    def _next(self) -> list[Picture]:
        """The picture that waited longest, and those that can share its batch."""
        with self._wake:
            waiting = [one for one in self._waiting if not one.done.cancelled()]
            if not waiting:
                self._waiting = []
                return []
            first = waiting[0]
            alike = [one for one in waiting if one.shared == first.shared and not one.regions]
            batch = [first] if first.regions else alike[: self.most]
            self._waiting = [one for one in waiting if one not in batch]
            return [one for one in batch if one.done.set_running_or_notify_cancel()]

    def draw(self, batch: Sequence[Picture]) -> list[Any]:
        """The pictures of a batch, as PIL images.

        Raises:
            InputError: an adapter that does not fit, or a value that the base does not take.
        """
        self._load(dict.fromkeys(name for one in batch for name in one.weights))
        self.batches.append(len(batch))
        loaded = self.pipe.rack.loaded
        one_by_one = any(loaded[name].report.dora or loaded[name].distilled is not None
                         for one in batch for name in one.weights)  # fmt: skip
        if len(batch) == 1 or one_by_one:
            return [image for one in batch for image in self._alone(one)]
        from pipelines.diffusion.drawing import generators

        names = list(dict.fromkeys(name for one in batch for name in one.weights))
        self.pipe.compose("merge", names)
        random = generators([one.seed for one in batch])
        return list(self.pipe(
            batch[0].prompt, **_arguments(batch[0]), images=len(batch), generator=random,
            prompts=[one.prompt for one in batch], monitor=Silent(),
            strengths=[{name: (one.weights.get(name, 0.0),) * 2 for name in names} for one in batch],
        ).images)  # fmt: skip

    def _alone(self, one: Picture) -> list[Any]:
        regions = [
            {"adapters": tuple(place.adapters), "box": place.box, "prompt": place.prompt} for place in one.regions
        ]
        method: dict[str, Any] = {"method": "activation", "regions": regions} if regions else {"method": "merge"}
        self.pipe.compose(**method, adapters=list(one.weights))
        with self.pipe.rack.at({name: (weight, weight) for name, weight in one.weights.items()}):
            return list(self.pipe(one.prompt, **_arguments(one), seed=one.seed, monitor=Silent()).images)

    def _load(self, names: Sequence[str] | dict[str, None]) -> None:
        """Load these adapters, and unload the others once there are many."""
        paths = {one.name: one.path for one in self.records()}
        if len(self.pipe.adapters) > 4 * self.most:
            for name in [name for name in self.pipe.adapters if name not in names]:
                self.pipe.unload_lora(name)
        for name in names:
            if name not in self.pipe.adapters:
                if name not in paths:
                    raise UnknownModelError(f"There is no adapter '{name}' for {self.name}.")
                self.pipe.load_lora(paths[name], name)


def _arguments(one: Picture) -> dict[str, Any]:
    (width, height), steps, guidance, negative, sampler = one.shared
    return {"negative_prompt": negative, "steps": steps, "guidance_scale": guidance, "width": width, "height": height,
            "scheduler": sampler}  # fmt: skip


def _png(image: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
