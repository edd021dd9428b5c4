"""A program: regions of a cut graph, followed by the statistics of their output, as one compiled call."""

import contextlib
import logging
import math
import threading
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, fx
from vbdl_kernels.dispatch import with_derivative

from vbdl.calling.graphs import without_fused_attention
from vbdl.compiling.compiler import compile_graph, on_cpu
from vbdl.compiling.graph import Cut, composed, trace
from vbdl.compiling.products import faster_products
from vbdl.compiling.rewrite.loops import transpose_last
from vbdl.data.tiles import aligned
from vbdl.types import Likelihood, State


class Program:
    """A function from named tensors to named tensors, compiled at its first call.

    regions: the regions of `cut` to run, in order. aligned: see `vbdl.compiling.graph.trace`. keeps_bits: whether a row
    must have the same bits in every batch. handwritten: names of the network's torch.autograd.Functions; if there are
    any, inputs that require a gradient are refused.
    """

    def __init__(
        self,
        cut: Cut,
        regions: tuple[int, ...],
        compile: bool,
        aligned: bool,
        keeps_bits: bool,
        handwritten: Sequence[str] = (),
    ):
        self._keeps_bits = keeps_bits
        self._handwritten = handwritten
        self._regions = [cut.regions[r] for r in regions if not cut.regions[r].empty]
        computed = {name for region in self._regions for name in region.outputs}
        self.inputs = list(dict.fromkeys(n for r in self._regions for n in r.inputs if n not in computed))
        self.outputs = [name for region in self._regions for name in region.outputs]
        self._output, self._compile, self._aligned = cut.outputs[0], compile, aligned
        self._call: Callable[..., Sequence[Tensor]] | None = None
        self._graph: fx.GraphModule | None = None
        self._end: Callable[[Tensor, State], State] | None = None
        self._dtypes: list[torch.dtype] = []
        self.checked: list[str] = []

    def finish(self, likelihood: Likelihood, finish: str, count: int, carried: Sequence[str] = ()) -> None:
        """Let the program return "parameters", "sums" or "fields" (`finish`) of its first `count` draws.

        carried: the names of the running sums that "sums" adds to, in the order of the arguments.
        """

        def end(parameters: Tensor, carried: State) -> State:
            return ended(likelihood, finish, parameters[:count], carried)

        self._end = end
        self._carried = list(carried)

    def _whole(self, examples: list[Tensor]) -> fx.GraphModule:
        """The regions as one graph, followed by the statistics of their output; only these are traced.

        examples: the arguments, the values in `inputs` and the running sums.
        """
        if self._end is None:
            return composed(self._regions, self.inputs, self.outputs)
        given = dict(zip(self.inputs, examples, strict=False))
        sums, end = examples[len(self.inputs) :], self._end
        checked = [n for n in self.checked if given[n].is_floating_point()]

        def statistics(parameters: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
            ended = end(parameters, dict(zip(self._carried, others, strict=False)))
            self.outputs = list(ended)
            # NaN or infinite if an input is not finite
            return (*ended.values(), *(t.sum() for t in others[len(self._carried) :]))

        parameters = given[self._output] if self._output in given else self._example(self._output)
        graph = trace(statistics, parameters, *sums, *(given[n] for n in checked), aligned=self._aligned)
        return composed(
            self._regions, self.inputs, [self._output, *(f"sum_of_{n}" for n in self._carried), *checked], graph
        )

    def _example(self, name: str) -> Tensor:
        """A tensor like a region's value of this name, of any numbers."""
        value = next(n.meta["val"] for r in self._regions for n in r.graph.graph.nodes if n.name == name)
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)

    def __call__(self, values: dict[str, Tensor], carried: State) -> State:
        arguments = [*(values[n] for n in self.inputs), *carried.values()]
        if self._call is None or self._graph is None:
            examples = [t.detach() for t in arguments]
            with torch.no_grad(), tracing():
                graph = self._whole(examples)
                if self._compile and on_cpu(examples):  # a gain on a CPU; not measured elsewhere
                    transpose_last(graph)
                    if not self._keeps_bits:
                        faster_products(graph)
            call: Callable[..., Sequence[Tensor]] = graph
            if self._compile:
                with torch.no_grad(), compiling:  # not the lock of tracing, which answers meanwhile may need
                    call = compile_graph(graph, examples)
            self._graph, self._call, self._dtypes = graph, call, [t.dtype for t in examples]
        if self._dtypes != [t.dtype for t in arguments]:  # compiled code would misread the bytes
            dtypes = [t.dtype for t in arguments]
            raise TypeError(f"compiled for {self._dtypes}, called with {dtypes}: convert the arguments")
        if torch.is_grad_enabled() and any(t.requires_grad for t in arguments):
            if self._handwritten:
                raise NotImplementedError(
                    f"the network computes with {', '.join(self._handwritten)}, whose gradient is written by hand "
                    f"(torch.autograd.Function) and is not in the traced graph, so a prediction has no gradient with "
                    f"respect to its inputs. Predict on inputs without requires_grad"
                )
            outputs = _Differentiable(self._graph).run(*arguments)  # the compiled call has no gradient
            return dict(zip(self.outputs, outputs, strict=False))
        with torch.no_grad():
            return dict(zip(self.outputs, self._call(*arguments), strict=False))

    def ready(self, kept: dict[str, Tensor], tile: str) -> "Ready | None":
        """The compiled call with the values `kept` filled in, or None if it is not compiled or has no input `tile`."""
        if tile not in self.inputs or self._call is None or self._call is self._graph:
            return None
        return Ready(self._call, [kept.get(n) for n in self.inputs], self.inputs.index(tile), self.outputs)


