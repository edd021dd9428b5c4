"""The replay of small calls on a GPU as CUDA graphs, for calls whose kernels take longer to launch than to run.

A call is recorded the second time it is made. An argument that was the same tensor both times (weights, kept masks) is
read in place; the others are copied into the recording's buffers. Outputs are copied out of the recording, so a later
call does not change a result that was already returned.
"""

import logging
import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx
from vbdl_kernels import flops as flops  # importing it registers flop counts for the operators
from vbdl_kernels import regime

from vbdl.compiling.graph import Region, operator_of, own_bytes

logger = logging.getLogger("vbdl")
_COPIED = 2**24  # the most bytes of arguments to copy in every call; with more, replaying does not pay
_RECORDINGS = 4  # the most recordings of one call, each of which costs some milliseconds; then it runs unrecorded

Recorder = Callable[[Callable[..., Sequence[Tensor]], list[Tensor]], tuple[Callable[[], None], Sequence[Tensor]]]


def is_worth_replaying(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> bool:
    """True if a graph runs on one GPU, writes to none of its arguments and is estimated to be bound by launches."""
    nodes = [n for n in graph.graph.nodes if n.op == "call_function"]
    if not inputs or any(not t.is_cuda for t in inputs) or len({t.device for t in inputs}) > 1:
        return False
    if any(n.target is torch.ops.aten.copy_.default for n in nodes):
        return False
    return is_bound_by_launches(graph, inputs)


def is_bound_by_launches(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> bool:
    """True if launching the graph's kernels is estimated to take longer than running them, by `vbdl_kernels.regime`."""
    nodes = [n for n in graph.graph.nodes if n.op == "call_function"]
    work = Region(graph, [], [], nodes).flops()
    moved = sum(t.numel() * t.element_size() for t in inputs) + 2 * sum(own_bytes(n) for n in nodes)
    # one kernel for each product and vbdl operator, and about one for the pointwise operations between two of them
    operators = [operator for n in nodes if (operator := operator_of(n)) is not None]
    unfused = sum(operator.namespace == "vbdl" or operator in _PRODUCTS for operator in operators)
    return regime.is_launch_bound(work, moved, 2 * unfused + 1)


_aten = torch.ops.aten
_PRODUCTS = {_aten.mm.default, _aten.bmm.default, _aten.addmm.default, _aten.baddbmm.default, _aten.convolution.default}


class Replayed:
    """A compiled call that is recorded as a CUDA graph and replayed.

    Thread-safe: one thread at a time records and replays. record: makes the recording (for tests, without a GPU).
    """

    def __init__(self, call: Callable[..., Sequence[Tensor]], record: "Recorder | None" = None):
        self._call, self._record = call, record or _record
        self._lock = threading.Lock()
        self._before: list[Tensor] | None = None  # arguments of the first call
        self._on = 0  # the CUDA stream of the first call
        self._fixed: list[bool] = []  # for each argument, whether it is read in place
        self._buffers: list[Tensor] = []  # the tensors that the recording reads
        self._shapes: list[tuple[torch.Size, torch.dtype]] = []  # of the call's outputs
        self._outputs: Sequence[Tensor] = ()  # the recording's outputs, one for each dtype, see `_packed`
        self._replay: Callable[[], None] | None = None
        self._left = _RECORDINGS  # how many more recordings may be made

    def __call__(self, *arguments: Tensor) -> Sequence[Tensor]:
        if not self._left:
            return self._call(*arguments)
        with self._lock:
            if self._before is None:
                self._before, self._on = list(arguments), _stream(arguments)
                return self._call(*arguments)
            # the recording's buffers belong to one stream: a call on another would have to wait, or overwrite them
            if not self._left or _stream(arguments) != self._on:
                return self._call(*arguments)
            if self._replay is None or any(
                f and a is not b for f, a, b in zip(self._fixed, arguments, self._buffers, strict=True)
            ):
                self._again(arguments)
            if self._replay is None:
                return self._call(*arguments)
            for fixed, buffer, argument in zip(self._fixed, self._buffers, arguments, strict=True):
                if not fixed:
                    buffer.copy_(argument)
            self._replay()
            return self._unpacked([t.clone() for t in self._outputs])

    def _packed(self, *arguments: Tensor) -> list[Tensor]:
        """Run the call and join its outputs into one flat tensor for each dtype, so that one operation copies them."""
        outputs = self._call(*arguments)
        self._shapes = [(t.shape, t.dtype) for t in outputs]
        dtypes = dict.fromkeys(t.dtype for t in outputs)
        return [torch.cat([t.reshape(-1) for t in outputs if t.dtype == dtype]) for dtype in dtypes]

    def _unpacked(self, packed: list[Tensor]) -> list[Tensor]:
        sizes = lambda dtype: [shape.numel() for shape, of in self._shapes if of == dtype]
        rest = {t.dtype: iter(t.split(sizes(t.dtype))) for t in packed}
        return [next(rest[dtype]).view(shape) for shape, dtype in self._shapes]

    def _again(self, arguments: Sequence[Tensor]) -> None:
        """Record the call again; arguments that have been the same tensor in every call so far are read in place."""
        before = self._buffers or self._before or []
        fixed = self._fixed or [True] * len(arguments)
        self._fixed = [f and a is b for f, a, b in zip(fixed, arguments, before, strict=True)]
        copied = sum(a.numel() * a.element_size() for f, a in zip(self._fixed, arguments, strict=True) if not f)
        self._left -= 1
        self._replay, self._outputs = None, ()
        if copied > _COPIED:
            self._left = 0
        if not self._left:
            self._buffers, self._before = [], []
            return
        self._buffers = [a if f else a.clone() for f, a in zip(self._fixed, arguments, strict=True)]
        try:
            self._replay, self._outputs = self._record(self._packed, self._buffers)
        except RuntimeError as error:
            logger.warning("a call could not be recorded as a CUDA graph, so it runs without one: %s", error)
            self._left, self._buffers, self._before = 0, [], []


def _stream(arguments: Sequence[Tensor]) -> int:
    return torch.cuda.current_stream(arguments[0].device).cuda_stream if arguments[0].is_cuda else 0


def _record(call: Callable[..., Sequence[Tensor]], buffers: list[Tensor]) -> tuple[Callable[[], None], list[Tensor]]:
    """Record the call on these tensors as a CUDA graph; return a function that replays it, and its output tensors."""
    device = buffers[0].device
    with torch.cuda.device(device), torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # the first call sets up libraries, which must not be recorded
            call(*buffers)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            outputs = list(call(*buffers))
    return graph.replay, outputs
