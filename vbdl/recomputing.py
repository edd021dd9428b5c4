"""Gradient checkpointing inside a call with other weights, where recomputing would take the module's own.

`torch.utils.checkpoint` runs a block again in the backward pass. By then the drawn or stacked weights are out of the
module's places and the masks are gone: the gradient would silently be that of another network. Inside such a call the
block's activations are kept, as without checkpointing; the numbers are the same and memory is not saved.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils.checkpoint as torchs

_here = threading.local()
_lock = threading.Lock()


@contextlib.contextmanager
def activations_kept() -> Iterator[None]:
    """Inside, on this thread, checkpointed blocks keep their activations."""
    _install()
    depth = getattr(_here, "depth", 0)
    _here.depth = depth + 1
    try:
        yield
    finally:
        _here.depth = depth


def _install() -> None:
    """Let torch's two ways of checkpointing ask whether they are inside such a call; elsewhere they are as they were.

    Networks hold `checkpoint` itself under names of their own, so that what it uses is replaced.
    """
    if "vbdl_asks" in vars(torchs.CheckpointFunction):
        return
    with _lock:
        if "vbdl_asks" in vars(torchs.CheckpointFunction):
            return
        torchs._checkpoint_without_reentrant_generator = _asking(torchs._checkpoint_without_reentrant_generator)
        kept = torchs.CheckpointFunction.apply

        def apply(function: Callable, preserve: bool, *args: Any) -> Any:
            plainly = getattr(_here, "depth", 0) or not torch.is_grad_enabled()  # nothing is kept then, and traces
            return function(*args) if plainly else kept(function, preserve, *args)

        torchs.CheckpointFunction.apply = apply  # type: ignore[method-assign]
        torchs.CheckpointFunction.vbdl_asks = True  # type: ignore[attr-defined]


def _asking(generator: Callable[..., Iterator[None]]) -> Callable[..., Iterator[None]]:
    def around(*args: Any, **kwargs: Any) -> Iterator[None]:
        if getattr(_here, "depth", 0):
            yield
        else:
            yield from generator(*args, **kwargs)

    return around
