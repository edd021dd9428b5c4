"""Networks that `vmap`, a trace or a forward-mode derivative follows: contexts for them, and the reason, in words, if
one cannot be followed."""

import contextlib
import re
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

_lock = threading.Lock()
_entered = 0  # number of these contexts that are open, on all threads
_outside = False  # the flag outside them


@contextlib.contextmanager
def recorded() -> Iterator[None]:
    """A context in which `torch.compiler.is_compiling()` is true, as it is while torch.compile runs a network.

    A network may take a shortcut that depends on values (`if mask.all(): mask = None`), which neither `vmap` nor a
    trace can follow, and leave it out where a graph is made. Hugging Face's attention masks do. The numbers are the
    same up to rounding. As in torch, the answer holds for the whole process while any thread is inside.
    """
    global _entered, _outside
    with _lock:
        if not _entered:
            _outside, torch.compiler._is_compiling_flag = torch.compiler._is_compiling_flag, True
        _entered += 1
    try:
        with eagerly():
            yield
    finally:
        with _lock:
            _entered -= 1
            if not _entered:
                torch.compiler._is_compiling_flag = _outside


_eager = 0  # number of `eagerly` that are open, on all threads
_stance: Any = None  # sets torch.compile's stance back


@contextlib.contextmanager
def eagerly() -> Iterator[None]:
    """A context in which functions that torch.compile returned run as they were written.

    A network may call such a function. torch's compiler would follow what watches or replaces torch's functions, and
    neither `vmap` nor a trace follows its code. As in torch, the setting holds for the whole process while any thread
    is inside: compiled functions of other threads run as they were written too, with the same results up to rounding.
    """
    entered = _begin_eager()
    try:
        yield
    finally:
        _end_eager(entered)


def _begin_eager() -> bool:
    global _eager, _stance
    if "torch._dynamo.eval_frame" not in sys.modules:  # nobody has compiled a function
        return False
    with _lock:
        if not _eager:
            with contextlib.suppress(RuntimeError):  # a compiled function called vbdl
                _stance = torch.compiler.set_stance("force_eager")
        _eager += 1
    return True


def _end_eager(entered: bool) -> None:
    global _eager, _stance
    if not entered:
        return
    with _lock:
        _eager -= 1
        if not _eager and _stance is not None:
            _stance.__exit__(None, None, None)
            _stance = None


class FunctionMode(TorchFunctionMode):
    """A context that watches or replaces torch's functions while a network runs, `eagerly`."""

    def __enter__(self) -> Any:
        self._entered = (*getattr(self, "_entered", ()), _begin_eager())
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        *self._entered, entered = self._entered
        _end_eager(entered)


_fused = contextlib.ExitStack()  # turns the fused kernels back on
_without_fused = 0  # number of `without_fused_attention` that are open, on all threads
_this_thread = threading.local()  # `plain`: how many of them this thread has opened


@contextlib.contextmanager
def without_fused_attention() -> Iterator[None]:
    """A context in which attention and transformer layers run as plain operations.

    torch's fused kernels for them have no batching rule for `vmap` and no forward-mode derivative. For attention the
    setting holds for the whole process while any thread is inside, as in torch. For the fused path of transformer
    layers it holds for this thread alone: inside of it another thread may have nested tensors, which no other path has.
    """
    global _without_fused, _fused
    with _lock:
        if not _without_fused:
            _fused = contextlib.ExitStack()
            _fused.enter_context(sdpa_kernel(SDPBackend.MATH))
            _fused.callback(
                setattr, torch.backends.mha, "get_fastpath_enabled", torch.backends.mha.get_fastpath_enabled
            )
            torch.backends.mha.get_fastpath_enabled = _of_this_thread(torch.backends.mha.get_fastpath_enabled)
        _without_fused += 1
    _this_thread.plain = getattr(_this_thread, "plain", 0) + 1
    try:
        yield
    finally:
        _this_thread.plain -= 1
        with _lock:
            _without_fused -= 1
            if not _without_fused:
                _fused.close()


def _of_this_thread(is_enabled: Callable[[], bool]) -> Callable[[], bool]:
    """The question whether the fused path of transformer layers is enabled, answered for the thread that asks."""
    return lambda: is_enabled() and not getattr(_this_thread, "plain", 0)


def in_words(error: Exception) -> str:
    """The reason why `vmap` or a trace cannot follow a network, from the error that torch raised."""
    text = str(error).strip() or type(error).__name__
    if missing := re.search(r"atching rule (?:not implemented )?for (?:aten|torch)::(\w+)", text):
        return f"{missing[1]} cannot be mapped over members or draws"
    if any(words in text for words in (".item()", "data-dependent", "Boolean value of Tensor", "dynamic shape")):
        return "what it computes depends on values of tensors, such as an `if`, .item() or boolean indexing"
    if "randomness" in text:
        return "it draws from torch's generator, and members would share what it draws"
    return text.splitlines()[0]
