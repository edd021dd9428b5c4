"""A model on tiles of one shape, as graphs of any number of draws."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, fx

from vbdl.calling.autograd import only_forwards
from vbdl.calling.inputs import Flat, rebuilt
from vbdl.calling.stacking import call_each, call_stacked
from vbdl.compiling.graph import DRAWN, ONCE, PREFIX, Cut, cut, part_of, trace
from vbdl.compiling.rewrite import rewrite
from vbdl.compiling.rewrite.linear import DECOMPOSITIONS, WholeLinears, free_layout
from vbdl.engine.program import tracing
from vbdl.engine.settings import PredictorSettings
from vbdl.model import Model
from vbdl.types import State


class Traced:
    """Traces the call of some draws on one tile, rewrites it and cuts it by what each value depends on.

    strategy: "stacked", draws mapped together, or "loop", one after the other, which `find_strategy` decides.
    shared: the entries that all draws share. Every graph reads these same tensors.
    """

    def __init__(
        self,
        model: Model,
        tile: Flat,  # (rows, ...) each
        settings: PredictorSettings,
        n_samples: int,
    ):
        self.model, self.tile, self.settings, self.n_samples = model, tile, settings, n_samples
        self.device, self.rows = tile.tensors[0].device, tile.rows
        # equal alignment gives bit-identical rows; promised for tiles of 64, 128, ... rows
        self.aligned = self.rows % 64 == 0
        self.strategy = "stacked"
        self.handwritten: list[str] = []  # functions of the network whose gradient is written by hand
        self.rewrites: tuple[str, ...] = ()  # what the last graph was rewritten to, in words
        self.shared = {n: t.detach() for n, t in model.shared(self.entries(torch.arange(1))).items()}

    def entries(self, numbers: Tensor) -> State:
        """The entries that these draws have of their own, (samples, ...) each."""
        return self.model.entries(numbers, self.settings.seed)

    # -- graphs

    def probe(self) -> tuple[Cut, int, tuple[str, ...]]:
        """The cut call of one or two draws, how many they are, and why the draws cannot be mapped, if they cannot."""
        entries, reasons = self.entries(torch.arange(min(2, self.n_samples))), ()
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", ".*batching rule.*")  # torch would loop, inside, and only warn
                graph = self.graph(entries)
        except Exception as error:  # what vmap cannot take, it says in many ways
            self.strategy, entries = "loop", self.entries(torch.arange(1))
            reasons = (f"the draws cannot be mapped together: {_first_line(error)}",)
            try:
                graph = self.graph(entries)
            except Exception as reason:  # it has just run, so tracing is what fails
                raise ValueError(
                    f"the module runs, but cannot be traced: {_first_line(reason)}. What it computes may depend on the "
                    f"shapes of its inputs and not on their values: no `if` on a tensor, no .item(), no packed sequence"
                ) from reason
        return self._cut(graph, entries), next(iter(entries.values())).shape[0], reasons

    def cut(self, numbers: Tensor) -> Cut:
        """The call of as many draws as these, rewritten and cut. Made under the lock of `program.tracing`."""
        with torch.no_grad(), tracing():
            entries = self.entries(numbers)
            return self._cut(self.graph(entries), entries)

    def graph(self, entries: State) -> fx.GraphModule:
        """The call of these draws, (samples, rows, ...) parameters of p(y | x); linear layers are whole."""

        def parameters(stacked: list[Tensor], shared: list[Tensor], inputs: list[Tensor]) -> tuple[Tensor]:
            own = dict(zip(entries, stacked, strict=True))
            rest = dict(zip(self.shared, shared, strict=True))
            execute = call_stacked if self.strategy == "stacked" else call_each
            return (execute(self.model, own, rest, rebuilt(self.tile.structure, inputs)),)

        with WholeLinears(), only_forwards() as names:
            graph = trace(parameters, *self._arguments(entries), aligned=False)
        self.handwritten = sorted(set(names))
        return graph

    def arguments(self, numbers: Tensor) -> list[Tensor]:
        """The tensors that the call of these draws takes before the tile's: their entries, then the shared ones."""
        return [*self.entries(numbers).values(), *self.shared.values()]

    def kinds(self, entries: State) -> list[int]:
        """What each argument of a graph depends on, in order: DRAWN, ONCE or PREFIX."""
        return [DRAWN] * len(entries) + [ONCE] * len(self.shared) + [PREFIX] * len(self.tile.tensors)

    def _arguments(self, entries: State) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        return list(entries.values()), list(self.shared.values()), list(self.tile.tensors)

    def _cut(self, graph: fx.GraphModule, entries: State) -> Cut:
        """A traced call, rewritten, its linear layers lowered to products, and cut."""
        kinds, measured = self.kinds(entries), {}
        self.rewrites = tuple(
            rewrite(
                graph,
                kinds,
                rows=self.rows,
                n_samples=self.n_samples,
                budget=self.settings.memory_budget // 2,
                joint=self.settings.joint,
                largest_tile=self.settings.largest_tile,
                measure=lambda node, of: self._measure(graph, node, of, measured),
            )
        )
        free_layout(graph)
        lowered = trace(graph, *self._arguments(entries), aligned=self.aligned, decompositions=DECOMPOSITIONS)
        return cut(lowered, kinds)

    def _measure(
        self, graph: fx.GraphModule, node: fx.Node, of: Callable[[Tensor], int], measured: dict[str, int]
    ) -> int:
        """The maximum of of(value) over all draws of this node, computed block by block; kept in `measured`."""
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


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
