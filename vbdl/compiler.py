"""The one file that compiles.

Graphs arrive traced, at fixed shapes, so they go to Inductor as they are: no second capture, no guards to check in
every call, and no cache shared between predictors that could fill up.
"""

import logging
import threading
from collections.abc import Callable

import torch
from torch import Tensor, fx

logger = logging.getLogger("vbdl")
_said = threading.Event()


def compile_graph(graph: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., list[Tensor]]:
    """The graph as one compiled call at the shapes of these inputs; the graph itself where nothing can compile it."""
    import torch._inductor

    try:
        with torch.no_grad():
            return torch._inductor.compile(graph, list(inputs))  # type: ignore[return-value]
    except Exception as error:
        if not _no_compiler(error):
            raise
        if not _said.is_set():
            _said.set()
            logger.warning(
                "no C++ compiler was found, so predictions run uncompiled: same numbers, slower. "
                "Install g++ (or clang++), or set CXX, and start again."
            )
        return graph


def compile_function(function: Callable) -> Callable:
    """A training step, captured and compiled when first called, again for another batch size."""
    return torch.compile(function, fullgraph=True, dynamic=False)


def can_compile() -> bool:
    """Whether a C++ compiler that Inductor can use is there."""
    from torch._inductor import cpp_builder

    try:
        cpp_builder.get_cpp_compiler()
    except Exception:
        return False
    return True


def _no_compiler(error: BaseException | None) -> bool:
    while error is not None:
        if type(error).__name__ == "InvalidCxxCompiler" or "InvalidCxxCompiler" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
