"""Features of torch's autograd that would fail in calls of a module with replaced weights, or without gradients.

Gradient checkpointing (`torch.utils.checkpoint`) runs a block again in the backward pass. By then the module has its
own weights back and the masks are gone, so the gradient would silently be that of another network. Inside
`activations_kept`, blocks keep their activations as without checkpointing: the numbers are the same, but no memory is
saved.

Operations with a handwritten gradient (`torch.autograd.Function`) cannot be traced by torch's transforms. Inside
`only_forwards`, just their forward runs, as plain operations. A graph traced there computes the right outputs, but its
gradient would not be the handwritten one, so it must not be differentiated.

A forward pass that computes a gradient itself (`torch.autograd.grad`, as physics-informed networks do) fails where
gradients are not enabled; `with_gradients_if_needed` runs it once more with gradients.
"""

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
import torch.utils.checkpoint as torchs
from torch._C._functorch import (
    TransformType,
    get_interpreter_stack,
    get_unwrapped,
    is_functorch_wrapped_tensor,
    is_gradtrackingtensor,
    peek_interpreter_stack,
)
from torch.autograd import Function, forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.utils._pytree import tree_map

T = TypeVar("T")


class _ThisThread(threading.local):
    """Which of the two contexts this thread is in."""

    keeps_activations = False
    forwards: list[str] | None = None  # names of the operations that ran without their gradient; None outside


_this_thread = _ThisThread()
_lock = threading.Lock()


@contextlib.contextmanager
def activations_kept() -> Iterator[None]:
    """A context in which checkpointed blocks keep their activations, on this thread."""
    _replace_once(torchs.CheckpointFunction, _replace_checkpointing)
    before = _this_thread.keeps_activations
    _this_thread.keeps_activations = True
    try:
        yield
    finally:
        _this_thread.keeps_activations = before


@contextlib.contextmanager
def only_forwards() -> Iterator[list[str]]:
    """A context in which operations with a handwritten gradient run only their forward, on this thread.

    Yields a list, to which the names of these operations are added.
    """
    _replace_once(Function, _replace_apply)
    before = _this_thread.forwards
    _this_thread.forwards = names = []
    try:
        yield names
    finally:
        _this_thread.forwards = before


def with_gradients_if_needed(run: Callable[[], T]) -> T:
    """Call a function, again with gradients enabled if it computes a gradient itself; return its result, detached."""
    try:
        return run()
    except RuntimeError as error:
        if torch.is_grad_enabled() or "does not require grad" not in str(error):  # torch.autograd.grad's own error
            raise
    with torch.enable_grad():
        return tree_map(lambda t: t.detach() if isinstance(t, torch.Tensor) else t, run())


def innermost_is_forward_mode() -> bool:
    """Return whether the innermost transform of torch.func on this thread is a forward-mode product."""
    innermost = peek_interpreter_stack()
    return innermost is not None and innermost.key() == TransformType.Jvp


def is_differentiated() -> bool:
    """Return whether a transform of torch.func that differentiates is active on this thread."""
    return not {TransformType.Jvp, TransformType.Grad}.isdisjoint(_transforms())


def is_pushed_once() -> bool:
    """Return whether the innermost transform on this thread is a forward-mode product, and no other differentiates."""
    keys = _transforms()
    return innermost_is_forward_mode() and keys.count(TransformType.Jvp) == 1 and TransformType.Grad not in keys


def _transforms() -> list[TransformType]:
    return [interpreter.key() for interpreter in get_interpreter_stack() or ()]


def holds_tangent(tensor: torch.Tensor) -> bool:
    """Whether a tensor has a tangent of forward-mode differentiation, also inside the wrappers of `vmap`.

    torch's custom operators lose it without a word.
    """
    if forward_ad._current_level < 0:  # of any thread
        return False
    while is_functorch_wrapped_tensor(tensor) and not is_gradtrackingtensor(tensor):
        tensor = get_unwrapped(tensor)
    return forward_ad.unpack_dual(tensor).tangent is not None


def is_transformed(tensor: torch.Tensor) -> bool:
    """Whether a transform of torch.func maps or differentiates a tensor, or it has a tangent of forward mode."""
    return is_functorch_wrapped_tensor(tensor) or holds_tangent(tensor)


def _replace_once(owner: type, replace: Callable[[], None]) -> None:
    """Replace torch's functions once by ones that look at `_this_thread`; outside the contexts they work as before.

    The class `owner` of torch is marked, so that they are replaced once per process even if this module is imported
    twice.
    """
    if "vbdl_asks" in vars(owner):
        return
    with _lock:
        if "vbdl_asks" not in vars(owner):
            replace()
            owner.vbdl_asks = True  # type: ignore[attr-defined]


def _replace_checkpointing() -> None:
    """Replace the functions that `checkpoint` calls; networks may have imported `checkpoint` itself already."""
    generator, checkpointed = torchs._checkpoint_without_reentrant_generator, torchs.CheckpointFunction.apply

    def around(*args, **kwargs) -> Iterator[None]:
        if _this_thread.keeps_activations:
            yield
        else:
            yield from generator(*args, **kwargs)

    def apply(function: Callable, preserve: bool, *args: object) -> object:
        # without gradients there are no activations to keep, and a plain call can be traced
        plainly = _this_thread.keeps_activations or not torch.is_grad_enabled()
        return function(*args) if plainly else checkpointed(function, preserve, *args)

    torchs._checkpoint_without_reentrant_generator = around
    torchs.CheckpointFunction.apply = apply  # type: ignore[method-assign]


def _replace_apply() -> None:
    """Replace `Function.apply` by one that runs just the forward inside `only_forwards`."""
    original = inspect.getattr_static(Function, "apply")  # a Python function up to torch 2.13, in C from 2.14 on

    def apply(cls: type[Function], *args, **kwargs) -> object:
        names = _this_thread.forwards
        if names is None or torch.is_grad_enabled():
            return original.__get__(None, cls)(*args, **kwargs)
        names.append(cls.__qualname__)
        if cls.setup_context is not _SingleLevelFunction.setup_context:
            return cls.forward(*args, **kwargs)
        return cls.forward(_Context(), *args, **kwargs)

    Function.apply = classmethod(apply)  # type: ignore[assignment]


class _Context:
    """A stand-in for the context of a torch.autograd.Function whose backward never runs: it saves nothing."""

    needs_input_grad = ()

    def save_for_backward(self, *tensors: object) -> None:
        pass

    save_for_forward = mark_dirty = mark_non_differentiable = save_for_backward

    def set_materialize_grads(self, value: bool) -> None:
        pass
