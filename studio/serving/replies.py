"""OpenAI's answers: whole ones, and the chunks of streamed ones."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipelines.language.tokens import TokenLogprob


def error(message: str, kind: str, param: str | None = None, code: str | int | None = None) -> dict[str, Any]:
    """The body of a refusal."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def event(body: dict[str, Any] | str) -> str:
    """One server-sent event; JSON keeps characters whole and without line breaks."""
    return f"data: {body if isinstance(body, str) else json.dumps(body, ensure_ascii=False)}\n\n"


def usage(prompt: int, answers: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": answers, "total_tokens": prompt + answers}


@dataclass
class Reply:
    """Builds the bodies of one request.

    Attributes:
        chat: chat or completion.
        model: what has answered.
    """

    chat: bool
    model: str
    tokenizer: Any
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.id = f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._offsets: dict[int, int] = {}

    def whole(self, choices: Sequence[dict[str, Any]], used: dict[str, int]) -> dict[str, Any]:
        name = "chat.completion" if self.chat else "text_completion"
        return {"id": self.id, "object": name, "created": self.created, "model": self.model, "choices": list(choices),
                "usage": used}  # fmt: skip

    def choice(
        self, index: int, text: str, tokens: Sequence[TokenLogprob], reason: str, wanted: bool
    ) -> dict[str, Any]:
        """One whole answer; ``wanted``: whether log-probabilities were asked for."""
        body: dict[str, Any] = {"index": index, "finish_reason": reason,
                                "logprobs": self._logprobs(index, tokens) if wanted else None}  # fmt: skip
        if self.chat:
            return body | {"message": {"role": "assistant", "content": text, "refusal": None}}
        return body | {"text": text}

    def chunk(
        self, index: int, text: str, tokens: Sequence[TokenLogprob] = (), reason: str | None = None, first: bool = False
    ) -> dict[str, Any]:
        """A piece of one answer."""
        body: dict[str, Any] = {"index": index, "finish_reason": reason,
                                "logprobs": self._logprobs(index, tokens) if tokens else None}  # fmt: skip
        if self.chat:
            delta: dict[str, Any] = {"role": "assistant"} if first else {}
            body["delta"] = delta | ({"content": text} if text or first else {})
        else:
            body["text"] = text
        return self._chunk([body])

    def closing(self, used: dict[str, int]) -> dict[str, Any]:
        """The chunk with the usage."""
        return self._chunk([]) | {"usage": used}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        name = "chat.completion.chunk" if self.chat else "text_completion"
        return {"id": self.id, "object": name, "created": self.created, "model": self.model, "choices": choices}

    def _logprobs(self, index: int, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        if self.chat:
            return {"content": [self._entry(one.token, one.logprob)
                                | {"top_logprobs": [self._entry(token, value) for token, value in one.top]}
                                for one in tokens], "refusal": None}  # fmt: skip
        texts = [self._text(one.token) for one in tokens]
        offsets = []
        for text in texts:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(text)
        return {
            "tokens": texts, "token_logprobs": [_finite(one.logprob) for one in tokens], "text_offset": offsets,
            "top_logprobs": [{self._text(token): _finite(value) for token, value in one.top} for one in tokens],
        }  # fmt: skip

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._text(token)
        return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode())}

    def _text(self, token: int) -> str:
        return str(self.tokenizer.decode([token]))


LOWEST = -9999.0
"""What OpenAI writes for a token that cannot come; JSON has no infinity."""


def _finite(logprob: float) -> float:
    return max(LOWEST, logprob) if logprob == logprob else LOWEST
