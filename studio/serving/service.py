"""One base with its adapters, to be asked from Python; what the server, the chats and the benchmarks use.

engine = ServeEngine.from_pretrained("smollm2", ServeConfig(pool_gb=2))
engine.add_adapter("facts", "runs/facts")
engine.generate(["The capital of Niger is"] * 2, [None, "facts"], Sampling(max_tokens=8))
"""

from __future__ import annotations

import asyncio
import queue
import shutil
import tempfile
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from adapters.errors import InputError
from pipelines.language.answer import end_of_turn, end_tokens
from pipelines.language.answer import prompt as prompt_of
from pipelines.language.loading import LanguageModel, open_model
from pipelines.language.tokens import Sampling, TokenLogprob
from studio import devices, library
from studio.serving.adapters import AUTO, Adapters, Loaded, Mix, UnknownModelError
from studio.serving.engine import Engine, ServeConfig
from studio.serving.requests import Piece, Reason, Request

Weights = Mapping[str, float]
"""Adapter -> strength; empty = the base alone."""


@dataclass(frozen=True)
class Answer:
    """A whole answer.

    Attributes:
        reason: why it ended.
        tokens: of the answer, with the end token if there was one.
        logprobs: of the tokens, if they were asked for.
    """

    text: str
    reason: Reason
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()


