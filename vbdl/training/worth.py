"""Whether compiling a training step repays its time, estimated from the graph and the number of steps alone.

No clock decides: a training that is repeated, or resumed from a checkpoint, runs the same code and gives the same bits.
"""

from torch import fx

from vbdl.compiling.compiler import can_compile
from vbdl.compiling.graph import flops_of, operator_of, own_bytes

# A trace takes about as long as some hundred steps save by running the graph instead of the Python code.
_STEPS_WORTH_TRACING = 300
_STEPS_OF_A_CARD = 4000  # steps that repay compiling where kernels are launched on a device
# Estimated from a few cells on one core of a server processor: what compiling takes, and what a step then saves.
_SECONDS, _SECONDS_PER_OPERATION = 2.0, 0.015
_SAVED_PER_OPERATION = 3e-6  # seconds: the call of an operator from Python
_SAVED_PER_BYTE = 1e-10  # seconds: a value between two elementwise operations that is not written and read


def is_worth_tracing(steps: int) -> bool:
    """Whether so many steps repay tracing them."""
    return steps >= _STEPS_WORTH_TRACING


def is_worth_compiling(graph: fx.GraphModule, steps: int) -> bool:
    """Whether so many steps of a traced graph repay compiling it; False if there is no C++ compiler."""
    operations = [n for n in graph.graph.nodes if operator_of(n) is not None]
    if any(n.meta["val"].is_cuda for n in graph.graph.nodes if n.op == "placeholder"):
        return steps >= _STEPS_OF_A_CARD and can_compile()
    fused = [n for n in operations if not flops_of(n)]
    saved = _SAVED_PER_OPERATION * len(operations) + _SAVED_PER_BYTE * sum(own_bytes(n) for n in fused)
    cost = _SECONDS + _SECONDS_PER_OPERATION * len(operations)
    return steps * saved > cost and can_compile()
