"""The bodies of OpenAI's requests, as far as they are served. A field that would change the answer and is not served is
refused by name; what only describes the request (``user``, ``metadata``) is accepted."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from adapters.errors import InputError
from pipelines.language.tokens import Sampling

WITHOUT_EFFECT = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
"""Fields that say something about the request without changing its answer."""

DEFAULT_TOKENS = 16
"""OpenAI's default of completions; chats go on to the end of the context."""


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False


class ResponseFormat(BaseModel):
    type: str = "text"


class Asked(BaseModel):
    """What completions and chats have in common."""

    model_config = ConfigDict(extra="forbid")

    model: str
    adapter_id: str | None = None
    n: int = Field(default=1, ge=1, le=32)
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, gt=0)
    logit_bias: dict[int, float] | None = None
    ignore_eos: bool = False
    response_format: ResponseFormat | None = None

    @model_validator(mode="before")
    @classmethod
    def _only_known(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        kept = {name: value for name, value in values.items() if name not in WITHOUT_EFFECT}
        for name, value in list(kept.items()):
            if name not in cls.model_fields and (value is None or value == _NEUTRAL.get(name)):
                del kept[name]
        return kept

    def sampling(self, left: int) -> Sampling:
        """How to generate; ``left``: tokens that fit behind the prompt.

        Raises:
            InputError: a value that is not served.
        """
        if self.response_format is not None and self.response_format.type != "text":
            raise InputError(
                f"response_format '{self.response_format.type}' is not served: ask for JSON in the prompt, or use a "
                "server with structured output."
            )
        if self.stream_options is not None and not self.stream:
            raise InputError("stream_options are for streamed answers: set stream to true.")
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stop) > 16:
            raise InputError(f"There are {len(stop)} stop texts: give up to 16.")
        return Sampling(
            max_tokens=self.tokens(left), temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p, top_k=max(self.top_k or 0, 0),
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            presence_penalty=self.presence_penalty or 0.0, frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=self.logit_bias or {}, seed=self.seed, stop=tuple(stop), ignore_eos=self.ignore_eos,
            logprobs=self.likeliest(),
        )  # fmt: skip

    def tokens(self, left: int) -> int:
        """Most tokens of the answer."""
        raise NotImplementedError

    def likeliest(self) -> int | None:
        """Log-probabilities to report at each position; None = none."""
        raise NotImplementedError


_NEUTRAL: dict[str, Any] = {
    "best_of": 1, "echo": False, "suffix": "", "tools": [], "tool_choice": "none", "functions": [],
    "parallel_tool_calls": True, "modalities": ["text"], "min_p": 0, "use_beam_search": False,
}  # fmt: skip
"""Fields that are not served, at the values at which they do nothing."""


class CompletionAsked(Asked):
    """POST /v1/completions."""

    prompt: str | list[int] | list[str | list[int]]
    logprobs: int | None = Field(default=None, ge=0, le=20)

    def prompts(self) -> list[str | list[int]]:
        """Each prompt by itself."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise InputError("The list of prompts is empty: write something.")
        if isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return [one for one in self.prompt if not isinstance(one, int)]

    def tokens(self, left: int) -> int:
        return DEFAULT_TOKENS if self.max_tokens is None else self.max_tokens

    def likeliest(self) -> int | None:
        return self.logprobs


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: str
    text: str = ""


class ChatMessage(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """Role and text.

        Raises:
            InputError: a part that is no text.
        """
        role = "system" if self.role == "developer" else self.role
        if isinstance(self.content, str):
            return {"role": role, "content": self.content}
        for part in self.content:
            if part.type != "text":
                raise InputError(f"A message has a part of type '{part.type}': this model reads text only.")
        return {"role": role, "content": "".join(part.text for part in self.content)}


class ChatAsked(Asked):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)

    def tokens(self, left: int) -> int:
        wanted = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        return max(left, 1) if wanted is None else wanted

    def likeliest(self) -> int | None:
        if self.top_logprobs and not self.logprobs:
            raise InputError("top_logprobs needs logprobs: set logprobs to true.")
        return (self.top_logprobs or 0) if self.logprobs else None


class LoadAsked(BaseModel):
    """POST /v1/load_lora_adapter, as vLLM has it."""

    model_config = ConfigDict(extra="forbid")

    lora_name: str
    lora_path: str
    load_inplace: bool = False
    pinned: bool = False


class UnloadAsked(BaseModel):
    """POST /v1/unload_lora_adapter, as vLLM has it."""

    model_config = ConfigDict(extra="forbid")

    lora_name: str
    lora_int_id: int | None = None
