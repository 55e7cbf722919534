"""One loaded base with the adapters used so far; answers come in pieces, those of all variants in one batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from adapters.compression import L4Q_FILE
from adapters.errors import InputError
from pipelines.language.loading import LanguageModel, open_model
from pipelines.language.tokens import Sampling
from pipelines.multimodal import answer as answers
from pipelines.multimodal import loading as vision
from pipelines.multimodal.adapters import AdaptedVision
from pipelines.multimodal.loading import VisionLanguageModel
from pipelines.multimodal.messages import PLACE
from pipelines.pictures import open_picture
from studio import devices, library, silence
from studio.conversation import Question, Variant
from studio.conversation.templates import Spoken, differs, spoken
from studio.datasets.cache import fingerprint
from studio.library import packaged, scan
from studio.serving.engine import ServeConfig
from studio.serving.service import ServeEngine

Chosen = tuple[dict[str, float], str | None]
"""Of one variant: adapter's path -> strength, and the chat template (None = the base's own)."""

Event = dict[str, Any]
"""``event`` and its data: "loading" (text), "remark" (text), "begin" (variant), "piece" (variant, text),
"end" (variant, words, seconds)."""


AT_ONCE = 16
"""Variants that answer at the same time."""


class _Texts:
    """A language model behind the serving engine: every variant is a request of one batch."""

    def __init__(self, question: Question, options: Mapping[str, Any]) -> None:
        self.base: LanguageModel = open_model(library.resolve_language(question.base), **options)
        self.serve = ServeEngine(self.base, question.base, ServeConfig(max_running=AT_ONCE))

    def add(self, path: Path) -> None:
        self.serve.adapters.load(str(path), path)

    def answers(self, question: Question, chosen: Sequence[Chosen]) -> Generator[tuple[int, str, bool], None, None]:
        """(variant, text, whether it is the last) as they come."""
        sampling = Sampling(**question.sampling)
        asks = []
        for messages, (weights, template) in zip(question.conversations, chosen, strict=True):
            ids, mark = self.serve.chat_ids(messages, template)
            asks.append((ids, self.serve.adapters.mix(weights), sampling, mark))
        with closing(self.serve.pieces(asks)) as pieces:
            for number, piece in pieces:
                if piece.reason == "error":
                    raise InputError(f"The answer failed: {piece.error}.")
                yield number, piece.text, piece.reason is not None


class _Pictures:
    """A vision-language model: one variant after the other."""

    def __init__(self, question: Question, options: Mapping[str, Any]) -> None:
        self.base: VisionLanguageModel = vision.open_model(library.resolve_vision_language(question.base), **options)
        self.adapted = AdaptedVision(self.base, question.base)

    def add(self, path: Path) -> None:
        self.adapted.add(str(path), path)

    def answers(self, question: Question, chosen: Sequence[Chosen]) -> Generator[tuple[int, str, bool], None, None]:
        """(variant, text, whether it is the last) as they come."""
        for number, (messages, (weights, _)) in enumerate(zip(question.conversations, chosen, strict=True)):
            first = next((n for n, message in enumerate(messages) if message["role"] == "user"), 0)
            placed = [
                {**message, "content": f"{PLACE if n == first else ''}{message['content']}"}
                for n, message in enumerate(messages)
            ]
            with (
                self.adapted.active(weights) as model,
                closing(answers.stream(
                    self.base, model, placed, [open_picture(question.picture)], Sampling(**question.sampling)
                )) as pieces,
            ):  # fmt: skip
                for piece in pieces:
                    yield number, piece, False
            yield number, "", True


class Session:
    """Keeps the last base and its adapters loaded."""

    def __init__(self) -> None:
        self._key: tuple[str, ...] | None = None
        self._model: _Texts | _Pictures | None = None
        self._paths: dict[str, Path] = {}
        self._spoken: dict[str, Spoken] = {}
        self._digest = ""

    def ask(self, question: Question, stopped: Callable[[], bool] = lambda: False) -> Generator[Event, None, None]:
        """Let every variant answer, all at the same time (about a picture: in turn).

        Raises:
            InputError: the base or an adapter cannot be used, or they do not fit together.
        """
        if len(question.variants) != len(question.conversations):
            raise InputError("Every variant needs its conversation.")
        yield from self._load(question)
        assert self._model is not None
        chosen: list[Chosen] = []
        for variant in question.variants:
            template, remark = self._template(variant)
            if remark:
                yield {"event": "remark", "text": remark}
            chosen.append((self._weights(variant), template))
        if not stopped():
            yield from _told(self._model.answers(question, chosen), len(chosen), stopped)

    def _load(self, question: Question) -> Iterator[Event]:
        key = (question.base, question.device, question.dtype, question.quantization, str(bool(question.picture)))
        if self._key != key:
            known = packaged.known().get(question.base)
            first = known is not None and not known.ready
            once = " for the first time: it is unpacked, which takes a minute" if first else ""
            yield {"event": "loading", "text": f"Loading {question.base}{once} ..."}
            self.release()
            silence.loading_bars()
            options = {"dtype": question.dtype, "device": devices.resolve(question.device),
                       "quantization": question.quantization}  # fmt: skip
            self._model = _Pictures(question, options) if question.picture else _Texts(question, options)
            self._key = key
        assert self._model is not None
        for name in dict.fromkeys(name for variant in question.variants for name, _ in variant.adapters):
            if name in self._paths:
                continue
            yield {"event": "loading", "text": f"Loading {name} ..."}
            path = library.resolve_adapter(name)
            recipe = scan.record(path, "adapter").recipe
            if path not in self._paths.values():
                self._model.add(path)
            self._paths[name], self._spoken[name] = path, spoken(path, recipe)
            remarks = differs(name, self._spoken[name], self._model.base.tokenizer, question.base)
            for remark in filter(None, (self._made_on_another(name, recipe), _rounded(name, path), *remarks)):
                yield {"event": "remark", "text": remark}

    def _template(self, variant: Variant) -> tuple[str | None, str]:
        """The chat template of the variant (None = the base's own), and a remark about it."""
        learnt = {name: self._spoken[name].template for name, weight in variant.adapters if weight}
        known = {name: template for name, template in learnt.items() if template is not None}
        if not known:
            return None, ""
        first = next(iter(known))
        if len(set(known.values())) == 1:
            return known[first], ""
        return known[first], f"The adapters were trained with different chat templates: that of '{first}' is used."

    def _weights(self, variant: Variant) -> dict[str, float]:
        """Path -> strength; one adapter under two names gets the sum."""
        total: dict[str, float] = {}
        for name, weight in variant.adapters:
            path = str(self._paths[name])
            total[path] = total.get(path, 0.0) + weight
        return total

    def _made_on_another(self, name: str, recipe: dict[str, Any] | None) -> str:
        """A remark if the recipe names other base weights than those loaded; the adapter still runs if shapes fit."""
        digest = ((recipe or {}).get("base") or {}).get("digest")
        if not digest or self._model is None:
            return ""
        self._digest = self._digest or fingerprint(self._model.base.model)
        if self._digest == digest:
            return ""
        return f"'{name}' was trained on other base weights ({(recipe or {})['base'].get('name')})."

    def release(self) -> None:
        """Free the memory."""
        self._key = self._model = None
        self._paths, self._spoken = {}, {}
        self._digest = ""


def _told(
    pieces: Generator[tuple[int, str, bool], None, None], count: int, stopped: Callable[[], bool]
) -> Iterator[Event]:
    """The events of pieces of ``count`` answers."""
    begun = time.monotonic()
    words: dict[int, int] = {}
    with closing(pieces):
        for number, text, last in pieces:
            if number not in words:
                words[number] = 0
                yield {"event": "begin", "variant": number}
            if text:
                words[number] += 1
                yield {"event": "piece", "variant": number, "text": text}
            if last:
                yield {"event": "end", "variant": number, "words": words[number],
                       "seconds": round(time.monotonic() - begun, 3)}  # fmt: skip
            if stopped():
                return


def _rounded(name: str, path: Path) -> str:
    """A remark if the adapter was trained through a rounding, which its file alone does not do."""
    if not (path / L4Q_FILE).is_file():
        return ""
    return (
        f"'{name}' was trained through a rounding and acts here without it: studio compress l4q makes the base for "
        "which it was trained."
    )
