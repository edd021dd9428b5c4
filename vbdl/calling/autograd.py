"""Two features of torch's autograd that would go wrong inside a call with other weights, and are plain there.

Gradient checkpointing (`torch.utils.checkpoint`) runs a block again in the backward pass. By then the drawn or stacked
weights are out of the module's places and the masks are gone: the gradient would silently be that of another network.
Inside `activations_kept` the block's activations are kept, as without checkpointing: the numbers are the same, and
memory is not saved.

Operations whose gradient is written by hand (`torch.autograd.Function`) are traced by no transform of torch. Inside
`only_forwards` their forward alone runs, as plain operations; a graph that was traced there computes the right numbers
and would have another gradient, so that it is not differentiated.
"""

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils.checkpoint as torchs
from torch.autograd import Function
from torch.autograd.function import _SingleLevelFunction


class _ThisThread(threading.local):
    keeps_activations = False
    forwards: list[str] | None = None  # names of the operations that ran forwards only


_this_thread = _ThisThread()
_lock = threading.Lock()


@contextlib.contextmanager
def activations_kept() -> Iterator[None]:
    """Inside, on this thread, checkpointed blocks keep their activations."""
    _replace_once(torchs.CheckpointFunction, _replace_checkpointing)
    before = _this_thread.keeps_activations
    _this_thread.keeps_activations = True
    try:
        yield
    finally:
        _this_thread.keeps_activations = before


@contextlib.contextmanager
def only_forwards() -> Iterator[list[str]]:
    """Inside, on this thread, operations with a handwritten gradient run forwards only; afterwards the list holds their
    names."""
    _replace_once(Function, _replace_apply)
    before = _this_thread.forwards
    _this_thread.forwards = names = []
    try:
        yield names
    finally:
        _this_thread.forwards = before


def _replace_once(owner: type, replace: Callable[[], None]) -> None:
    """Let torch's functions ask whether they are inside such a call; elsewhere they work as before. The mark lies on
    torch's class, so that they are replaced once in a process, however often this module is imported."""
    if "vbdl_asks" in vars(owner):
        return
    with _lock:
        if "vbdl_asks" not in vars(owner):
            replace()
            owner.vbdl_asks = True  # type: ignore[attr-defined]


def _replace_checkpointing() -> None:
    """Replaces what `checkpoint` uses, because networks hold `checkpoint` itself under names of their own."""
    generator, checkpointed = torchs._checkpoint_without_reentrant_generator, torchs.CheckpointFunction.apply

    def around(*args: Any, **kwargs: Any) -> Iterator[None]:
        if _this_thread.keeps_activations:
            yield
        else:
            yield from generator(*args, **kwargs)

    def apply(function: Callable, preserve: bool, *args: Any) -> Any:
        # without gradients nothing is kept anyway, and the call can be traced
        plainly = _this_thread.keeps_activations or not torch.is_grad_enabled()
        return function(*args) if plainly else checkpointed(function, preserve, *args)

    torchs._checkpoint_without_reentrant_generator = around
    torchs.CheckpointFunction.apply = apply  # type: ignore[method-assign]


def _replace_apply() -> None:
    original = inspect.getattr_static(Function, "apply")  # of Python up to torch 2.13, of C from 2.14 on

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        names = _this_thread.forwards
        if names is None or torch.is_grad_enabled():
            return original.__get__(None, cls)(*args, **kwargs)
        names.append(cls.__qualname__)
        if cls.setup_context is not _SingleLevelFunction.setup_context:
            return cls.forward(*args, **kwargs)
        return cls.forward(_Context(), *args, **kwargs)

    Function.apply = classmethod(apply)  # type: ignore[assignment]


class _Context:
    """The context of a forward without a backward: it keeps nothing."""

    needs_input_grad = ()

    def save_for_backward(self, *tensors: Any) -> None:
        pass

    save_for_forward = mark_dirty = mark_non_differentiable = save_for_backward

    def set_materialize_grads(self, value: bool) -> None:
        pass
