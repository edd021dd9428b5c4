"""The one file that compiles.

Graphs arrive traced, at fixed shapes, so they go to Inductor as they are: no second capture, no guards to check in
every call, and no cache shared between predictors that could fill up.
"""

import errno
import logging
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from vbdl.compiling.replay import Replayed, is_worth_replaying

logger = logging.getLogger("vbdl")
_said = threading.Event()


def compile_graph(graph: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Sequence[Tensor]]:
    """The graph as one compiled call at the shapes of these inputs; the graph itself where nothing can compile it."""
    made: list[Any] = []

    try:
        import torch._inductor.config
        from torch._inductor.compile_fx import compile_fx, compile_fx_inner

        def inner(*args: Any, **kwargs: Any) -> Any:
            made.append(compile_fx_inner(*args, **kwargs))
            return made[-1]

        # every call has the shapes it was compiled for: what calls it sees to that, once and not in every call
        with torch.no_grad(), torch._inductor.config.patch(size_asserts=False, alignment_asserts=False):
            wrapped: Any = (
                _from_cache(graph, inputs, inner) if on_cpu(inputs) else compile_fx(graph, list(inputs), inner)
            )
            writes = any(n.target is torch.ops.aten.copy_.default for n in graph.graph.nodes)  # to what it is given
            if is_worth_replaying(graph, inputs):
                return Replayed(wrapped)
            return wrapped if writes else _without_wrappers(wrapped, made, inputs) or wrapped
    except Exception as error:
        if _no_compiler(error):
            _say("no C++ compiler was found", "Install g++ (or clang++), or set CXX, and start again.")
        elif (reason := _no_place(error)) is not None:
            _say(
                f"compiled code cannot be written ({reason})",
                "Make room, or set TORCHINDUCTOR_CACHE_DIR to a folder that can be written to, and start again.",
            )
        else:
            raise
        return graph


def _say(reason: str, advice: str) -> None:
    """Once a process, whatever the first reason is."""
    if not _said.is_set():
        _said.set()
        logger.warning("%s, so predictions run uncompiled: equal to rounding, slower. %s", reason, advice)


def _from_cache(graph: fx.GraphModule, inputs: list[Tensor], inner: Callable) -> Callable:
    """Compiled by way of Inductor's cache of graphs, which is passed by where no environment of shapes is there."""
    import torch._functorch.config
    from torch._guards import TracingContext, tracing
    from torch._inductor.compile_fx import compile_fx
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    fake = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    fixed: list[Any] = [fake.from_tensor(t, static_shapes=True) for t in inputs]
    # the other cache, of what is around the graph, makes no call of `inner`: see _without_wrappers
    with tracing(TracingContext(fake)), torch._functorch.config.patch(enable_autograd_cache=False):
        return compile_fx(graph, fixed, inner)  # type: ignore[return-value]


def on_cpu(inputs: Sequence[Tensor]) -> bool:
    return all(t.device.type == "cpu" for t in inputs)


def _without_wrappers(wrapped: Callable, made: list[Any], inputs: list[Tensor]) -> Callable | None:
    """What Inductor wrote, without the layers around it that serve gradients and mutation and cost as much as a small
    network; None where they do something: on a GPU, or where the two do not return the same."""
    direct = getattr(made[0], "current_callable", None) if len(made) == 1 else None
    if direct is None or not on_cpu(inputs):
        return None
    expected = wrapped(*inputs)
    try:
        found = direct(list(inputs))
    except Exception:  # another number or order of arguments
        return None
    same = len(found) == len(expected) and all(
        isinstance(a, Tensor) and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
        and torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(found, expected, strict=True)
    )  # fmt: skip
    return (lambda *arguments: direct(list(arguments))) if same else None


def can_compile() -> bool:
    """Whether a C++ compiler that Inductor can use is there."""
    from torch._inductor import cpp_builder

    try:
        cpp_builder.get_cpp_compiler()
    except Exception:
        return False
    return True


def _no_place(error: BaseException | None) -> str | None:
    """Why the cache of compiled code cannot be written to, or None where that is not what failed."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _CANNOT_WRITE:
            return str(error)
        for code in (errno.ENOSPC, errno.EROFS):  # said by the compiler, in a process of its own
            if os.strerror(code) in str(error):
                return os.strerror(code)
        error = error.__cause__ or error.__context__
    return None


_CANNOT_WRITE = frozenset(
    (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EISDIR)
)


def _no_compiler(error: BaseException | None) -> bool:
    while error is not None:
        if type(error).__name__ == "InvalidCxxCompiler" or "InvalidCxxCompiler" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
