"""Small calls on a GPU, replayed as CUDA graphs: where starting a call's kernels takes longer than what they do.

A call is recorded when it is made for the second time. What was the same tensor both times (weights, masks that are
kept) is read where it lies; the others are copied to where the recorded call reads them. What comes back are parts of
one copy, so that a later call changes nothing that was handed out.
"""

import logging
import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx
from vbdl_kernels import flops as flops  # counts of the operators, registered when imported
from vbdl_kernels import regime

from vbdl.compiling.graph import Region, own_bytes

logger = logging.getLogger("vbdl")
_COPIED = 2**24  # bytes of inputs copied in every call; past this it is not worth it
_RECORDINGS = 4  # of one call, before it is left alone: each costs some milliseconds

Recorder = Callable[[Callable[..., Sequence[Tensor]], list[Tensor]], tuple[Callable[[], None], Sequence[Tensor]]]


def is_worth_replaying(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> bool:
    """Whether all of it is on one GPU, writes to nothing it is given, and is estimated to be bound by its launches."""
    nodes = [n for n in graph.graph.nodes if n.op == "call_function"]
    if not inputs or any(not t.is_cuda for t in inputs) or len({t.device for t in inputs}) > 1:
        return False
    if any(n.target is torch.ops.aten.copy_.default for n in nodes):
        return False
    return is_bound_by_launches(graph, inputs)


def is_bound_by_launches(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> bool:
    """By the model of `vbdl_kernels.regime`, whatever device it is on."""
    nodes = [n for n in graph.graph.nodes if n.op == "call_function"]
    work = Region(graph, [], [], nodes).flops()
    moved = sum(t.numel() * t.element_size() for t in inputs) + 2 * sum(own_bytes(n) for n in nodes)
    # a kernel for every product and operator, and about one between two of them for all that is pointwise
    alone = sum(getattr(n.target, "namespace", "") == "vbdl" or n.target in _PRODUCTS for n in nodes)
    return regime.is_launch_bound(work, moved, 2 * alone + 1)


_aten = torch.ops.aten
_PRODUCTS = {_aten.mm.default, _aten.bmm.default, _aten.addmm.default, _aten.baddbmm.default, _aten.convolution.default}


class Replayed:
    """A compiled call. Safe to call from several threads: one at a time records and replays."""

    def __init__(self, call: Callable[..., Sequence[Tensor]], record: "Recorder | None" = None):
        self._call, self._record = call, record or _record
        self._lock = threading.Lock()
        self._before: list[Tensor] | None = None  # arguments of the first call
        self._on = 0
        self._fixed: list[bool] = []
        self._buffers: list[Tensor] = []
        self._shapes: list[tuple[torch.Size, torch.dtype]] = []
        self._outputs: Sequence[Tensor] = ()  # one for each dtype, see `_packed`
        self._replay: Callable[[], None] | None = None
        self._left = _RECORDINGS

    def __call__(self, *arguments: Tensor) -> Sequence[Tensor]:
        if not self._left:
            return self._call(*arguments)
        with self._lock:
            if self._before is None:
                self._before, self._on = list(arguments), _stream(arguments)
                return self._call(*arguments)
            # what one stream replays another must not wait for, nor overwrite
            if not self._left or _stream(arguments) != self._on:
                return self._call(*arguments)
            if self._replay is None or any(
                f and a is not b for f, a, b in zip(self._fixed, arguments, self._buffers, strict=True)
            ):
                self._again(arguments)
            if self._replay is None:
                return self._call(*arguments)
            for fixed, buffer, given in zip(self._fixed, self._buffers, arguments, strict=True):
                if not fixed:
                    buffer.copy_(given)
            self._replay()
            return self._unpacked([t.clone() for t in self._outputs])

    def _packed(self, *arguments: Tensor) -> list[Tensor]:
        """The call, what it returns in one tensor a dtype: to copy it out is then one operation."""
        found = self._call(*arguments)
        self._shapes = [(t.shape, t.dtype) for t in found]
        dtypes = dict.fromkeys(t.dtype for t in found)
        return [torch.cat([t.reshape(-1) for t in found if t.dtype == dtype]) for dtype in dtypes]

    def _unpacked(self, packed: list[Tensor]) -> list[Tensor]:
        sizes = lambda dtype: [shape.numel() for shape, of in self._shapes if of == dtype]
        rest = {t.dtype: iter(t.split(sizes(t.dtype))) for t in packed}
        return [next(rest[dtype]).view(shape) for shape, dtype in self._shapes]

    def _again(self, arguments: Sequence[Tensor]) -> None:
        """Record the call, reading in place what has never changed."""
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
            logger.warning("a call could not be recorded as a CUDA graph and runs without: %s", error)
            self._left, self._buffers, self._before = 0, [], []


def _stream(arguments: Sequence[Tensor]) -> int:
    return torch.cuda.current_stream(arguments[0].device).cuda_stream if arguments[0].is_cuda else 0


def _record(call: Callable[..., Sequence[Tensor]], buffers: list[Tensor]) -> tuple[Callable[[], None], list[Tensor]]:
    """A CUDA graph of the call on these tensors: what replays it, and the tensors that it writes."""
    device = buffers[0].device
    with torch.cuda.device(device), torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what is set up at a first call must not be recorded
            call(*buffers)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            outputs = list(call(*buffers))
    return graph.replay, outputs
