"""Freed memory that glibc keeps for itself, given back to the system."""

import ctypes
import functools
import sys
from collections.abc import Callable


@functools.cache
def _trim() -> Callable[[int], int] | None:
    """The function `malloc_trim` of glibc, or None elsewhere."""
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def give_back() -> None:
    """Give freed memory back to the system, if the process allocates by glibc.

    It does not reuse freed blocks that are aligned (before 2.38), so that tensors which replace others of other sizes
    would take memory beside them.
    """
    if (trim := _trim()) is not None:
        trim(0)
