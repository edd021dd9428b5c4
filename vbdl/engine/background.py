"""The thread that compiles while predictions are already answered: one job at a time in a process."""

import _thread
import atexit
import ctypes
import os
import queue
import sys
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import torch

T = TypeVar("T")

_SWITCH = 0.0005  # seconds; a predicting thread waits at most about this long for the interpreter
_DELAY = 0.01  # seconds from a request to the beginning of its job, in which the prediction that made it returns
_JOIN = 10.0  # seconds to wait for the thread to end after its last job
_ASK, _LEAVE = 0.1, 60.0  # seconds from one request to end a job to the next when the process ends, and at most

_jobs: "queue.SimpleQueue[tuple[weakref.ref, Callable, Future[None], float] | None]" = queue.SimpleQueue()
_lock = threading.Lock()
_worker: "_Worker | None" = None
_leaving = threading.Event()
_idle = threading.Event()  # set while no job runs
_idle.set()


def submit(owner: T, job: Callable[[T], None]) -> "Future[None]":
    """Run job(owner) in the background, unless the owner is gone by then. The future holds what the job raised."""
    global _worker
    done: Future[None] = Future()
    _jobs.put((weakref.ref(owner), job, done, time.monotonic() + _DELAY))
    with _lock:
        if _worker is None or not _worker.is_alive():
            _worker = _Worker()
    return done


class _Worker:
    """Runs the jobs in a thread, and returns before that has begun, which takes longer than a small network."""

    def __init__(self) -> None:
        self._process, self._ended = os.getpid(), threading.Event()
        self.ident = _thread.start_new_thread(self._run, ())

    def _run(self) -> None:
        threading.current_thread().name = "vbdl-compiler"
        try:
            _work()
        finally:
            self._ended.set()

    def is_alive(self) -> bool:
        """Return whether the thread runs in this process, which may be a fork of the one that began it."""
        return self._process == os.getpid() and not self._ended.is_set()

    def join(self, timeout: float) -> None:
        """Wait until the thread ends; timeout: seconds, at most."""
        self._ended.wait(timeout)


def _work() -> None:
    while not _leaving.is_set():
        if (submitted := _jobs.get()) is None:
            return
        owner, job, done, begin = submitted
        _leaving.wait(max(0.0, begin - time.monotonic()))
        torch.get_num_threads()  # applies the number of threads of the process to this thread
        alive = owner()
        if alive is None or _leaving.is_set() or not done.set_running_or_notify_cancel():
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


class _Leaving(BaseException):
    """Raised in the thread to end its job."""


def _leave() -> None:
    """End the running job when the process ends: a thread that Python stops inside of C++ code aborts the process."""
    _leaving.set()
    print_unraisable = sys.unraisablehook  # in a callback the request is lost, and Python would print it

    def without_requests(unraisable: "sys.UnraisableHookArgs") -> None:
        if unraisable.exc_type is not _Leaving:
            print_unraisable(unraisable)

    sys.unraisablehook = without_requests
    waited = 0.0
    while _worker is not None and _worker.is_alive() and not _idle.wait(_ASK) and waited < _LEAVE:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(_worker.ident), ctypes.py_object(_Leaving))
        waited += _ASK
    if _worker is not None and _idle.is_set():  # it may still free what the job held, in C++ code
        _jobs.put(None)
        _worker.join(_JOIN)


atexit.register(_leave)
