"""Requests computed together: one thread, a bounded queue, deadlines.

While a batch is computed the next one gathers, so that an idle service adds no wait and a busy one batches by itself;
`batch_wait` lets the first request of a batch wait for others on top of that.
"""

import asyncio
import contextlib
import dataclasses
import inspect
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vbdl.serve.limits import Limits, Refused
from vbdl.serve.metrics import Metrics
from vbdl.stacking import rebuild, tensors
from vbdl.types import Inputs

_log = logging.getLogger(__name__)


@dataclasses.dataclass(eq=False)
class _Job:
    inputs: Inputs
    rows: int
    deadline: float  # of time.monotonic
    anytime: bool  # whether fewer draws are better than none in time
    future: asyncio.Future
    loop: asyncio.AbstractEventLoop
    arrived: float
    dropped: bool = False


class Batcher:
    """Predictions of a predictor, for coroutines of any loop."""

    def __init__(self, predict: Callable[..., Any], limits: Limits, metrics: Metrics):
        self._predict, self._limits, self._metrics = predict, limits, metrics
        self._anytime = "deadline" in inspect.signature(predict).parameters
        self._waiting: deque[_Job] = deque()
        self._rows = 0  # that wait or are computed
        self._busy = 0.01  # seconds a batch takes, a running mean: what Retry-After is made of
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="vbdl-serve", daemon=True)
        self._thread.start()

    async def predict(self, inputs: Inputs, rows: int, deadline: float, anytime: bool) -> Any:
        """The prediction of these rows. Refused when the queue is full, or the deadline (time.monotonic) passed."""
        loop = asyncio.get_running_loop()
        job = _Job(inputs, rows, deadline, anytime and self._anytime, loop.create_future(), loop, time.monotonic())
        with self._changed:
            if self._closed:
                raise Refused(503, "closing", "the service is shutting down", retry_after=5)
            if self._rows + rows > self._limits.queue_rows:
                batches = self._rows / self._limits.batch_rows + 1
                wait = max(1, round(batches * self._busy))
                raise Refused(503, "busy", f"{self._rows} rows wait already; try again in {wait} s", retry_after=wait)
            self._rows += rows
            self._waiting.append(job)
            self._changed.notify()
        try:
            return await asyncio.wait_for(job.future, max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            raise Refused(504, "deadline", "the deadline passed before there was a prediction") from None
        finally:
            job.dropped = True  # answered, too late or nobody there: not to be computed any more

    @property
    def rows(self) -> int:
        """Rows that wait or are computed."""
        return self._rows

    def close(self, seconds: float = 10.0) -> None:
        """Finishes what waits and ends the thread; nothing new is taken."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(seconds)

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closed:
                    self._changed.wait()
                if not self._waiting:
                    return
                batch = self._gather()
            answers = self._compute(batch)
            with self._changed:  # before the answers, so that whoever has one finds the queue as it is
                self._rows -= sum(job.rows for job in batch)
            for job, answer in answers:
                self._answer(job, answer)

    def _gather(self) -> list[_Job]:
        """Jobs that fit together into a batch, waiting for more of them where that is allowed."""
        limit, wait = self._limits.batch_rows, self._limits.batch_wait
        while wait > 0 and not self._closed and sum(job.rows for job in self._waiting) < limit:
            left = self._waiting[0].arrived + wait - time.monotonic()
            if left <= 0 or not self._changed.wait(left):
                break
        batch = [self._waiting.popleft()]
        rows = batch[0].rows
        # one that may use fewer draws is computed alone: others have not asked for that
        while self._waiting and rows + self._waiting[0].rows <= limit:
            if batch[0].anytime or self._waiting[0].anytime or not _alike(batch[0].inputs, self._waiting[0].inputs):
                break
            batch.append(self._waiting.popleft())
            rows += batch[-1].rows
        return batch

    def _compute(self, batch: list[_Job]) -> list[tuple[_Job, Any]]:
        """The jobs that somebody still waits for, each with its prediction or an exception."""
        now = time.monotonic()
        live = [job for job in batch if not job.dropped and job.deadline > now]
        if not live:
            return []
        try:
            joined = live[0].inputs
            if len(live) > 1:
                columns = zip(*(tensors(job.inputs) for job in live), strict=True)
                joined = rebuild(joined, [torch.cat(column) for column in columns])
            options = {"deadline": live[0].deadline - now} if live[0].anytime else {}
            try:
                prediction = self._predict(joined, **options)
            except RuntimeError:
                if not options:
                    raise
                prediction = self._predict(joined)  # nothing was compiled for fewer draws: all of them, or 504
        except Exception as error:
            if len(live) > 1:  # one of them is the cause: the others must not suffer for it
                return [answer for job in live for answer in self._compute([job])]
            if isinstance(error, ValueError | IndexError):
                return [(live[0], Refused(422, "not_predictable", str(error)[:500]))]
            _log.exception("a prediction failed")
            return [(live[0], Refused(503, "failed", "the prediction failed; see the log", retry_after=5))]
        took = time.monotonic() - now
        self._busy += 0.1 * (took - self._busy)
        self._metrics.batch(sum(job.rows for job in live), took)
        if len(live) == 1:
            return [(live[0], prediction)]
        ends = list(itertools.accumulate(job.rows for job in live))
        return [(job, rows_of(prediction, end - job.rows, end)) for job, end in zip(live, ends, strict=True)]

    def _answer(self, job: _Job, answer: Any) -> None:
        def put() -> None:
            if job.future.done():
                return
            if isinstance(answer, Exception):
                job.future.set_exception(answer)
            else:
                job.future.set_result(answer)

        with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody waits
            job.loop.call_soon_threadsafe(put)


def rows_of(prediction: Any, start: int, stop: int) -> Any:
    """Rows [start, stop) of a prediction, every tensor of which has the batch first."""
    cut = {
        field.name: value[start:stop] if isinstance(value := getattr(prediction, field.name), Tensor) else value
        for field in dataclasses.fields(prediction)
    }
    return dataclasses.replace(prediction, **cut)


def _alike(a: Inputs, b: Inputs) -> bool:
    """Whether two inputs can be put one after the other."""
    return [t.shape[1:] for t in tensors(a)] == [t.shape[1:] for t in tensors(b)]
