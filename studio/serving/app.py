"""The HTTP server: OpenAI's routes, vLLM's for adapters, health and metrics.

Errors have OpenAI's shape. A client that goes away ends its request. What does not fit now is refused with 429 or 503
and ``Retry-After``; what can never fit with 400.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, MutableMapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from adapters.errors import InputError, StudioError
from pipelines.language.loading import longest_input
from studio.serving import replies
from studio.serving.adapters import AUTO, UnknownModelError
from studio.serving.engine import QueueFullError
from studio.serving.replies import Reply
from studio.serving.requests import Piece
from studio.serving.schemas import Asked, ChatAsked, CompletionAsked, LoadAsked, UnloadAsked
from studio.serving.service import Ask, ServeEngine

if TYPE_CHECKING:
    from studio.serving.pictures import PictureService

OPEN_ROUTES = ("/health",)
"""What needs no key."""


@dataclass(frozen=True)
class ServerOptions:
    """How the server treats its clients.

    Attributes:
        api_key: asked of every client; "" = none is.
        runtime_lora: whether clients may load and unload adapters; ``roots``: folders from which they may load.
        max_body: largest body of a request, bytes.
        hosts: names under which the server answers, against pages that point a name of theirs here; "*" = any.
    """

    api_key: str = ""
    runtime_lora: bool = False
    roots: tuple[Path, ...] = ()
    max_body: int = 2**20
    hosts: tuple[str, ...] = ("*",)


class LateError(InputError):
    """No first token in time."""


class FailedError(Exception):
    """A forward pass failed."""


def create_app(
    serve: ServeEngine, options: ServerOptions | None = None, pictures: PictureService | None = None
) -> FastAPI:
    """The application; the engine's thread runs as long as it does."""
    options = options or ServerOptions()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        serve.start()
        if pictures is not None:
            pictures.start()
        yield
        if pictures is not None:
            await asyncio.to_thread(pictures.close)
        await asyncio.to_thread(serve.close)

    app = FastAPI(title="Adapter Studio", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    _errors(app)
    _Routes(serve, options, pictures).add(app)
    app.add_middleware(_Gate, options=options)
    if "*" not in options.hosts:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(options.hosts))
    return app


