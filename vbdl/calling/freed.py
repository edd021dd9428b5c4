"""Memory that is freed, by glibc: given back to the system where it would be held twice, kept where it is needed again.

glibc gives memory back when more is free at the end of its heap than twice the largest block that was ever mapped and
freed. A graph of all draws frees several times its largest value after every call, and the next call waits for the
system to map and clear the same pages: a third of its time for a TCN of 32 rows.
"""

import ctypes
import functools
import sys
from collections.abc import Callable

import torch

_BLOCK = 2**24 - 2**16  # bytes; freeing it lets glibc keep twice as much; it counts blocks of up to 32 MiB


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


@functools.cache
def keep() -> None:
    """Let the process keep what predictions free, from now on, up to 32 MiB.

    A block that is freed without being written to raises glibc's limit, as any tensor of that size does. Variables such
    as MALLOC_TRIM_THRESHOLD_ fix the limit, and then nothing changes.
    """
    torch.UntypedStorage(_BLOCK)
