"""Memory that one prediction frees stays with the process, so that the next prediction does not fault it in again.

glibc gives memory back to the system when more is free at the end of its heap than twice the largest block that was
ever mapped and freed. A graph of all draws frees several times its largest value after every call, and the next call
waits for the system to map and clear the same pages: a third of its time for a TCN of 32 rows. Freeing one block of the
largest size that glibc counts, which is never written to, raises the limit to 64 MiB, as any tensor of that size does
that a program frees. Variables such as MALLOC_TRIM_THRESHOLD_ fix the limit, and then nothing changes.
"""

import functools

import torch

_LARGEST = 2**25 - 2**16  # bytes; glibc counts blocks of up to 32 MiB, its own header and whole pages included


@functools.cache
def keep() -> None:
    """Let the process keep what predictions free, from now on."""
    torch.UntypedStorage(_LARGEST)