@dataclass
class _Routes:
    serve: ServeEngine
    options: ServerOptions
    pictures: PictureService | None

    def add(self, app: FastAPI) -> None:
        app.get("/health")(self.health)
        app.get("/metrics")(self.metrics)
        app.get("/v1/models")(self.models)
        app.get("/v1/models/{name:path}")(self.model)
        app.post("/v1/completions")(self.complete)
        app.post("/v1/chat/completions")(self.chat)
        app.post("/v1/load_lora_adapter")(self.load)
        app.post("/v1/unload_lora_adapter")(self.unload)
        if self.pictures is not None:
            self.pictures.add(app)

    async def health(self) -> Response:
        return Response()

    async def metrics(self) -> Response:
        engine = self.serve.engine
        gauges = await asyncio.to_thread(engine.gauges)  # waits for the running step
        return PlainTextResponse(engine.metrics.text(gauges, self.serve.name),
                                 media_type="text/plain; version=0.0.4; charset=utf-8")  # fmt: skip

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": await asyncio.to_thread(self._cards)}

    async def model(self, name: str) -> dict[str, Any]:
        for card in await asyncio.to_thread(self._cards):
            if card["id"] == name:
                return card
        raise UnknownModelError(f"There is no model '{name}'.")

    def _cards(self) -> list[dict[str, Any]]:
        """The base first, then "auto" if there is a choice, the adapters, and what draws."""
        adapters = self.serve.adapters
        roots: dict[str, tuple[str, float]] = {
            record.name: (str(record.path), record.modified) for record in adapters.records()
        }
        roots |= {one.name: (str(one.path), one.created) for one in adapters.loaded if one.name not in roots}
        base = self.serve.name
        cards = [_card(base, self.serve.base.source, None)]
        if self.serve.pick is not None:
            cards.append(_card(AUTO, self.serve.base.source, base))
        cards += [_card(name, root, base, made) for name, (root, made) in sorted(roots.items())]
        return cards + (self.pictures.cards() if self.pictures is not None else [])

    # -------------------------------------------------------------------------------------- texts
    async def complete(self, asked: CompletionAsked, http: Request) -> Response:
        prompts = asked.prompts()
        text = next((one for one in prompts if isinstance(one, str)), "")
        mix = await asyncio.to_thread(self.serve.mix, asked.adapter_id or asked.model, text)
        asks = [(self.serve.ids(one), "") for one in prompts]
        return await self._answered(asked, http, mix, asks, chat=False)

    async def chat(self, asked: ChatAsked, http: Request) -> Response:
        messages = [message.plain() for message in asked.messages]
        last = next((one["content"] for one in reversed(messages) if one["role"] == "user"), "")
        mix = await asyncio.to_thread(self.serve.mix, asked.adapter_id or asked.model, last)
        return await self._answered(asked, http, mix, [self.serve.chat_ids(messages, mix.template)], chat=True)

    async def _answered(
        self, asked: Asked, http: Request, mix: Any, prompts: Sequence[tuple[list[int], str]], chat: bool
    ) -> Response:
        longest = longest_input(self.serve.base.model.config) or 2**31
        asks: list[Ask] = []
        try:
            for ids, mark in prompts:
                sampling = asked.sampling(longest - len(ids))
                for copy in range(asked.n):
                    seed = None if sampling.seed is None else sampling.seed + copy
                    asks.append(self.serve.ask(ids, mix, replace(sampling, seed=seed), mark))
        except InputError:
            for ask in asks:
                ask.cancel()
            raise
        used = sum(len(ids) for ids, _ in prompts)
        reply = Reply(chat, mix.label if mix.members else self.serve.name, self.serve.base.tokenizer)
        coming = _Together(asks)
        coming.watch(http)
        try:
            first = await coming.first()  # refusals come before the answer has begun
        except BaseException:
            coming.cancel()
            raise
        if asked.stream:
            wanted = asked.stream_options is not None and asked.stream_options.include_usage
            coming.unwatch()  # from here on the stream itself is cancelled when the client goes
            return StreamingResponse(_events(reply, coming, first, used, wanted), media_type="text/event-stream",
                                     headers={"Cache-Control": "no-cache"})  # fmt: skip
        texts, reasons = [""] * len(asks), [""] * len(asks)
        tokens: list[list[Any]] = [[] for _ in asks]
        try:
            async for number, piece in coming.rest(first):
                texts[number] += piece.text
                tokens[number] += piece.tokens
                reasons[number] = piece.reason or ""
        finally:
            coming.cancel()
        if "error" in reasons:
            raise FailedError
        wanted = asked.likeliest() is not None
        choices = [reply.choice(number, texts[number], tokens[number], reasons[number], wanted)
                   for number in range(len(asks))]  # fmt: skip
        answers = sum(len(ask.request.answer) for ask in asks)
        return JSONResponse(reply.whole(choices, replies.usage(used, answers)))

    # -------------------------------------------------------------------------------------- adapters
    async def load(self, asked: LoadAsked) -> Response:
        self._check_runtime()
        path = Path(asked.lora_path).expanduser().resolve()
        if not any(path.is_relative_to(root.expanduser().resolve()) for root in self.options.roots):
            raise InputError(f"'{asked.lora_path}' is not in a folder from which adapters may be loaded.")

        def act() -> None:
            adapters = self.serve.adapters
            old = next((one for one in adapters.loaded if asked.load_inplace and one.name == asked.lora_name), None)
            if old is not None:
                adapters.remove(old.name)
            try:
                adapters.add(asked.lora_name, path, asked.pinned)
            except StudioError:
                if old is not None:  # what was served before is served on
                    adapters.load(old.name, old.path)
                raise

        await asyncio.to_thread(act)
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' added successfully.")

    async def unload(self, asked: UnloadAsked) -> Response:
        self._check_runtime()
        await asyncio.to_thread(self.serve.adapters.remove, asked.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' removed successfully.")

    def _check_runtime(self) -> None:
        if not self.options.runtime_lora:
            raise HTTPException(403, "Adapters are not loaded or unloaded by clients here: the server was started "
                                     "without --allow-runtime-lora.")  # fmt: skip


def _card(name: str, root: str, parent: str | None, created: float = 0.0) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": int(created), "owned_by": "adapter-studio", "root": root,
            "parent": parent}  # fmt: skip


