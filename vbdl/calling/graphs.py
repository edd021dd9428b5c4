"""Networks that `vmap`, a trace or a forward-mode derivative follows: contexts for them, and the reason, in words, if
one cannot be followed."""

import contextlib
import re
import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import _guards
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
        yield
    finally:
        with _lock:
            _entered -= 1
            if not _entered:
                torch.compiler._is_compiling_flag = _outside


# what torch's compiler takes for the inside of a kernel, where it runs functions as they were written
_KERNEL: Any = SimpleNamespace(fake_mode=SimpleNamespace(in_kernel_invocation=True))
_TRACES = (torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY)
_UNCHANGED: Any = object()


def _set_context(context: Any) -> Any:
    """Set what torch's compiler looks at in this thread, and return what was there."""
    before = getattr(_guards._TLS, "tracing_context", None)
    _guards._TLS.tracing_context = context
    return before


class FunctionMode(TorchFunctionMode):
    """The base of torch function modes, which watch or replace torch's functions while a network runs.

    Functions that torch.compile returned, which a network may call, run as they were written inside of it: the compiler
    would follow this mode's code too. That holds for this thread.
    """

    def __enter__(self) -> Any:
        compiles = "torch._dynamo.eval_frame" in sys.modules  # somebody has compiled a function
        eager = compiles and all(torch._C._get_dispatch_mode(key) is None for key in _TRACES)
        self._before = (*getattr(self, "_before", ()), _set_context(_KERNEL) if eager else _UNCHANGED)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        *self._before, before = self._before
        if before is not _UNCHANGED:
            _set_context(before)


@contextlib.contextmanager
def in_no_kernel() -> Iterator[None]:
    """Hide from torch's tracer what a `FunctionMode` around the trace has set for torch's compiler."""
    before = _set_context(None) if getattr(_guards._TLS, "tracing_context", None) is _KERNEL else _UNCHANGED
    try:
        yield
    finally:
        if before is not _UNCHANGED:
            _set_context(before)


_fused = contextlib.ExitStack()  # turns the fused kernels back on
_without_fused = 0  # number of `without_fused_attention` that are open, on all threads
_this_thread = threading.local()  # `plain`: how many of them this thread has opened


class _OfThisThread:
    """The setting whether the fused path of transformer layers is enabled, false in threads that trace."""

    def __init__(self, enabled: Any):
        self.enabled = enabled

    def __bool__(self) -> bool:
        return bool(self.enabled) and not getattr(_this_thread, "plain", 0)


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
            torch.backends.mha.set_fastpath_enabled(_OfThisThread(torch.backends.mha.get_fastpath_enabled()))  # type: ignore[arg-type]
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
                if isinstance(now := torch.backends.mha.get_fastpath_enabled(), _OfThisThread):  # not the user's
                    torch.backends.mha.set_fastpath_enabled(now.enabled)


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
