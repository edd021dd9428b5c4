"""Operations whose gradient is written by hand (`torch.autograd.Function`), in predictions, which need none.

No transform of torch traces them. While a prediction is traced only their forward runs, as plain operations; what was
traced then computes the right numbers and would have another gradient, so that it is not differentiated.
"""

import contextlib
import inspect
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd import Function
from torch.autograd.function import _SingleLevelFunction

_here = threading.local()
_lock = threading.Lock()


@contextlib.contextmanager
def only_forwards() -> Iterator[list[str]]:
    """Inside, on this thread, such operations run forwards; their names are in the list afterwards."""
    _install()
    before = getattr(_here, "names", None)
    _here.names = names = []
    try:
        yield names
    finally:
        _here.names = before


def _install() -> None:
    """Let `Function.apply` ask whether it is inside; elsewhere it is as it was."""
    if "vbdl_asks" in vars(Function):
        return
    with _lock:
        if "vbdl_asks" in vars(Function):
            return
        plain = inspect.getattr_static(Function, "apply")  # of Python up to torch 2.13, of C from 2.14 on

        def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
            names = getattr(_here, "names", None)
            if names is None or torch.is_grad_enabled():
                return plain.__get__(None, cls)(*args, **kwargs)
            names.append(cls.__qualname__)
            if cls.setup_context is not _SingleLevelFunction.setup_context:
                return cls.forward(*args, **kwargs)
            return cls.forward(_Context(), *args, **kwargs)

        Function.apply = classmethod(apply)  # type: ignore[assignment]
        Function.vbdl_asks = True  # type: ignore[attr-defined]


class _Context:
    """What a forward keeps for a backward that does not come."""

    needs_input_grad = ()

    def save_for_backward(self, *tensors: Any) -> None:
        pass

    save_for_forward = mark_dirty = mark_non_differentiable = save_for_backward

    def set_materialize_grads(self, value: bool) -> None:
        pass
