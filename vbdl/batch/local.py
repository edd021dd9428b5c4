"""The engine for one machine: it reads, computes and writes at the same time, one chunk in each stage."""

import os
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch

from vbdl.batch.run import Run, Sink
from vbdl.batch.sources.source import Chunk, Source
from vbdl.batch.worker import ChunkResult, Misfit, Worker

T = TypeVar("T")


class Stopped(Exception):
    """Raised in a stage of the pipeline after another stage has ended."""


def run_local(run: Run[Sink], threads: int | None) -> None:
    """Compute every chunk that is not done in this process.

    threads: number of computing threads; all cores unless given.
    """
    job = run.job
    with _threads(threads) as count:
        worker = Worker(job, count)
        worker.compile()
        with run:
            _Pipeline(run, worker).run()


class _Pipeline:
    """A pipeline that reads chunks in one thread, computes them in the calling thread and writes results in a third.

    At most one chunk waits between two stages, so memory holds a few chunks, whatever the number of rows. A source
    that cannot be read or does not fit the model fails alone; any other error ends the run.
    """

    def __init__(self, run: Run[Sink], worker: Worker):
        self._run, self._worker = run, worker
        self._stop = threading.Event()
        self._read: _Handover[tuple[Source, Chunk | Exception]] = _Handover(self._stop)
        self._computed: _Handover[tuple[Source, Chunk, ChunkResult]] = _Handover(self._stop)
        self._errors: list[BaseException] = []
        self._misfits: set[str] = set()

    def run(self) -> None:
        reader = threading.Thread(target=self._guarded, args=(self._reading,), daemon=True)
        writer = threading.Thread(target=self._guarded, args=(self._writing,), daemon=True)
        reader.start()
        writer.start()
        try:
            self._computing()
            writer.join()
        except Stopped:
            pass
        finally:
            self._stop.set()
            reader.join()
            writer.join()
        if self._errors:
            raise self._errors[0]

    def _guarded(self, stage: Callable[[], None]) -> None:
        try:
            stage()
        except Stopped:
            pass
        except BaseException as error:  # noqa: BLE001
            self._errors.append(error)
            self._stop.set()

    def _reading(self) -> None:
        run = self._run
        for source in run.job.sources:
            is_done = lambda number, name=source.name: run.sink.is_done(name, number)
            try:
                for chunk in source.chunks(run.job.options.chunk_rows, is_done):
                    if source.name in self._misfits:
                        break
                    self._read.put((source, chunk))
            except (ValueError, OSError) as error:
                self._read.put((source, error))
        self._read.end()

    def _computing(self) -> None:
        size = self._run.job.options.chunk_rows
        for source, chunk in self._read:
            if isinstance(chunk, Exception):
                self._run.fail(source.name, chunk)
                continue
            if source.name in self._misfits:
                continue
            try:
                result = self._worker.compute(chunk)
            except ValueError as error:
                named = ValueError(f"{source.name}, rows {chunk.number * size} and after: {error}")
                if not isinstance(error, Misfit):
                    raise named from error
                self._misfits.add(source.name)
                self._run.fail(source.name, named)
                continue
            self._computed.put((source, chunk, result))
        self._computed.end()

    def _writing(self) -> None:
        for source, chunk, result in self._computed:
            self._run.write(source, chunk.number, result)


class _Handover(Generic[T]):
    """A queue of one item between two threads. Both ends raise Stopped once `stop` is set."""

    def __init__(self, stop: threading.Event):
        self._queue: queue.Queue[T | None] = queue.Queue(maxsize=1)
        self._stop = stop

    def put(self, item: T | None) -> None:
        while True:
            if self._stop.is_set():
                raise Stopped
            try:
                self._queue.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def end(self) -> None:
        """Tell the receiving thread that there are no more items."""
        self.put(None)

    def __iter__(self) -> Iterator[T]:
        while True:
            try:
                item = self._queue.get(timeout=0.1)
            except queue.Empty:
                if self._stop.is_set():
                    raise Stopped from None
                continue
            if item is None:
                return
            yield item


@contextmanager
def _threads(count: int | None) -> Iterator[int]:
    """Yield the number of computing threads; inside, torch uses one thread in each, so that threads do not compete."""
    if count is not None and count < 1:
        raise ValueError(f"workers is at least 1, got {count}")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield count or available_cores()
    finally:
        torch.set_num_threads(before)


def available_cores() -> int:
    """Return the number of cores that this process may use, or OMP_NUM_THREADS if that is smaller."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    threads = os.environ.get("OMP_NUM_THREADS", "")
    return min(cores, int(threads)) if threads.isdigit() and int(threads) > 0 else cores
