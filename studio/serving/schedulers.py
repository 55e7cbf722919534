"""Which waiting request is tried next; the engine asks before every step.

fcfs          in the order of arrival
cluster       at most so many different adapters at a time; among the rest those whose adapter is running first
early-abort   a request that cannot have its first token in time is dropped; under load the newest goes first
              (arXiv 2311.03285, section 4.2)
vtc           fair by adapter: the one that was served least, a prompt's token counting 1 and a generated one 2
              (arXiv 2401.00588)
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence

from adapters.errors import InputError, nearest
from studio.serving.requests import Request


class Fcfs:
    """In the order of arrival."""

    def order(self, waiting: Sequence[Request], running: Sequence[Request]) -> list[Request]:
        """The requests to try, in order; the first one that does not fit ends the attempt."""
        return list(waiting)

    def late(self, waiting: Sequence[Request]) -> list[Request]:
        """The requests to give up."""
        return []

    def arrived(self, request: Request, waiting: Sequence[Request], running: Sequence[Request]) -> None:
        """A new request waits."""

    def admitted(self, request: Request) -> None:
        """A request starts to run."""

    def generated(self, request: Request) -> None:
        """A token was generated."""


class Cluster(Fcfs):
    """Args:
    adapters: most different adapters that run at a time.
    """

    def __init__(self, adapters: int = 32) -> None:
        self.most = adapters

    def order(self, waiting: Sequence[Request], running: Sequence[Request]) -> list[Request]:
        present = {one.adapter for one in running} - {None}
        near = [one for one in waiting if one.adapter is None or one.adapter in present]
        chosen = list(near)
        for one in waiting:
            if one.adapter is not None and one.adapter not in present:
                if len(present) >= self.most:
                    continue
                present.add(one.adapter)
                chosen += [other for other in waiting if other.adapter == one.adapter]
        return chosen


class EarlyAbort(Fcfs):
    """Args:
    limit: seconds within which the first token should come.
    """

    MARGIN = 0.5

    def __init__(self, limit: float = 6.0) -> None:
        self.limit = limit
        self._new = self._rate = self._batch = self._started = 0

    def late(self, waiting: Sequence[Request]) -> list[Request]:
        now = time.monotonic()
        return [one for one in waiting if now - one.arrived + self.MARGIN >= self.limit]

    def arrived(self, request: Request, waiting: Sequence[Request], running: Sequence[Request]) -> None:
        self._new += 1

    def order(self, waiting: Sequence[Request], running: Sequence[Request]) -> list[Request]:
        if self._new or self._started:
            self._rate = int(0.7 * self._new + 0.3 * self._rate)
            self._batch = max(int(0.7 * self._started + 0.3 * self._batch), 1)
            self._new = self._started = 0
        return list(reversed(waiting)) if self._rate >= self._batch else list(waiting)

    def admitted(self, request: Request) -> None:
        self._started += 1


class Vtc(Fcfs):
    """Virtual token counters, one per adapter."""

    PROMPT, GENERATED = 1.0, 2.0

    def __init__(self) -> None:
        self.served: dict[str, float] = defaultdict(float)

    def arrived(self, request: Request, waiting: Sequence[Request], running: Sequence[Request]) -> None:
        active = {one.label for one in (*waiting, *running)}
        if request.label not in active and active:  # who comes back has no credit for the time away
            self.served[request.label] = max(self.served[request.label], min(self.served[one] for one in active))

    def order(self, waiting: Sequence[Request], running: Sequence[Request]) -> list[Request]:
        return sorted(waiting, key=lambda one: self.served[one.label])

    def admitted(self, request: Request) -> None:
        self.served[request.label] += self.PROMPT * len(request.prompt)

    def generated(self, request: Request) -> None:
        self.served[request.label] += self.GENERATED


SCHEDULERS = {"fcfs": Fcfs, "cluster": Cluster, "early-abort": EarlyAbort, "vtc": Vtc}


def scheduler(name: str, slo: float = 6.0, adapters: int = 32) -> Fcfs:
    """The scheduler of this name.

    Args:
        slo: of ``early-abort``, seconds until the first token.
        adapters: of ``cluster``, different adapters at a time.

    Raises:
        InputError: there is none of this name.
    """
    if name not in SCHEDULERS:
        raise InputError(f"There is no scheduler '{name}'{nearest(name, SCHEDULERS)}: use one of "
                         f"{', '.join(SCHEDULERS)}.")  # fmt: skip
    if name == "cluster":
        return Cluster(adapters)
    return EarlyAbort(slo) if name == "early-abort" else SCHEDULERS[name]()
