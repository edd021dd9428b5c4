"""The engine of one machine: rows are read, computed and written at the same time, a chunk at each stage."""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

from vbdl.batch.sources import Chunk, Source
from vbdl.batch.worker import Misfit, Result, Worker

_DONE = object()


class Stopped(Exception):
    """Another stage has ended."""


def run(
    worker: Worker,
    sources: list[Source],
    done: Callable[[str, int], bool],
    write: Callable[[Source, Chunk, Result], None],
    failed: Callable[[Source, Exception], None],
    size: int,
) -> None:
    """Every chunk that is not done: read in one thread, computed in this one, written in a third.

    At most one chunk waits between two stages, so that memory holds a few chunks, however many rows there are.
    An error of a source, or that it does not fit the model, is given to `failed`, and the next source is read; any
    other ends the run.
    """
    read: queue.Queue[Any] = queue.Queue(maxsize=1)
    written: queue.Queue[Any] = queue.Queue(maxsize=1)
    stop = threading.Event()
    errors: list[BaseException] = []
    unfit: set[str] = set()

    def reading() -> None:
        for source in sources:
            try:
                for chunk in source.chunks(size, lambda number, s=source: done(s.name, number)):
                    if source.name in unfit:
                        break
                    _put(read, (source, chunk), stop)
            except (ValueError, OSError) as error:
                _put(read, (source, error), stop)
        _put(read, _DONE, stop)

    def writing() -> None:
        for source, chunk, result in _items(written, stop):
            write(source, chunk, result)

    def guarded(stage: Callable[[], None]) -> None:
        try:
            stage()
        except Stopped:
            pass
        except BaseException as error:  # noqa: BLE001
            errors.append(error)
            stop.set()

    threads = [threading.Thread(target=guarded, args=(stage,), daemon=True) for stage in (reading, writing)]
    for thread in threads:
        thread.start()
    try:
        for source, found in _items(read, stop):
            if isinstance(found, Exception):
                failed(source, found)
                continue
            if source.name in unfit:
                continue
            try:
                result = worker.compute(found)
            except ValueError as error:
                said = ValueError(f"{source.name}, rows {found.number * size} and after: {error}")
                if not isinstance(error, Misfit):
                    raise said from error
                unfit.add(source.name)
                failed(source, said)
                continue
            _put(written, (source, found, result), stop)
        _put(written, _DONE, stop)
        threads[1].join()
    except Stopped:
        pass
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]


def _put(q: queue.Queue, item: Any, stop: threading.Event) -> None:
    while True:
        if stop.is_set():
            raise Stopped
        try:
            q.put(item, timeout=0.1)
            return
        except queue.Full:
            continue


def _items(q: queue.Queue, stop: threading.Event) -> Iterator[Any]:
    while True:
        try:
            item = q.get(timeout=0.1)
        except queue.Empty:
            if stop.is_set():
                raise Stopped from None
            continue
        if item is _DONE:
            return
        yield item
