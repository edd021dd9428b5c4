"""Whether and when to compile a training step, estimated from the graph and the number of steps alone.

No clock decides: a training that is repeated, or resumed from a checkpoint, runs the same code and gives the same bits.
"""

import math

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
# A step beside the compiler: after each operation it waits for the interpreter, which the compiler holds half the time.
_SECONDS_BESIDE = 1.5e-5
_SECONDS_PER_FLOP = 2.5e-11


def is_worth_tracing(steps: int) -> bool:
    """Whether so many steps repay tracing them."""
    return steps >= _STEPS_WORTH_TRACING


def steps_until_compiled(graph: fx.GraphModule, steps: int, runs: int = 1) -> int | None:
    """The number of steps that run while a traced step is compiled; None if so many steps do not repay compiling it.

    steps: of the whole training, each of so many runs of the graph. None too if there is no C++ compiler.
    """
    operations = [n for n in graph.graph.nodes if operator_of(n) is not None]
    flops = [flops_of(n) for n in operations]
    moved = sum(own_bytes(n) for n, of_product in zip(operations, flops, strict=True) if not of_product)
    saved = _SAVED_PER_OPERATION * len(operations) + _SAVED_PER_BYTE * moved
    cost = _SECONDS + _SECONDS_PER_OPERATION * len(operations)
    beside = _SECONDS_BESIDE * len(operations) + 2 * _SAVED_PER_BYTE * moved + _SECONDS_PER_FLOP * sum(flops)
    until = math.ceil(cost / (runs * beside))
    if any(n.meta["val"].is_cuda for n in graph.graph.find_nodes(op="placeholder")):
        worth = steps >= _STEPS_OF_A_CARD + until
    else:
        worth = (steps - until) * runs * saved > cost
    return until if worth and can_compile() else None
