"""Counters in the text format of Prometheus, without the dependency on a client library.

https://prometheus.io/docs/instrumenting/exposition_formats/
"""

import os
import threading
from bisect import bisect_left

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)


class _Histogram:
    def __init__(self, bounds: tuple[float, ...]):
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def lines(self, name: str, labels: str) -> list[str]:
        text, total = [], 0
        for bound, count in zip((*self.bounds, "+Inf"), self.counts, strict=True):
            total += count
            text.append(f'{name}_bucket{{{labels},le="{bound}"}} {total}')
        return [*text, f"{name}_sum{{{labels}}} {self.sum:.9g}", f"{name}_count{{{labels}}} {total}"]


class Metrics:
    """The counters of one worker process. Every line names the worker, because a scrape reaches only one of them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: dict[tuple[str, int], int] = {}
        self._refused: dict[str, int] = {}
        self._seconds, self._compute, self._rows = _Histogram(_SECONDS), _Histogram(_SECONDS), _Histogram(_ROWS)
        self._epistemic, self._predicted = 0.0, 0

    def request(self, route: str, status: int, seconds: float) -> None:
        """Count an answer and the seconds that it took."""
        with self._lock:
            self._requests[route, status] = self._requests.get((route, status), 0) + 1
            if route == "predict":
                self._seconds.add(seconds)

    def refused(self, code: str) -> None:
        with self._lock:
            self._refused[code] = self._refused.get(code, 0) + 1

    def batch(self, rows: int, seconds: float) -> None:
        """Count a batch of rows that were computed together."""
        with self._lock:
            self._rows.add(rows)
            self._compute.add(seconds)

    def predicted(self, rows: int, epistemic: float) -> None:
        """Count answered rows and sum their epistemic uncertainty, whose mean drifts when the inputs drift."""
        with self._lock:
            self._predicted += rows
            self._epistemic += epistemic

    def text(self, waiting: int, ready: bool) -> str:
        me = f'worker="{os.getpid()}"'
        with self._lock:
            lines = ["# TYPE vbdl_requests_total counter"]
            lines += [
                f'vbdl_requests_total{{{me},route="{route}",status="{status}"}} {n}'
                for (route, status), n in sorted(self._requests.items())
            ]
            lines.append("# TYPE vbdl_refused_total counter")
            lines += [f'vbdl_refused_total{{{me},code="{code}"}} {n}' for code, n in sorted(self._refused.items())]
            for name, kind, value in (
                ("vbdl_rows_total", "counter", self._predicted),
                ("vbdl_epistemic_sum_total", "counter", f"{self._epistemic:.9g}"),
                ("vbdl_waiting_rows", "gauge", waiting),
                ("vbdl_ready", "gauge", int(ready)),
            ):
                lines += [f"# TYPE {name} {kind}", f"{name}{{{me}}} {value}"]
            for name, histogram in (
                ("vbdl_request_seconds", self._seconds),
                ("vbdl_compute_seconds", self._compute),
                ("vbdl_batch_rows", self._rows),
            ):
                lines += [f"# TYPE {name} histogram", *histogram.lines(name, me)]
        return "\n".join(lines) + "\n"
