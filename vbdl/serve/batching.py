"""Batching of requests: a bounded queue with deadlines, and a thread that computes batches.

Requests that arrive while a batch is computed form the next one, so an idle service adds no wait and a busy one
batches by itself. `batch_wait` lets the first request of a batch also wait for others.

If a tile takes less than two milliseconds and nothing else is being computed, the requests of one turn of the event
loop are computed on the loop itself, because handing them to the thread and back would take longer.
"""

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TypeVar

import torch
from torch import Tensor

from vbdl.calling.inputs import rebuild, tensors
from vbdl.engine.predictor import Predictor
from vbdl.serve.limits import Gone, Limits, Refused
from vbdl.serve.metrics import Metrics
from vbdl.types import Inputs, Keywords, Prediction

QUICK = 0.002  # seconds that a tile may block the event loop
PATIENCE = 0.005  # seconds until a request starts to watch for its client leaving: most are answered by then
_SHARE = 0.8  # share of a deadline for computing; the rest is for sending the answer
_log = logging.getLogger(__name__)
_Prediction = TypeVar("_Prediction", bound=Prediction)


@dataclasses.dataclass(eq=False)
class _Job:
    inputs: Inputs
    rows: int
    deadline: float  # on the clock of time.monotonic
    anytime: bool  # whether the deadline may be met with fewer draws
    future: asyncio.Future
    loop: asyncio.AbstractEventLoop
    arrived: float
    dropped: bool = False


