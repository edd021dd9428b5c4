"""The thread that compiles while predictions are already answered: one job at a time in a process."""

import atexit
import queue
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import torch

T = TypeVar("T")

_SWITCH = 0.0005  # seconds; a predicting thread waits at most about this long for the interpreter
_LEAVE = 5.0  # seconds to wait for a job when the process ends

_jobs: "queue.SimpleQueue[tuple[weakref.ref, Callable, Future[None]]]" = queue.SimpleQueue()
_lock = threading.Lock()
_worker: threading.Thread | None = None
_leaving = threading.Event()
_idle = threading.Event()  # set while no job runs
_idle.set()


def submit(owner: T, job: Callable[[T], None]) -> "Future[None]":
    """Run job(owner) in the background, unless the owner is gone by then. The future holds what the job raised."""
    global _worker
    done: Future[None] = Future()
    _jobs.put((weakref.ref(owner), job, done))
    with _lock:
        if _worker is None or not _worker.is_alive():
            _worker = threading.Thread(target=_work, name="vbdl-compiler", daemon=True)
            _worker.start()
    return done


def _work() -> None:
    torch.get_num_threads()  # applies the number of threads of the process to this thread
    while not _leaving.is_set():
        owner, job, done = _jobs.get()
        alive = owner()
        if alive is None or not done.set_running_or_notify_cancel():
            done.cancel()
            continue
        _idle.clear()
        before = sys.getswitchinterval()
        sys.setswitchinterval(min(before, _SWITCH))
        try:
            job(alive)
            done.set_result(None)
        except BaseException as error:  # the thread must not end; whoever waits for the job gets the error
            done.set_exception(error)
        finally:
            sys.setswitchinterval(before)
            _idle.set()
            del alive


def _leave() -> None:
    """Wait a while for the running job, so that the process does not end inside of the compiler."""
    _leaving.set()
    _idle.wait(_LEAVE)


atexit.register(_leave)