def ended(likelihood: Likelihood, end: str, parameters: Tensor, carried: State) -> State:
    """What a call returns from the parameters of p(y | x) of its draws, (samples, rows, ...).

    end: "parameters", these parameters; "sums", the running sums `carried` with these draws added; "fields", the
    prediction's fields.
    """
    if end == "parameters":
        return {"parameters": parameters}
    sums = likelihood.summarize(parameters)
    return likelihood.finish(sums) if end == "fields" else likelihood.merge(carried, sums)


class _Differentiable(fx.Interpreter):
    """An interpreter that runs a graph operation by operation, with each kernel's derivative."""

    def call_function(self, target: Callable, args: tuple, kwargs: dict) -> object:
        return super().call_function(with_derivative(target), args, kwargs)


class Ready:
    """A compiled call that takes just a tile: saves overhead that is longer than a small network's own time.

    call: the compiled call. arguments: its arguments; the tile goes to index `place`. names: the outputs' names.
    """

    def __init__(
        self, call: Callable[..., Sequence[Tensor]], arguments: list[Tensor | None], place: int, names: list[str]
    ):
        self._call, self._arguments, self._place, self._names = call, arguments, place, names

    def __call__(self, tile: Tensor) -> State | None:
        """The prediction's fields for a tile, or None if an input is not finite or its sum overflows."""
        outputs = self._run(tile)
        if len(outputs) > len(self._names) and not math.isfinite(outputs[-1].item()):
            return None
        return dict(zip(self._names, outputs, strict=False))

    def checked(self, tile: Tensor) -> State:
        """The prediction's fields for a tile that is known to be finite."""
        return dict(zip(self._names, self._run(tile), strict=False))

    def _run(self, tile: Tensor) -> Sequence[Tensor]:
        arguments = self._arguments.copy()
        arguments[self._place] = aligned(tile)
        return self._call(*arguments)


_lock = threading.RLock()
compiling = threading.RLock()  # held by the thread that runs Inductor, which compiles in one at a time


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """A context in which no other thread traces or compiles: torch's exporters change what traces of others record."""
    with compiling, tracing():
        yield


@contextlib.contextmanager
def tracing() -> Iterator[None]:
    """A context for tracing and compiling: one thread at a time, because they change settings of the whole process.

    Inside, torch's fused transformer and attention kernels are off, because they have no batching rule for vmap.
    """
    with _lock, without_fused_attention():
        # torch 2.13 logs the traceback of an operation that fails in tracing, besides raising the error
        log = logging.getLogger("torch._subclasses.fake_tensor")
        level = log.level
        log.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            log.setLevel(level)
