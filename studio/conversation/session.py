"""One loaded base with the adapters used so far; answers come in pieces."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from adapters.compression import L4Q_FILE
from adapters.errors import InputError
from pipelines.language.adapters import AdaptedModel
from pipelines.language.answer import stream
from pipelines.language.loading import LanguageModel, open_model
from pipelines.language.tokens import Sampling
from pipelines.multimodal import answer as answers
from pipelines.multimodal import loading as vision
from pipelines.multimodal.adapters import AdaptedVision
from pipelines.multimodal.loading import VisionLanguageModel
from pipelines.multimodal.messages import PLACE
from pipelines.pictures import open_picture
from studio import devices, library, silence
from studio.conversation import Message, Question, Variant
from studio.conversation.templates import Spoken, differs, spoken
from studio.datasets.cache import fingerprint
from studio.library import scan, smollm2

Event = dict[str, Any]
"""``event`` and its data: "loading" (text), "remark" (text), "begin" (variant), "piece" (variant, text),
"end" (variant, words, seconds)."""


def _opened(question: Question) -> tuple[LanguageModel, AdaptedModel]:
    """The base that is asked, a vision-language model if there is a picture."""
    options: dict[str, Any] = {
        "dtype": question.dtype, "device": devices.resolve(question.device), "quantization": question.quantization,
    }  # fmt: skip
    if question.picture:
        sees = vision.open_model(library.resolve_vision_language(question.base), **options)
        return sees, AdaptedVision(sees, question.base)
    base = open_model(library.resolve_base(question.base), **options)
    return base, AdaptedModel(base.model, question.base)


class Session:
    """Keeps the last base and its adapters loaded."""

    def __init__(self) -> None:
        self._key: tuple[str, ...] | None = None
        self._base: LanguageModel | None = None
        self._adapted: AdaptedModel | None = None
        self._paths: dict[str, Path] = {}
        self._spoken: dict[str, Spoken] = {}
        self._digest = ""

    def ask(self, question: Question, stopped: Callable[[], bool] = lambda: False) -> Generator[Event, None, None]:
        """Let every variant answer in turn.

        Raises:
            InputError: the base or an adapter cannot be used, or they do not fit together.
        """
        if len(question.variants) != len(question.conversations):
            raise InputError("Every variant needs its conversation.")
        yield from self._load(question)
        for number, (variant, messages) in enumerate(zip(question.variants, question.conversations, strict=True)):
            if stopped():
                return
            yield from self._answer(number, variant, messages, question, stopped)

    def _load(self, question: Question) -> Iterator[Event]:
        key = (question.base, question.device, question.dtype, question.quantization, str(bool(question.picture)))
        if self._key != key:
            first = question.base == smollm2.NAME and not smollm2.ready()
            once = " for the first time: it is unpacked, which takes a minute" if first else ""
            yield {"event": "loading", "text": f"Loading {question.base}{once} ..."}
            self.release()
            silence.loading_bars()
            self._base, self._adapted = _opened(question)
            self._key = key
        assert self._adapted is not None
        assert self._base is not None
        for name in dict.fromkeys(name for variant in question.variants for name, _ in variant.adapters):
            if name in self._paths:
                continue
            yield {"event": "loading", "text": f"Loading {name} ..."}
            path = library.resolve_adapter(name)
            recipe = scan.record(path, "adapter").recipe
            self._adapted.add(str(path), path)
            self._paths[name], self._spoken[name] = path, spoken(path, recipe)
            remarks = differs(name, self._spoken[name], self._base.tokenizer, question.base)
            for remark in filter(None, (self._made_on_another(name, recipe), _rounded(name, path), *remarks)):
                yield {"event": "remark", "text": remark}

    def _answer(
        self,
        number: int,
        variant: Variant,
        messages: Sequence[Message],
        question: Question,
        stopped: Callable[[], bool],
    ) -> Iterator[Event]:
        assert self._adapted is not None
        assert self._base is not None
        begun, pieces = time.monotonic(), 0
        yield {"event": "begin", "variant": number}
        template, remark = self._template(variant)
        if remark:
            yield {"event": "remark", "text": remark}
        with (
            self._adapted.active(self._weights(variant)) as model,
            closing(self._streamed(model, messages, question, template)) as answer,
        ):
            for piece in answer:
                pieces += 1
                yield {"event": "piece", "variant": number, "text": piece}
                if stopped():
                    break
        yield {"event": "end", "variant": number, "words": pieces, "seconds": round(time.monotonic() - begun, 3)}

    def _streamed(
        self, model: Any, messages: Sequence[Message], question: Question, template: str | None
    ) -> Generator[str, None, None]:
        sampling = Sampling(**question.sampling)
        if not isinstance(self._base, VisionLanguageModel):
            assert self._base is not None
            return stream(model, self._base.tokenizer, messages, sampling, template)
        first = next((n for n, message in enumerate(messages) if message["role"] == "user"), 0)
        placed = [
            {**message, "content": f"{PLACE if number == first else ''}{message['content']}"}
            for number, message in enumerate(messages)
        ]
        return answers.stream(self._base, model, placed, [open_picture(question.picture)], sampling)

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
        if not digest or self._base is None:
            return ""
        self._digest = self._digest or fingerprint(self._base.model)
        if self._digest == digest:
            return ""
        return f"'{name}' was trained on other base weights ({(recipe or {})['base'].get('name')})."

    def release(self) -> None:
        """Free the memory."""
        self._key = self._base = self._adapted = None
        self._paths, self._spoken = {}, {}
        self._digest = ""


def _rounded(name: str, path: Path) -> str:
    """A remark if the adapter was trained through a rounding, which its file alone does not do."""
    if not (path / L4Q_FILE).is_file():
        return ""
    return (
        f"'{name}' was trained through a rounding and acts here without it: studio compress l4q makes the base for "
        "which it was trained."
    )
