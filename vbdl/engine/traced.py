"""The tracing of a model: graphs of any number of draws for tiles of one shape."""

import contextlib
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from vbdl.calling.autograd import only_forwards
from vbdl.calling.copies import forget
from vbdl.calling.each import call_each
from vbdl.calling.graphs import in_words
from vbdl.calling.inputs import Flat, rebuilt
from vbdl.calling.lending import only_reading
from vbdl.calling.mappable import Mappable
from vbdl.calling.stacking import call_stacked
from vbdl.calling.traversing import is_sparse
from vbdl.compiling.graph import BODY, CONSTANTS, DRAWN, ONCE, PREFIX, Cut, cut, part_of, trace
from vbdl.compiling.rewrite import rewrite
from vbdl.compiling.rewrite.linear import DECOMPOSITIONS, WholeLinears, free_layout
from vbdl.engine.program import tracing
from vbdl.engine.settings import PredictorSettings
from vbdl.model import Model
from vbdl.nn import recurrent_layer, recurrent_tangent
from vbdl.nn.recurrent import WholeLayers
from vbdl.types import State

_FEW = 8  # draws whose weights are made once more for tracing
_KEY_BYTES = 1024  # of a draw's entries; more are weights or statistics


class CannotTrace(ValueError):
    """The module runs, but its operations cannot be traced."""


def _values(graph: fx.GraphModule) -> Iterator[object]:
    """Yield the value, or the constant, of every node of a traced graph."""
    for node in graph.graph.nodes:
        yield getattr(graph, node.target) if node.op == "get_attr" else node.meta.get("val")