class Batcher:
    """A queue of requests for one predictor, computed in batches; coroutines of any event loop may use it."""

    def __init__(self, predict: Predictor, limits: Limits, metrics: Metrics, anytime: bool = False):
        """anytime: whether `predict` takes a deadline in seconds and meets it with fewer draws."""
        self._predict, self._limits, self._metrics, self._anytime = predict, limits, metrics, anytime
        self._tile = max(predict.tiles)
        self._waiting: deque[_Job] = deque()
        self._rows = 0  # rows that wait or are being computed
        self._busy = 0.01  # running mean of the seconds of a batch, for Retry-After
        self._tile_busy = 0.01  # the same for batches of at most one tile
        self._changed = threading.Condition()
        self._closed = False
        self._computing = False
        self._planned = False  # whether the event loop computes the waiting rows in its next turn
        self._thread = threading.Thread(target=self._work, name="vbdl-serve", daemon=True)
        self._thread.start()

    async def predict(
        self,
        inputs: Inputs,
        rows: int,
        deadline: float,
        anytime: bool,
        receive: Callable[[], Awaitable[object]] | None = None,
    ) -> Prediction:
        """Return the prediction of these rows.

        deadline: on the clock of time.monotonic. anytime: whether the deadline may be met with fewer draws.
        receive: returns when the client has left.
        Raises Refused if the queue is full or the deadline has passed, and Gone if the client has left; the rows are
        then not computed unless a batch with them has begun.
        """
        loop = asyncio.get_running_loop()
        job = _Job(inputs, rows, deadline, anytime and self._anytime, loop.create_future(), loop, time.monotonic())
        self._enter(job)
        late = loop.call_later(max(0.0, deadline - job.arrived), _fail, job.future, _Late)
        watch = _Watch(job.future, receive, loop) if receive is not None else None
        try:
            return await job.future
        except _Late:
            raise Refused(504, "deadline", "the deadline passed before there was a prediction") from None
        finally:
            job.dropped = True  # answered, too late, or its client has left: must not be computed any more
            late.cancel()
            if watch is not None:
                watch.end()

    def _enter(self, job: _Job) -> None:
        with self._changed:
            if self._closed:
                raise Refused(503, "closing", "the service is shutting down", retry_after=5)
            if self._rows + job.rows > self._limits.queue_rows:
                batches = self._rows / self._limits.batch_rows + 1
                wait = max(1, round(batches * self._busy))
                raise Refused(503, "busy", f"{self._rows} rows wait already; try again in {wait} s", retry_after=wait)
            self._rows += job.rows
            self._waiting.append(job)
            if self._planned:
                return
            quick = self._tile_busy < QUICK and job.rows <= self._tile and not job.anytime
            if quick and not self._computing and len(self._waiting) == 1 and self._limits.batch_wait == 0:
                self._planned = True
                job.loop.call_soon(self._at_once)
            else:
                self._changed.notify()

    @property
    def rows(self) -> int:
        """The number of rows that wait or are being computed."""
        return self._rows

    def close(self, seconds: float = 10.0) -> None:
        """Refuse new requests, answer those that wait, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(seconds)

    def _work(self) -> None:
        """Compute one batch after the other until the batcher is closed; the thread runs this."""
        while True:
            with self._changed:
                while (not self._waiting or self._planned) and not self._closed:
                    self._changed.wait()
                if not self._waiting:
                    return
                batch = self._gather(self._limits.batch_rows)
                self._computing = True
            self._finish(batch)

    def _at_once(self) -> None:
        """Compute one tile of the waiting rows on the event loop; the thread computes the others."""
        with self._changed:
            self._planned = False
            if self._computing or not self._waiting:
                return
            batch = self._gather(self._tile)
            self._computing = True
        self._finish(batch)
        with self._changed:
            if self._waiting:
                self._changed.notify()

    def _finish(self, batch: list[_Job]) -> None:
        answers = self._compute(batch)
        with self._changed:  # before the answers, so that a client with an answer sees the queue without its rows
            self._computing = False
            self._rows -= sum(job.rows for job in batch)
        for job, answer in answers:
            self._answer(job, answer)

    def _gather(self, limit: int) -> list[_Job]:
        """Take the next batch of at most `limit` rows; wait for more requests as long as batch_wait allows."""
        wait = self._limits.batch_wait
        while wait > 0 and not self._closed and sum(job.rows for job in self._waiting) < limit:
            left = self._waiting[0].arrived + wait - time.monotonic()
            if left <= 0 or not self._changed.wait(left):
                break
        batch = [self._waiting.popleft()]
        rows = batch[0].rows
        # a request that allows fewer draws is computed alone: other requests do not allow them
        while self._waiting and rows + self._waiting[0].rows <= limit:
            if batch[0].anytime or self._waiting[0].anytime or not _alike(batch[0].inputs, self._waiting[0].inputs):
                break
            batch.append(self._waiting.popleft())
            rows += batch[-1].rows
        return batch

    def _compute(self, batch: list[_Job]) -> list[tuple[_Job, Prediction | Exception]]:
        """Compute the jobs whose clients still wait; returns each with its prediction or an exception."""
        now = time.monotonic()
        live = [job for job in batch if not job.dropped and job.deadline > now]
        if not live:
            return []
        try:
            joined = live[0].inputs
            if len(live) > 1:
                columns = zip(*(tensors(job.inputs) for job in live), strict=True)
                joined = rebuild(joined, [torch.cat(column) for column in columns])
            options: Keywords = {"deadline": _SHARE * (live[0].deadline - now)} if live[0].anytime else {}
            prediction = self._predict(joined, **options)
        except Exception as error:
            if len(live) > 1:  # one job is the cause: compute each alone, so that the others succeed
                return [answer for job in live for answer in self._compute([job])]
            if isinstance(error, ValueError | IndexError):
                return [(live[0], Refused(422, "not_predictable", str(error)[:500]))]
            _log.exception("a prediction failed")
            return [(live[0], Refused(503, "failed", "the prediction failed; see the log", retry_after=5))]
        took, rows = time.monotonic() - now, sum(job.rows for job in live)
        self._busy += 0.1 * (took - self._busy)
        if rows <= self._tile:
            self._tile_busy += 0.1 * (took - self._tile_busy)
        self._metrics.batch(rows, took)
        if len(live) == 1:
            return [(live[0], prediction)]
        ends = list(itertools.accumulate(job.rows for job in live))
        return [(job, rows_of(prediction, end - job.rows, end)) for job, end in zip(live, ends, strict=True)]

    def _answer(self, job: _Job, answer: object) -> None:
        if threading.get_ident() != self._thread.ident and job.loop is asyncio.get_running_loop():
            _settle(job.future, answer)
            return
        with contextlib.suppress(RuntimeError):  # the event loop has ended, so nobody waits
            job.loop.call_soon_threadsafe(_settle, job.future, answer)


class _Late(Exception):
    """Raised when the deadline of a job has passed."""


class _Watch:
    """Fails a future with Gone when the client leaves, once it has waited for long enough to be worth a task."""

    def __init__(
        self, future: asyncio.Future, receive: Callable[[], Awaitable[object]], loop: asyncio.AbstractEventLoop
    ):
        self._future, self._receive, self._task = future, receive, None
        self._timer = loop.call_later(PATIENCE, self._begin)

    def _begin(self) -> None:
        self._task: asyncio.Task | None = asyncio.ensure_future(self._look())

    async def _look(self) -> None:
        await self._receive()
        _fail(self._future, Gone)

    def end(self) -> None:
        self._timer.cancel()
        if self._task is not None:
            self._task.cancel()


def _fail(future: asyncio.Future, kind: type[Exception]) -> None:
    _settle(future, kind())


def _settle(future: asyncio.Future, answer: object) -> None:
    if future.done():
        return
    if isinstance(answer, Exception):
        future.set_exception(answer)
    else:
        future.set_result(answer)


def rows_of(prediction: _Prediction, start: int, stop: int) -> _Prediction:
    """The rows [start, stop) of a prediction; the first axis of each of its tensors is the batch."""
    values = {field.name: vars(prediction)[field.name] for field in dataclasses.fields(prediction)}
    rows = {name: value[start:stop] for name, value in values.items() if isinstance(value, Tensor)}
    return dataclasses.replace(prediction, **rows)


def _alike(a: Inputs, b: Inputs) -> bool:
    """Whether two inputs have rows of the same shapes, so that they can be computed in one batch."""
    return [t.shape[1:] for t in tensors(a)] == [t.shape[1:] for t in tensors(b)]
