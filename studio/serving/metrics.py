"""Counters of the server in Prometheus' text format, with vLLM's names and meanings behind the prefix ``studio:``."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

PREFIX = "studio:"
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0)
Labels = tuple[tuple[str, str], ...]


class Metrics:
    """Counters and histograms; any thread may add to them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.counters: dict[tuple[str, Labels], float] = defaultdict(float)
        self._histograms: dict[str, list[float]] = {}  # counts per bucket, the rest, and the sum

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        with self._lock:
            self.counters[name, tuple(sorted(labels.items()))] += amount

    def observe(self, name: str, seconds: float) -> None:
        with self._lock:
            found = self._histograms.setdefault(name, [0.0] * (len(SECONDS) + 2))
            found[bisect_left(SECONDS, seconds)] += 1
            found[-1] += seconds

    def total(self, name: str) -> float:
        """The sum of a counter over its labels."""
        with self._lock:
            return sum(value for (one, _), value in self.counters.items() if one == name)

    def text(self, gauges: Iterable[tuple[str, Mapping[str, str], float]], model: str) -> str:
        """Everything, with ``gauges`` (name, labels, value), each labelled with the model's name."""
        own = (("model_name", model),)
        with self._lock:
            lines: list[str] = []
            for name, labels, value in gauges:
                lines += [*_typed(lines, name, "gauge"), _line(name, (*own, *labels.items()), value)]
            for (name, tags), value in sorted(self.counters.items()):
                lines += [*_typed(lines, name, "counter"), _line(name, (*own, *tags), value)]
            for name, found in sorted(self._histograms.items()):
                lines += _typed(lines, name, "histogram")
                running = 0.0
                for bound, number in zip((*map(str, SECONDS), "+Inf"), found[:-1], strict=True):
                    running += number
                    lines.append(_line(f"{name}_bucket", (*own, ("le", bound)), running))
                lines += [_line(f"{name}_count", own, running), _line(f"{name}_sum", own, found[-1])]
        return "\n".join(lines) + "\n"


def _typed(lines: Sequence[str], name: str, kind: str) -> list[str]:
    line = f"# TYPE {PREFIX}{name} {kind}"
    return [] if line in lines else [line]


def _line(name: str, labels: Iterable[tuple[str, str]], value: float) -> str:
    shown = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels)
    return f"{PREFIX}{name}{{{shown}}} {value:g}" if value < 1e6 else f"{PREFIX}{name}{{{shown}}} {value:.0f}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
