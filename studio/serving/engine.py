"""The serving loop: requests of any adapters join and leave the batch at every step (arXiv 2311.03285).

A step admits waiting requests, runs one forward pass over a token of every running request and some tokens of the
prompts that are still to be read, and hands out what was generated. Admission counts every page that running requests
can ever need, adapters included (:mod:`adapters.serving.admission`), so nobody is preempted; with ``optimistic`` it
counts what they need now, and the youngest request starts again when the pool is full.

A mixture of experts computes with layers of its own, so its requests have a forward pass of their own within the step;
LoRAs act beside it as in chats.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from adapters.errors import InputError
from adapters.layers.experts.beside import ExpertsBeside
from adapters.serving.admission import Demand, peak
from adapters.serving.dispatch import BatchPlan, LoraDispatch
from adapters.serving.packing import PackedAdapter
from adapters.serving.pool import PagePool
from adapters.serving.store import AdapterStore, Resident
from pipelines.language.loading import LanguageModel, longest_input
from pipelines.language.paged import PagedBatch, PagedModel, Part, shape_of
from pipelines.language.tokens import TextStream, choose, logprobs
from studio.serving.metrics import Metrics
from studio.serving.requests import Piece, Reason, Request, room
from studio.serving.schedulers import scheduler

T = TypeVar("T")

_log = logging.getLogger(__name__)
_PAUSE = 0.5
"""Seconds after a step that failed."""


class QueueFullError(InputError):
    """More requests wait than the server takes."""


@dataclass(frozen=True)
class ServeConfig:
    """How the engine works.

    Attributes:
        pool_gb: memory of the pool in GB (1e9 bytes), for cache and adapters together; at most twice what
            ``max_running`` requests of the longest length take.
        pool_pages: its pages, instead; 0 = as many as ``pool_gb`` holds.
        max_running: most requests at a time.
        max_batch_tokens: most tokens of prompts in one step.
        max_waiting: most requests that wait; further ones are refused.
        max_rank: largest rank of an adapter in one module.
        scheduler: see :mod:`studio.serving.schedulers`; ``slo``: seconds until the first token, for early-abort;
            ``cluster``: different adapters at a time, for cluster.
        backend: see :mod:`adapters.serving.kernels`.
        optimistic: admit what fits now, and let the youngest request start again when the pool is full.
        prefetch: waiting requests whose adapters are fetched ahead into free pages.
        adapter_share: part of the pool set apart for adapters, the rest for the cache (for measurements); 0 = both
            share all of it.
    """

    pool_gb: float = 1.0
    pool_pages: int = 0
    max_running: int = 64
    max_batch_tokens: int = 512
    max_waiting: int = 1024
    max_rank: int = 512
    scheduler: str = "fcfs"
    slo: float = 6.0
    cluster: int = 32
    backend: str = "auto"
    optimistic: bool = False
    prefetch: int = 4
    adapter_share: float = 0.0

    def check(self) -> None:
        """Raise :class:`InputError` for values that cannot work."""
        for name in ("max_running", "max_batch_tokens", "max_waiting", "max_rank", "cluster"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not 0 <= self.adapter_share < 1:
            raise InputError(f"adapter_share must be from 0 to below 1, got {self.adapter_share}.")
        if self.pool_gb <= 0 or self.pool_pages < 0 or self.prefetch < 0 or self.slo <= 0:
            raise InputError("pool_gb and slo must be above 0, and pool_pages and prefetch not below.")


class Engine:
    """Serves one base.

    Args:
        base: a loaded causal language model; its attention is replaced until :meth:`close`.

    Raises:
        FamilyError: a model that cannot compute on pages.
        InputError: a configuration that cannot work.
    """

    def __init__(self, base: LanguageModel, config: ServeConfig | None = None) -> None:
        self.config = config = config or ServeConfig()
        config.check()
        self.base, self.tokenizer = base, base.tokenizer
        self.shape = shape_of(base.model)
        kind = next(p.dtype for p in base.model.parameters() if p.is_floating_point())
        count = config.pool_pages or min(
            int(config.pool_gb * 1e9 / (self.shape.page * kind.itemsize)),
            2 * config.max_running * self.shape.pages_per_token * (longest_input(base.model.config) or 2**15),
        )
        self.pool = PagePool(max(count, 2), self.shape.page, kind, base.device)
        self.model = PagedModel(base.model, self.pool)
        limit = int(config.adapter_share * self.pool.total) if config.adapter_share else None
        self.store = AdapterStore(self.pool, limit)
        head = base.model.get_output_embeddings()
        self.vocabulary = int(base.model.get_input_embeddings().weight.shape[0])
        named = {id(module): name for name, module in base.model.named_modules()}
        self.dispatch = LoraDispatch(base.model, self.pool, config.backend, named.get(id(head), ""))
        self.mixtures: dict[str, ExpertsBeside] = {}
        self.metrics = Metrics()
        self.scheduler = scheduler(config.scheduler, config.slo, config.cluster)
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self._inbox: deque[Request | Callable[[], None]] = deque()
        self._held: Counter[Any] = Counter()  # requests, waiting and running, of each adapter
        self._leaving: set[Any] = set()
        self._residents: dict[int, Resident] = {}
        self._plan: tuple[Any, BatchPlan] | None = None
        self._lock = threading.RLock()
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopping = False

    # ------------------------------------------------------------------------------------------ from other threads
    def submit(self, request: Request) -> Request:
        """Let a request wait for its turn.

        Raises:
            QueueFullError: too many wait already.
            InputError: it can never be served: its sampling, its length, the pool, an adapter that is not loaded.
        """
        request.sampling.check()
        strange = [token for token in request.sampling.logit_bias if not 0 <= token < self.vocabulary]
        if strange:
            raise InputError(
                f"logit_bias names the token {strange[0]}, and the vocabulary's numbers are 0 to {self.vocabulary - 1}."
            )
        if len(self.waiting) + len(self._inbox) >= self.config.max_waiting:
            raise QueueFullError(f"{self.config.max_waiting} requests are waiting already: try again later.")
        self._check_room(request)
        request.text = TextStream(self.tokenizer, request.sampling.stop)
        with self._wake:
            if request.adapter is not None:
                if request.adapter not in self.store or request.adapter in self._leaving:
                    raise InputError(f"The adapter '{request.label}' is not loaded.")
                self._held[request.adapter] += 1
            if request.mixture:
                if request.mixture not in self.mixtures or request.mixture in self._leaving:
                    raise InputError(f"The mixture '{request.label}' is not loaded.")
                self._held[request.mixture] += 1
            self._inbox.append(request)
            self._wake.notify()
        self.metrics.count("prompt_tokens_total", len(request.prompt))
        return request

    def cancel(self, request: Request) -> None:
        """The asker is gone: the request ends at the next step."""
        request.cancelled = True
        with self._wake:
            self._wake.notify()

    def call(self, act: Callable[[], T]) -> T:
        """Run ``act`` between two steps; returns its result, or raises its error."""
        if self._thread is None or threading.current_thread() is self._thread:
            with self._lock:
                return act()
        done: Future[T] = Future()

        def run() -> None:
            try:
                done.set_result(act())
            except BaseException as error:
                done.set_exception(error)

        with self._wake:
            self._inbox.append(run)
            self._wake.notify()
        return done.result()

    def add(self, key: Any, packed: PackedAdapter, pinned: bool = False) -> None:
        """Keep an adapter; raises as :meth:`adapters.serving.store.AdapterStore.add`."""

        def act() -> None:
            self.store.add(key, packed, pinned)
            self.dispatch.watch(packed.places)

        self.call(act)

    def add_mixture(self, key: str, path: Any) -> None:
        """Put the mixture of experts at ``path`` beside the model; raises as :class:`ExpertsBeside`."""

        def act() -> None:
            self.mixtures[key] = ExpertsBeside(self.base.model, path)

        self.call(act)

    def revive(self, key: Any) -> bool:
        """Keep an adapter that was to leave, if it has not left yet; whether it is there."""
        with self._wake:
            self._leaving.discard(key)
            return key in self.store

    def remove(self, key: Any) -> None:
        """Take an adapter or a mixture away; requests that were accepted before are answered first."""

        def act() -> None:
            with self._wake:
                self._leaving.add(key)
                self._let_go(key)

        self.call(act)

    def start(self) -> None:
        """Run steps in a thread of its own until :meth:`close`."""
        self._thread = threading.Thread(target=self._run, name="serving", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread and all requests; the model is its own self again."""
        self._stopping = True
        if self._thread is not None:
            with self._wake:
                self._wake.notify()
            self._thread.join()
            self._thread = None
        with self._lock:
            self._receive()
            for request in (*self.waiting, *self.running):
                self._end(request, "cancelled")
            self.waiting, self.running = [], []
            self.dispatch.close()
            self.model.close()

    def finish(self, requests: Sequence[Request]) -> None:
        """Step until these have ended; only without a thread."""
        while not all(one.done for one in requests):
            self.step()

    @property
    def threaded(self) -> bool:
        return self._thread is not None

    @property
    def idle(self) -> bool:
        return not (self.waiting or self.running or self._inbox)

    # ------------------------------------------------------------------------------------------ the loop
    def _run(self) -> None:
        while not self._stopping:
            try:
                worked = self.step()
            except Exception:
                _log.exception("a step failed")
                time.sleep(_PAUSE)  # what fails at once may fail again
                worked = True
            if not worked:
                with self._wake:
                    if not self._inbox and not self._stopping:
                        self._wake.wait(0.5 if self.waiting else 5.0)

    def step(self) -> bool:
        """One iteration; whether there was anything to compute."""
        with self._lock, torch.no_grad():
            self._receive()
            self._drop()
            self._admit()
            parts = self._place(self._chosen())
            for group in self._grouped(parts):
                try:
                    self._compute(group)
                except Exception as error:
                    _log.exception("a forward pass failed")
                    for request, _ in group:
                        if not request.done:
                            self._end(request, "error", str(error))
            self.running = [one for one in self.running if not one.done]
            self._prefetch()
            return bool(parts)

    def _receive(self) -> None:
        """Take in what other threads have left."""
        while self._inbox:
            item = self._inbox.popleft()
            if isinstance(item, Request):
                self.scheduler.arrived(item, self.waiting, self.running)
                self.waiting.append(item)
            else:
                item()

    def _drop(self) -> None:
        """Let go of requests that were cancelled, or are too late."""
        for request in self.scheduler.late(self.waiting):
            self._end(request, "late")
        for request in (*self.waiting, *self.running):
            if request.cancelled and not request.done:
                self._end(request, "cancelled")
        self.waiting = [one for one in self.waiting if not one.done]
        self.running = [one for one in self.running if not one.done]

    def _admit(self) -> None:
        for request in self.scheduler.order(self.waiting, self.running):
            if len(self.running) >= self.config.max_running or not self._fits(request):
                return
            if request.adapter is not None:
                found = self.store.acquire(request.adapter)
                if found is None:
                    return
                self._residents[request.number] = found
            self.waiting.remove(request)
            self.running.append(request)
            self.scheduler.admitted(request)

    def _fits(self, request: Request) -> bool:
        """Whether the pool suffices for the running requests and this one, to their ends (optimistic: for now)."""
        present = {one.adapter for one in (*self.running, request)} - {None}
        adapters = sum(self.store.pages(key) for key in present if not self.store.is_pinned(key))
        room = self.pool.total - self.store.pinned_pages - adapters
        if self.store.limit is not None:
            if adapters > self.store.limit:
                return False
            room = self.pool.total - self.store.limit
        if self.config.optimistic:
            return sum(self._per_token(one) * (one.length + 1) for one in (*self.running, request)) <= room
        return peak(self._demands([*self.running, request])) <= room

    def _demands(self, requests: Sequence[Request]) -> list[Demand]:
        """What each can need; prompts are read in this order, ``max_batch_tokens`` in each step."""
        ahead, found = 0, []
        for one in requests:
            ahead += 0 if one.decoding else one.unread
            delay = 0 if one.decoding else max(0, -(-ahead // self.config.max_batch_tokens) - 1)
            found.append(Demand(one.length, one.remaining, delay, self._per_token(one)))
        return found

    def _per_token(self, request: Request) -> int:
        """Pages that a token of the request takes: twice as many for an X-LoRA, which reads each token twice."""
        return self.shape.pages_per_token * (2 if self._reads_twice(request) else 1)

    def _reads_twice(self, request: Request) -> bool:
        return bool(request.mixture) and self.mixtures[request.mixture].routing.source is not None

    def _check_room(self, request: Request) -> None:
        length, most = len(request.prompt), request.sampling.max_tokens
        if not length:
            raise InputError("The prompt has no tokens: write something.")
        longest = longest_input(self.base.model.config)
        if longest is not None and length + most > longest:
            raise InputError(
                f"The prompt has {length} tokens; with {most} new ones that is more than the {longest} this model can "
                "read: shorten it, or ask for fewer tokens."
            )
        if request.mixture and request.mixture not in self.mixtures:
            raise InputError(f"The mixture '{request.label}' is not loaded.")
        own = self.store.pages(request.adapter) if request.adapter in self.store else 0
        pinned = self.store.pinned_pages
        if own and self.store.is_pinned(request.adapter):
            own = 0
        wanted = peak([Demand(length, most, 0, self._per_token(request))])
        if wanted + own + pinned > self.pool.total:
            raise InputError(
                f"The prompt ({length} tokens), its answer ({most}) and the adapter take {wanted + own} pages, more "
                f"than the pool has ({self.pool.total - pinned}): ask for fewer tokens, or give the server more memory."
            )

    def _chosen(self) -> list[tuple[Request, int]]:
        """(request, new tokens) of this step: one token of each that decodes, and prompts in order of admission."""
        budget, found = self.config.max_batch_tokens, []
        for request in self.running:
            if request.decoding:
                found.append((request, 1))
            elif budget:
                count = min(request.unread, budget)
                budget -= count
                found.append((request, count))
        return found

    def _place(self, parts: list[tuple[Request, int]]) -> list[tuple[Request, int]]:
        """Give the new tokens pages; the parts that remain."""
        placed = []
        for request, count in parts:
            if request not in self.running:  # it had to give its pages to another one
                continue
            rows = self.shape.pages_per_token
            twice = self._reads_twice(request)
            ids = self._take(request, count * rows * (2 if twice else 1))
            if ids is None:
                continue
            end = request.cached + count
            own, *second = ids.reshape(-1, rows, count)
            request.pages = room(request.pages, rows, end)
            request.pages[:, request.cached : end] = own
            if second:
                request.shadow = room(request.shadow, rows, end)
                request.shadow[:, request.cached : end] = second[0]
            placed.append((request, count))
        return [(request, count) for request, count in placed if request in self.running]

    def _take(self, request: Request, count: int) -> Any:
        """Pages for a running request; None if it lost its turn (optimistic only)."""
        while True:
            if self.store.make_room(count) and (ids := self.pool.alloc(count, request.owner)) is not None:
                return ids
            assert self.config.optimistic, "admission promised more pages than there are"
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is request:
                return None

    def _preempt(self, request: Request) -> None:
        """Take its pages; it starts again, with what it has generated, as the first that waits."""
        self.pool.free(request.owner)
        request.forget_cache()
        self._release(request)
        self.running.remove(request)
        self.waiting.insert(0, request)
        self.metrics.count("num_preemptions_total")

    def _grouped(self, parts: Sequence[tuple[Request, int]]) -> list[list[tuple[Request, int]]]:
        """One group for all requests without a mixture, and one per mixture and LoRA beside it."""
        groups: dict[Any, list[tuple[Request, int]]] = {}
        for request, count in parts:
            groups.setdefault((request.mixture, request.adapter if request.mixture else None), []).append(
                (request, count)
            )
        return list(groups.values())

    def _compute(self, group: Sequence[tuple[Request, int]]) -> None:
        ordered = sorted(group, key=lambda one: one[1] > 1)  # single tokens first
        parts = [self._part(request, count, request.pages) for request, count in ordered]
        shadow = None
        if self._reads_twice(ordered[0][0]):
            shadow = PagedBatch([self._part(request, count, request.shadow) for request, count in ordered], self.pool)
        batch = PagedBatch(parts, self.pool, shadow)
        rows = batch.last_rows()
        ends = [(request, row) for (request, count), row in zip(ordered, rows, strict=True) if count == request.unread]
        keep = [row for _, row in ends] or rows[-1:]
        with self._acting(ordered, batch, keep):
            logits = self.model.forward(batch, keep)
        for request, count in ordered:
            request.cached += count
        self._generate([request for request, _ in ends], logits)

    def _part(self, request: Request, count: int, pages: Any) -> Part:
        start = request.cached
        return Part([request.token(place) for place in range(start, start + count)], start, pages)

    @contextmanager
    def _acting(self, ordered: Sequence[tuple[Request, int]], batch: PagedBatch, keep: Sequence[int]) -> Iterator[None]:
        """Inside, the model computes with each token's adapter, and with the mixture of the group."""
        key = ([(id(self._residents.get(one.number)), count) for one, count in ordered], list(keep))
        if self._plan is None or self._plan[0] != key:
            tokens = [self._residents.get(one.number) for one, count in ordered for _ in range(count)]
            self._plan = key, BatchPlan(tokens, self.pool, keep)
        with ExitStack() as stack:
            if name := ordered[0][0].mixture:
                routing = stack.enter_context(self.mixtures[name].active())
                if routing.source is not None:
                    stack.enter_context(_first_pass_in(batch, routing))
            stack.enter_context(self.dispatch.planned(self._plan[1]))
            yield

    def _generate(self, requests: Sequence[Request], logits: Tensor) -> None:
        likeliest = logits[: len(requests)].argmax(-1).tolist()
        now = time.monotonic()
        for number, request in enumerate(requests):
            sampling = request.sampling
            try:
                token = likeliest[number] if sampling.plain else choose(
                    logits[number], sampling, request.prompt, request.answer, request.random
                )  # fmt: skip
            except Exception as error:  # of this request's numbers alone: the others go on
                _log.exception("no token could be chosen")
                self._end(request, "error", str(error))
                continue
            found = () if sampling.logprobs is None else (logprobs(logits[number], token, sampling.logprobs),)
            if request.first_token is None:
                request.first_token = now
                self.metrics.observe("time_to_first_token_seconds", now - request.arrived)
            request.answer.append(token)
            self.scheduler.generated(request)
            self.metrics.count("generation_tokens_total")
            self._tell(request, token, found)

    def _tell(self, request: Request, token: int, found: tuple[Any, ...]) -> None:
        """Hand out the text, and end the request if this was its last token."""
        assert request.text is not None
        ended = token in request.ends and not request.sampling.ignore_eos
        piece = "" if ended else request.text.push(token)
        reason: Reason | None = "stop" if ended or request.text.stopped else None
        if reason is None and request.remaining == 0:
            reason = "length"
        if reason is None:
            if piece or found:
                request.sink(Piece(piece, found))
            return
        if not request.text.stopped:
            piece += request.text.finish()
            reason = "stop" if request.text.stopped else reason
        self._end(request, reason, text=piece, found=found)

    def _end(
        self, request: Request, reason: Reason, error: str = "", text: str = "", found: tuple[Any, ...] = ()
    ) -> None:
        self.pool.free(request.owner)
        self._release(request)
        with self._wake:
            for key in (request.adapter, request.mixture):
                if key:
                    self._held[key] -= 1
                    self._let_go(key)
        self.metrics.count("request_success_total", finished_reason=reason)
        self.metrics.observe("e2e_request_latency_seconds", time.monotonic() - request.arrived)
        request.sink(Piece(text, found, reason, error))
        request.over.set()

    def _release(self, request: Request) -> None:
        if self._residents.pop(request.number, None) is not None:
            self.store.release(request.adapter)

    def _let_go(self, key: Any) -> None:
        """Free an adapter that leaves, once nobody uses it."""
        if key in self._leaving and not self._held[key]:
            self._leaving.discard(key)
            del self._held[key]
            if self.mixtures.pop(key, None) is None:
                self.store.remove(key)

    def _prefetch(self) -> None:
        for request in self.waiting[: self.config.prefetch]:
            if request.adapter is not None and not self.store.prefetch(request.adapter):
                return

    # ------------------------------------------------------------------------------------------ for the metrics
    def gauges(self) -> list[tuple[str, dict[str, str], float]]:
        """(name, labels, value) of the present state, for the metrics."""
        with self._lock:
            stats, total = self.pool.stats(), max(self.pool.total, 1)
            running = sorted({one.label for one in self.running if one.adapter is not None or one.mixture})
            waiting = sorted({one.label for one in self.waiting if one.adapter is not None or one.mixture})
            lora = {"max_lora": str(len(self.store)), "running_lora_adapters": ",".join(running),
                    "waiting_lora_adapters": ",".join(waiting)}  # fmt: skip
            return [
                ("num_requests_running", {}, len(self.running)),
                ("num_requests_waiting", {}, len(self.waiting) + len(self._inbox)),
                ("kv_cache_usage_perc", {}, stats.kv / total),
                ("lora_requests_info", lora, time.time()),
                ("resident_adapters", {}, len(self.store.resident)),
                ("pool_pages", {"kind": "kv"}, stats.kv),
                ("pool_pages", {"kind": "adapter"}, stats.adapter),
                ("pool_pages", {"kind": "free"}, stats.free),
                ("adapter_loads", {}, self.store.counts.loads),
                ("adapter_evictions", {}, self.store.counts.evictions),
            ]


@contextmanager
def _first_pass_in(batch: PagedBatch, routing: Any) -> Iterator[None]:
    """Inside, the base's own pass of an X-LoRA writes to the pages of the batch's shadow."""
    source = routing.source

    def marked(*args: Any) -> Any:
        batch.in_first = True
        try:
            return source(*args)
        finally:
            batch.in_first = False

    routing.source = marked
    try:
        yield
    finally:
        routing.source = source