class _Together:
    """The pieces of several requests as they come."""

    def __init__(self, asks: Sequence[Ask]) -> None:
        self.asks = asks
        self._coming: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        self._open = len(asks)
        self._watcher: asyncio.Task[None] | None = None
        self._tasks = [asyncio.create_task(self._collect(number, ask)) for number, ask in enumerate(asks)]

    async def _collect(self, number: int, ask: Ask) -> None:
        async for piece in ask.pieces():
            self._coming.put_nowait((number, piece))

    def watch(self, http: Request) -> None:
        """End everything when the client goes."""

        async def until_gone() -> None:
            while not await http.is_disconnected():
                await asyncio.sleep(0.2)
            for ask in self.asks:
                ask.cancel()

        self._watcher = asyncio.create_task(until_gone())

    def unwatch(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()

    async def first(self) -> tuple[int, Piece]:
        """The first piece, or the reason why there is none.

        Raises:
            LateError: the request was given up, because it waited too long.
            FailedError: the forward pass failed.
            HTTPException: the client has gone.
        """
        found = await self._coming.get()
        if found[1].reason == "late":
            raise LateError("The server is too busy to begin within its time limit: try again later.")
        if found[1].reason == "error":
            raise FailedError(found[1].error)
        if found[1].reason == "cancelled":
            raise HTTPException(499, "The client has gone, or the server stops.")
        return found

    async def rest(self, first: tuple[int, Piece]) -> AsyncGenerator[tuple[int, Piece], None]:
        """``first`` and what follows, until every answer has ended."""
        found = first
        while True:
            yield found
            self._open -= found[1].reason is not None
            if not self._open:
                return
            found = await self._coming.get()

    def cancel(self) -> None:
        """Nobody waits any more."""
        self.unwatch()
        for ask in self.asks:
            ask.cancel()
        for task in self._tasks:
            task.cancel()


async def _events(
    reply: Reply, coming: _Together, first: tuple[int, Piece], prompt_tokens: int, with_usage: bool
) -> AsyncIterator[str]:
    """The chunks of a streamed answer; cancelled when the client goes."""
    begun: set[int] = set()
    try:
        async for number, piece in coming.rest(first):
            if piece.reason in ("late", "error", "cancelled"):
                message = piece.error or "The server is too busy, or stops."
                yield replies.event(replies.error(message, "server_error"))
                return
            yield replies.event(reply.chunk(number, piece.text, piece.tokens, piece.reason, number not in begun))
            begun.add(number)
        if with_usage:
            answers = sum(len(ask.request.answer) for ask in coming.asks)
            yield replies.event(reply.closing(replies.usage(prompt_tokens, answers)))
        yield replies.event("[DONE]")
    finally:
        coming.cancel()


# ---------------------------------------------------------------------------------------------- errors and limits


def _errors(app: FastAPI) -> None:
    def answer(status: int, message: str, kind: str, code: str | None = None, param: str | None = None) -> Response:
        headers = {"Retry-After": "1"} if status in (429, 503) else None
        return JSONResponse(replies.error(message, kind, param, code), status, headers)

    @app.exception_handler(UnknownModelError)
    async def unknown(http: Request, error: UnknownModelError) -> Response:
        return answer(404, str(error), "invalid_request_error", "model_not_found", "model")

    @app.exception_handler(QueueFullError)
    async def full(http: Request, error: QueueFullError) -> Response:
        return answer(429, str(error), "rate_limit_error", "queue_full")

    @app.exception_handler(LateError)
    async def late(http: Request, error: LateError) -> Response:
        return answer(503, str(error), "server_error", "too_busy")

    @app.exception_handler(InputError)
    async def wrong(http: Request, error: InputError) -> Response:
        return answer(400, str(error), "invalid_request_error")

    @app.exception_handler(FailedError)
    async def failed(http: Request, error: FailedError) -> Response:
        return answer(500, "The answer failed: the server's log says why.", "server_error")

    @app.exception_handler(RequestValidationError)
    async def invalid(http: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "body")
        told = "is not a field that is served here" if first["type"] == "extra_forbidden" else first["msg"]
        return answer(400, f"{place or 'The body'}: {told}.", "invalid_request_error", param=place or None)

    @app.exception_handler(HTTPException)
    async def other(http: Request, error: HTTPException) -> Response:
        return answer(error.status_code, str(error.detail), "invalid_request_error")


Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


@dataclass
class _Gate:
    """Asks for the key, and stops bodies that are too large before they are read."""

    app: Any
    options: ServerOptions = field(default_factory=ServerOptions)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        if self.options.api_key and scope["path"] not in OPEN_ROUTES:
            given = headers.get(b"authorization", b"").removeprefix(b"Bearer ")
            if not hmac.compare_digest(given, self.options.api_key.encode()):
                body = replies.error("The API key is missing or wrong.", "authentication_error", code="invalid_api_key")
                await JSONResponse(body, 401, {"WWW-Authenticate": "Bearer"})(scope, receive, send)
                return
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > self.options.max_body:
            await self._too_large(scope, receive, send)
            return
        read, started = 0, False

        async def limited() -> MutableMapping[str, Any]:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.options.max_body:
                raise _TooLargeError
            return message

        async def watched(message: MutableMapping[str, Any]) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, limited, watched)
        except _TooLargeError:
            if not started:
                await self._too_large(scope, receive, send)

    async def _too_large(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = replies.error(f"The body is larger than {self.options.max_body} bytes.", "invalid_request_error",
                             code="body_too_large")  # fmt: skip
        await JSONResponse(body, 413, {"Connection": "close"})(scope, receive, send)


class _TooLargeError(Exception):
    pass