class ServeEngine:
    """Args:
    base: a loaded causal language model.
    name: under which it is asked.
    folders: whose adapters are served by name, without a restart for new ones; ``library``: the library's, too.

    Raises:
        InputError: as :class:`studio.serving.engine.Engine`.
    """

    def __init__(
        self, base: LanguageModel, name: str = "base", config: ServeConfig | None = None, folders: Sequence[Path] = (),
        library: bool = False,
    ) -> None:  # fmt: skip
        self.base, self.name = base, name
        self.engine = Engine(base, config)
        self.adapters = Adapters(self.engine, name, folders, library)
        self.pick: Callable[[str], str] | None = None
        """Chooses an adapter (or the base) for a text, for the model "auto"."""
        self._scratch: Path | None = None

    @classmethod
    def from_pretrained(
        cls, source: str | Path, config: ServeConfig | None = None, *, device: str = "auto", dtype: str = "auto",
        quantization: str = "none", **options: Any,
    ) -> ServeEngine:  # fmt: skip
        """Open a base (library name, directory or hub id) and serve it.

        Raises:
            InputError: it cannot be opened or served.
        """
        place = library.resolve_language(str(source))
        base = open_model(place, dtype=dtype, device=devices.resolve(device), quantization=quantization)
        return cls(base, str(options.pop("name", "") or Path(source).name), config, **options)

    @classmethod
    def from_peft(
        cls, model: Any, tokenizer: Any, config: ServeConfig | None = None, name: str = "base"
    ) -> ServeEngine:
        """Serve a PEFT model with all adapters it holds; they are taken off the model, which is used from now on.

        Raises:
            InputError: an adapter that cannot be served.
        """
        scratch = Path(tempfile.mkdtemp(prefix="adapter-studio-"))
        try:
            names = list(model.peft_config)
            for one in names:
                model.save_pretrained(scratch / "saved", selected_adapters=[one])
                place = scratch / "saved" / one if (scratch / "saved" / one).is_dir() else scratch / "saved"
                place.rename(scratch / one) if place.name == "saved" else shutil.move(place, scratch / one)
            plain = model.unload().requires_grad_(False).eval()
            made = cls(LanguageModel(plain, tokenizer, name), name, config)
            made._scratch = scratch
            for one in names:
                made.add_adapter(one, scratch / one)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        return made

    def add_adapter(self, name: str, path: str | Path, pinned: bool = False) -> Loaded:
        """Serve the adapter at ``path`` as ``name``; ``pinned`` ones never leave the pool.

        Raises:
            InputError: it cannot be served, or the name is taken.
        """
        return self.adapters.add(name, Path(path), pinned)

    def remove_adapter(self, name: str) -> None:
        """Serve ``name`` no longer; accepted requests are answered. Raises :class:`UnknownModelError`."""
        self.adapters.remove(name)

    def start(self) -> None:
        """Compute in a thread of its own, as a server does."""
        self.engine.start()

    def close(self) -> None:
        """End everything; the model is its own self again."""
        self.engine.close()
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)

    # ------------------------------------------------------------------------------------------ names and prompts
    def mix(self, model: str, text: str = "") -> Mix:
        """What ``model`` computes with: the base, an adapter, ``base:adapter``, or "auto" for ``text``.

        Raises:
            UnknownModelError: there is none of this name.
            InputError: an adapter that cannot be served.
        """
        if model == AUTO and self.pick is not None:
            model = self.pick(text)
        if model.startswith(f"{self.name}:"):
            model = model.removeprefix(f"{self.name}:")
        return Mix(label=self.name) if model == self.name else self.adapters.mix({model: 1.0})

    def chat_ids(self, messages: Sequence[Mapping[str, str]], template: str | None = None) -> tuple[list[int], str]:
        """The conversation's tokens up to the answer, and the text that ends it.

        Args:
            template: Jinja text instead of the base's own; empty = none, see :func:`pipelines.language.answer.prompt`.

        Raises:
            InputError: there is nothing to answer, or the template cannot take these messages.
        """
        from jinja2 import TemplateError

        talk = [dict(message) for message in messages]
        try:
            ids = prompt_of(self.base.tokenizer, talk, "cpu", template)["input_ids"][0].tolist()
        except TemplateError as error:
            raise InputError(f"The model's chat template does not take these messages: {error}.") from None
        return ids, end_of_turn(self.base.tokenizer, talk, template)

    def request(
        self, ids: Sequence[int], mix: Mix, sampling: Sampling, sink: Callable[[Piece], None], mark: str = ""
    ) -> Request:
        """A request for these tokens, submitted; ``mark`` ends the answer like an end token.

        Raises:
            InputError: as :meth:`studio.serving.engine.Engine.submit`.
        """
        ends = end_tokens(self.base.model, self.base.tokenizer, mark)
        if mark and mark not in sampling.stop:
            sampling = replace(sampling, stop=(*sampling.stop, mark))
        made = Request(list(ids), sampling, sink, frozenset(ends), mix.adapter, mix.mixture, mix.label)
        return self.engine.submit(made)

    # ------------------------------------------------------------------------------------------ asking
    def generate(
        self, prompts: Sequence[str | Sequence[int]], adapters: Sequence[str | Weights | None] | None = None,
        sampling: Sampling | Sequence[Sampling] | None = None,
    ) -> list[Answer]:  # fmt: skip
        """Continue texts (or token numbers), all in one batch, each with its own adapter (or several at strengths).

        Raises:
            InputError: lists of different lengths, or a request that cannot be served; then none is.
        """
        adapters = [None] * len(prompts) if adapters is None else adapters
        each = [sampling or Sampling()] * len(prompts) if not isinstance(sampling, Sequence) else sampling
        for what, given in (("adapters", adapters), ("samplings", each)):
            if len(given) != len(prompts):
                raise InputError(f"There are {len(prompts)} prompts but {len(given)} {what}: give one for each.")
        mixes = [self._mix_of(one) for one in adapters]
        found: list[list[Piece]] = [[] for _ in prompts]
        requests: list[Request] = []
        try:
            for text, mix, how, pieces in zip(prompts, mixes, each, found, strict=True):
                requests.append(self.request(self.ids(text), mix, how, pieces.append))
            if self.engine.threaded:
                for request in requests:
                    request.over.wait()
            else:
                self.engine.finish(requests)
        finally:
            self._withdraw(requests)
        return [_whole(request, pieces) for request, pieces in zip(requests, found, strict=True)]

    def pieces(
        self, asks: Sequence[tuple[Sequence[int], Mix, Sampling, str]]
    ) -> Generator[tuple[int, Piece], None, None]:
        """(number of the request, piece) as they come, of several requests in one batch; closing it cancels the rest.

        Args:
            asks: (tokens, what computes, sampling, mark that ends the answer) each.

        Raises:
            InputError: a request that cannot be served; then none is.
        """
        coming: queue.SimpleQueue[tuple[int, Piece]] = queue.SimpleQueue()
        requests: list[Request] = []
        try:
            for number, (ids, mix, sampling, mark) in enumerate(asks):
                requests.append(self.request(ids, mix, sampling, partial(_numbered, coming, number), mark))
            open_ones = len(requests)
            while open_ones:
                while coming.empty() and not self.engine.threaded:
                    self.engine.step()
                number, piece = coming.get()
                open_ones -= piece.reason is not None
                yield number, piece
        finally:
            self._withdraw(requests)

    def _withdraw(self, requests: Sequence[Request]) -> None:
        """Cancel what is not answered yet."""
        left = [request for request in requests if not request.done]
        for request in left:
            self.engine.cancel(request)
        if left and not self.engine.threaded:
            self.engine.step()

    async def stream(
        self, prompt: str | Sequence[int], adapter: str | Weights | None = None, sampling: Sampling | None = None
    ) -> AsyncGenerator[Piece, None]:
        """The pieces of one answer as they come; needs :meth:`start`. Closing it cancels the request.

        Raises:
            InputError: a request that cannot be served.
        """
        mix = await asyncio.to_thread(self._mix_of, adapter)
        ask = self.ask(self.ids(prompt), mix, sampling or Sampling())
        try:
            async for piece in ask.pieces():
                yield piece
        finally:
            ask.cancel()

    def ask(self, ids: Sequence[int], mix: Mix, sampling: Sampling, mark: str = "") -> Ask:
        """A request whose pieces come to the running event loop. Raises as :meth:`request`."""
        made = Ask(self.engine, asyncio.get_running_loop())
        made.request = self.request(ids, mix, sampling, made.put, mark)
        return made

    def stats(self) -> dict[str, float]:
        """What is running, and how the pool is used."""
        return {
            name if not labels.get("kind") else f"{name}_{labels['kind']}": value
            for name, labels, value in self.engine.gauges()
            if name != "lora_requests_info"
        }

    def _mix_of(self, adapter: str | Weights | None) -> Mix:
        if adapter is None:
            return Mix(label=self.name)
        return self.mix(adapter) if isinstance(adapter, str) else self.adapters.mix(adapter)

    def ids(self, prompt: str | Sequence[int]) -> list[int]:
        """The tokens of a text; token numbers are checked. Raises :class:`InputError`."""
        if isinstance(prompt, str):
            return list(self.base.tokenizer(prompt)["input_ids"])
        if any(not 0 <= token < self.engine.vocabulary for token in prompt):
            raise InputError(f"A token is not in the vocabulary, whose numbers are 0 to {self.engine.vocabulary - 1}.")
        return list(prompt)