class Traced:
    """A model with the graphs of its forward pass on tiles of one shape, for any number of draws.

    Each graph is traced, rewritten and cut into regions.

    model: the entries are read from it, in any thread. called: its twin, which is traced, under the lock of
    `program.tracing`.
    strategy: "stacked" maps the draws together with vmap, "loop" runs one after the other; `probe` decides.
    shared: the parameters and buffers that all draws share; every graph reads these same tensors.
    few: the number of draws to trace first, if it is known how many one call will have.
    """

    def __init__(
        self,
        model: Model,
        tile: Flat,  # (rows, ...) each
        settings: PredictorSettings,
        n_samples: int,
        few: int | None = None,
    ):
        self._given_few = few
        self.model, self.tile, self.settings, self.n_samples = model, tile, settings, n_samples
        self.called = model.twin()
        self.device, self.rows = tile.tensors[0].device, tile.rows
        # rows of equally aligned products are bit-identical; promised for tiles of 64, 128, ... rows
        self.aligned = self.rows % 64 == 0
        self.strategy = "stacked"
        self.handwritten: list[str] = []  # names of the network's torch.autograd.Functions
        self.rewrites: tuple[str, ...] = ()  # the rewrites of the last graph, in words
        self.shared = {n: t.detach() for n, t in model.shared(self.entries(torch.arange(1))).items()}

    def entries(self, numbers: Tensor) -> State:
        """The parameters and buffers in which these draws differ, by name, (samples, ...) each.

        numbers: (samples,) int64, the numbers of the draws.
        """
        return self.model.entries(numbers, self.settings.seed)

    def entry_bytes(self, cut: Cut) -> int:
        """The bytes of one draw's entries that `draws` makes and a call reads; those of members are held anyway."""
        with only_reading():
            held = self.model.member_entries()
        read = cut.read_placeholders()
        each = zip(self.entries(torch.arange(1)).items(), cut.placeholders, strict=False)
        return sum(t.numel() * t.itemsize for (name, t), place in each if place in read and name not in held)

    # -- graphs

    def probe(self) -> tuple[Cut, int, tuple[str, ...]]:
        """Trace and cut the graph of a few draws, or of all if they may run in one call, and decide the strategy.

        Returns the cut graph, its number of draws, and the reasons why draws cannot be mapped, () if they can.
        """
        entries, reasons = self.entries(torch.arange(self._few())), ()
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", ".*batching rule.*")  # otherwise torch warns, and loops inside vmap
                if self._few() > _FEW:
                    self._map_two(entries)
                graph = self.graph(entries)
        except Exception as error:  # vmap raises errors of many types
            self.strategy, entries = "loop", self.entries(torch.arange(1))
            reasons = (f"the draws run one after the other: {in_words(error)}",)
            try:
                graph = self.graph(entries)
            except Exception as reason:  # the module has just run, so the tracing fails
                raise CannotTrace(
                    f"the module runs, but cannot be traced: {_first_line(reason)}. Its operations may depend on the "
                    f"shapes of its inputs, but not on their values: remove any `if` on a tensor, .item() and packed "
                    f"sequence"
                ) from reason
        if any(isinstance(value, Tensor) and is_sparse(value) for value in _values(graph)):
            raise CannotTrace("the module runs, but cannot be compiled: it computes with sparse tensors")
        held = (getattr(graph, str(node.target), None) for node in graph.graph.find_nodes(op="get_attr"))
        if any(isinstance(value, torch.ScriptObject) for value in held):
            raise CannotTrace(
                "the module runs, but cannot be compiled: it holds objects of C++, as quantized layers do"
            )
        try:
            cut = self._cut(graph, entries)
            cut.regions[BODY].peak_bytes()
        except GuardOnDataDependentSymNode as reason:
            raise CannotTrace(
                f"the module runs, but cannot be traced: the size of a value depends on other values, "
                f"{_first_line(reason)}"
            ) from reason
        return cut, next(iter(entries.values())).shape[0], reasons

    def _map_two(self, entries: State) -> None:
        """Map two draws without a trace, to raise torch's warning that it runs an operation draw after draw.

        It warns once all draws have run, which in a trace takes seconds.
        """
        two = {name: t[:2] for name, t in entries.items()}
        shared = {name: t.clone() for name, t in self.shared.items()}  # a forward may write to them
        try:
            with self._as_operations():
                call_stacked(self.called, two, shared, self.tile.map(Tensor.clone).nested)
        except Warning:
            raise
        except Exception:  # of any type: the trace raises it too, or does without what failed
            return
        finally:
            forget(self.called)

    def _as_operations(self) -> contextlib.ExitStack:
        """A context in which linear layers are single operations, recurrent ones too, and others can be mapped."""
        stack = contextlib.ExitStack()
        stack.enter_context(WholeLinears())
        if not self.settings.keeps_bits:
            stack.enter_context(WholeLayers())
        stack.enter_context(Mappable())
        return stack

    def _few(self) -> int:
        """The number of draws to trace first: all of them, which is mostly the plan, unless they take time to draw."""
        if self._given_few is not None:
            return min(self._given_few, self.n_samples)
        entries = self.entries(torch.arange(1))
        drawn = sum(t.numel() * t.itemsize for t in entries.values()) > _KEY_BYTES
        most = _FEW if drawn else self.n_samples if self.settings.chunk_size is None else self.settings.chunk_size
        return min(most, self.n_samples) if self.n_samples > 1 else 1

    def cut(self, numbers: Tensor) -> Cut:
        """Trace, rewrite and cut the graph for as many draws as these, under the lock of `program.tracing`."""
        with torch.no_grad(), tracing():
            entries = self.entries(numbers)
            return self._cut(self.graph(entries), entries)

    def graph(self, entries: State) -> fx.GraphModule:
        """Trace the forward pass of these draws, whose output is the parameters of p(y | x), (samples, rows, ...).

        Each linear layer is one node of the graph, which the rewrites look for, and so is each recurrent layer, except
        where a row is promised the same bits in every batch.
        """

        def parameters(stacked: list[Tensor], shared: list[Tensor], inputs: list[Tensor]) -> tuple[Tensor]:
            drawn_state = dict(zip(entries, stacked, strict=True))
            shared_state = dict(zip(self.shared, shared, strict=True))
            execute = call_stacked if self.strategy == "stacked" else call_each
            return (execute(self.called, drawn_state, shared_state, rebuilt(self.tile.structure, inputs)),)

        try:
            with self._as_operations(), only_forwards() as names:
                graph = trace(parameters, *self._arguments(entries), aligned=False, decompositions=CONSTANTS)
        finally:
            forget(self.called)  # values of the trace that the forward kept in attributes
        _keep_arguments(graph)
        self.handwritten = sorted(set(names))
        return graph

    def arguments(self, numbers: Tensor) -> list[Tensor]:
        """The arguments of a graph that precede the tile: the entries of these draws, then the shared entries."""
        return [*self.entries(numbers).values(), *self.shared.values()]

    def kinds(self, entries: State) -> list[int]:
        """The region of each argument of a graph, in order: DRAWN, ONCE or PREFIX."""
        return [DRAWN] * len(entries) + [ONCE] * len(self.shared) + [PREFIX] * len(self.tile.tensors)

    def _arguments(self, entries: State) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        return list(entries.values()), list(self.shared.values()), list(self.tile.tensors)

    def _cut(self, graph: fx.GraphModule, entries: State) -> Cut:
        """Rewrite a traced graph, lower its linear layers to matrix products and cut it into regions."""
        kinds, measured = self.kinds(entries), {}
        self.rewrites = (
            *recurrent_layer.sentences(graph.graph),
            *recurrent_tangent.sentences(graph.graph),
            *rewrite(
                graph,
                kinds,
                rows=self.rows,
                n_samples=self.n_samples,
                budget=self.settings.memory_budget // 2,
                # a limited number of draws are networks, not outputs
                joint=self.settings.joint or self.model.posterior.n_draws is not None,
                largest_tile=self.settings.largest_tile,
                measure=lambda node, of: self._measure(graph, node, of, measured),
            ),
        )
        free_layout(graph)
        lowered = trace(graph, *self._arguments(entries), aligned=self.aligned, decompositions=DECOMPOSITIONS)
        return cut(lowered, kinds)

    def _measure(
        self, graph: fx.GraphModule, node: fx.Node, of: Callable[[Tensor], int], measured: dict[str, int]
    ) -> int:
        """The maximum of `of(value)` over this node's values in all draws, computed block by block.

        measured: the maxima so far by the node's name, to which this one is added.
        """
        if node.name not in measured:
            part = part_of(graph, node)
            names = [n.name for n in graph.graph.nodes if n.op == "placeholder"]
            block = node.meta["val"].shape[0]
            largest = []
            for start in range(0, self.n_samples, block):
                numbers = torch.arange(start, start + block).clamp_max(self.n_samples - 1)
                values = dict(zip(names, self.arguments(numbers), strict=False))
                largest.append(of(part.graph(*[values[n] for n in part.inputs])[0]))
            measured[node.name] = max(largest)
        return measured[node.name]


def _keep_arguments(graph: fx.GraphModule) -> None:
    """Let a graph write to no argument, which a forward that writes to a parameter or buffer would do at its end."""
    writes = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default)
    if not writes:
        return
    for node in writes:
        into = node.args[0]
        if isinstance(into, fx.Node) and into.op == "placeholder":
            node.replace_all_uses_with(node.args[1])
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