class Ask:
    """A request seen from an event loop."""

    request: Request

    def __init__(self, engine: Engine, loop: asyncio.AbstractEventLoop) -> None:
        self._engine, self._loop = engine, loop
        self._coming: asyncio.Queue[Piece] = asyncio.Queue()

    def put(self, piece: Piece) -> None:
        """Called by the engine's thread."""
        try:
            self._loop.call_soon_threadsafe(self._coming.put_nowait, piece)
        except RuntimeError:  # the loop is closed: nobody listens any more
            self.request.cancelled = True

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        while True:
            piece = await self._coming.get()
            yield piece
            if piece.reason is not None:
                return

    def cancel(self) -> None:
        if not self.request.done:
            self._engine.cancel(self.request)


def _numbered(coming: queue.SimpleQueue[tuple[int, Piece]], number: int, piece: Piece) -> None:
    coming.put((number, piece))


def _whole(request: Request, pieces: Sequence[Piece]) -> Answer:
    last = pieces[-1]
    if last.reason == "error":
        raise InputError(f"The answer failed: {last.error}.")
    text = "".join(piece.text for piece in pieces)
    return Answer(text, last.reason or "stop", tuple(request.answer), tuple(one for p in pieces for one in p.tokens))


__all__ = ["Answer", "Ask", "Sampling", "ServeConfig", "ServeEngine", "UnknownModelError"]
