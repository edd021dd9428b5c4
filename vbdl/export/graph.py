"""The prediction of one tile as a single graph of plain torch operations, with the seed and the rows as its inputs.

The graph holds draws, network, statistics, calibration and decision. A predictor's noise comes from opaque operators
(`vbdl_kernels.philox`); here they are replaced by integer arithmetic according to their specification, which every
back end supports. The draws are the same, and the predictions equal up to rounding.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves
from vbdl_kernels import make_key
from vbdl_kernels.philox import reference_keep, reference_normal, reference_words

from vbdl.calling.inputs import Flat
from vbdl.compiling.graph import draws_from_generator, trace
from vbdl.compiling.rewrite import rewrite
from vbdl.compiling.rewrite.linear import DECOMPOSITIONS, free_layout
from vbdl.engine.execution import Execution
from vbdl.engine.executions import Executions
from vbdl.engine.predictor import Predictor
from vbdl.engine.program import tracing
from vbdl.engine.settings import PredictorSettings
from vbdl.nn import recurrent_layer, recurrent_tangent
from vbdl.types import State

# the backend -> what takes the place of recurrent layers, of which only ONNX has operators; it has none of tangents
_RECURRENT = {
    backend: {recurrent_layer.recurrent_layer: layer, recurrent_tangent.recurrent_tangent: recurrent_tangent.lowered}
    for backend, layer in (
        ("aoti", recurrent_layer.lowered),
        ("onnx", recurrent_layer.lowered_to_single_layers),
    )
}
_NOISE = {
    torch.ops.vbdl.words.default: reference_words,
    torch.ops.vbdl.normal.default: reference_normal,
    torch.ops.vbdl.keep.default: reference_keep,
}


@dataclass(frozen=True)
class TileCall:
    """A module that predicts one tile: module(seed, *tile) -> the prediction's fields, in the order of `fields`.

    seed: () int64. tile: the input tensors of one tile of rows, in the order of the call.
    """

    module: fx.GraphModule
    fields: tuple[str, ...]


class _WithoutBits(PredictorSettings):
    """The settings of a graph for ONNX, whose runtime promises no row the same bits in every batch."""

    @property
    def keeps_bits(self) -> bool:
        return False


def tile_call(predictor: Predictor, tile: Flat, backend: str = "aoti") -> TileCall:
    """Trace the prediction of tiles with the shapes of this one into a module that `torch.export` accepts.

    backend: "aoti", or "onnx", for which recurrent layers stay single operators (`vbdl/export/onnx.py` writes them).
    """
    if predictor.estimator != "sampling":
        raise ValueError("a package predicts by sampling: export predictor.replace(estimator='sampling')")
    kind = _WithoutBits if backend == "onnx" else PredictorSettings
    settings = kind(**{**vars(predictor.settings), "compile": False})
    executions = Executions(predictor.posterior, predictor.likelihood, settings, predictor.device).make(tile)
    likelihood = predictor.likelihood
    parts = [_Part(e, predictor) for e in executions if isinstance(e, Execution)]
    fields: list[str] = []

    def whole(constants: list[Tensor], seed: Tensor, x: list[Tensor]) -> list[Tensor]:
        remaining = iter(constants)
        sums: State | None = None
        for part in parts:
            added = likelihood.summarize(part.parameters(remaining, seed, x))
            sums = added if sums is None else likelihood.merge(sums, added)
        assert sums is not None  # a posterior has a part
        finished = likelihood.finish(sums)
        fields[:] = finished
        return list(finished.values())

    constants = [t for part in parts for t in part.constants]
    seed = torch.tensor(predictor.seed, device=predictor.device)
    with torch.no_grad(), tracing():
        graph = trace(
            whole,
            constants,
            seed,
            list(tile.tensors),
            aligned=parts[0].aligned,
            decompositions={**DECOMPOSITIONS, **_NOISE, **_RECURRENT[backend]},
        )
    _check_plain(graph)
    return TileCall(_closed(graph, constants), tuple(fields))


def _closed(traced: fx.GraphModule, constants: Sequence[Tensor]) -> fx.GraphModule:
    """The traced call with its constants as buffers of one flat module; exporters lose buffers of submodules."""
    buffers: dict[str, Tensor] = {}
    steps: dict[str, fx.GraphModule] = {}  # of scans
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}

    def constant(t: Tensor) -> fx.Node:
        name = f"constant_{len(buffers)}"
        buffers[name] = t
        return graph.get_attr(name)

    position = 0
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            inputs = position - len(constants)
            name = "seed" if inputs == 0 else f"x{inputs - 1}"
            copied[node] = constant(constants[position]) if inputs < 0 else graph.placeholder(name)
            position += 1
        elif node.op == "get_attr":
            value = getattr(traced, node.target)
            if isinstance(value, fx.GraphModule):
                steps[node.target] = value
                copied[node] = graph.get_attr(node.target)
            else:
                copied[node] = constant(value)
        elif node.op == "output":
            graph.output(tuple(copied[n] for n in tree_leaves(node.args)))
        else:
            copied[node] = graph.node_copy(node, lambda n: copied[n])
    # exporters expect placeholders before all other nodes
    first = next(iter(graph.nodes))
    for node in [n for n in graph.nodes if n.op == "placeholder"]:
        first.prepend(node)
    holder = nn.Module()
    for name, t in buffers.items():
        holder.register_buffer(name, t.detach())
    for name, step in steps.items():
        holder.add_module(name, step)
    return fx.GraphModule(holder, graph)


class _Part:
    """The traced draws of one architecture, with its constant arguments and the names of its key arguments."""

    def __init__(self, execution: Execution, predictor: Predictor):
        numbers = torch.arange(execution.n_samples)
        traced = execution.traced
        state = traced.entries(numbers)
        self.aligned = traced.aligned
        needed = execution.n_samples * execution.graph_plan.activation_bytes
        if needed > predictor.settings.memory_budget:
            raise ValueError(
                f"a package makes all {execution.n_samples} draws of a tile at once, which needs {needed / 2**20:.0f} "
                f"MiB, more than memory_budget: use smaller tiles, fewer draws or a larger memory_budget"
            )
        self._numbers = numbers.to(traced.device)
        self._keys = _keys(execution, numbers, state, predictor.seed)
        self._names, shared = list(state), list(traced.shared.values())
        with torch.no_grad(), tracing():
            graph = traced.graph(state)
        # budget 0 keeps no precomputed draws: the graph must not depend on the masks or weights of one seed
        rewrite(
            graph,
            traced.kinds(state),
            rows=traced.rows,
            n_samples=execution.n_samples,
            budget=0,
            joint=predictor.settings.joint,
            largest_tile=predictor.settings.largest_tile,
            measure=lambda node, of: of(torch.ones(node.meta["val"].shape)),
        )
        free_layout(graph)  # as in the predictor's own graph
        self._graph = graph
        self.constants = [t for n, t in state.items() if n not in self._keys] + shared

    def parameters(self, constants: Iterator[Tensor], seed: Tensor, x: list[Tensor]) -> Tensor:
        """The parameters of p(y | x), (samples, rows, ...). constants: an iterator that starts with this part's."""
        entries = []
        for name in self._names:
            key = torch.stack((seed.expand(self._numbers.shape), self._numbers), dim=-1)
            entries.append(key if name in self._keys else next(constants))
        shared = [next(constants) for _ in range(len(self.constants) - len(self._names) + len(self._keys))]
        return self._graph(entries, shared, x)[0]


def _keys(execution: Execution, numbers: Tensor, state: State, seed: int) -> set[str]:
    """The names of the entries that are (seed, draw) keys; ValueError if another entry depends on the seed."""
    posterior = execution.traced.model.posterior
    state_of_other_seed = execution.traced.model.entries(numbers, seed + 1 if seed < 2**62 else seed - 1)
    keys = set()
    for name, t in state.items():
        if torch.equal(state_of_other_seed[name], t):
            continue
        if t.dtype != torch.int64 or not torch.equal(t.cpu(), make_key(seed, numbers)):
            raise ValueError(
                f"a {type(posterior).__name__} draws {name.removeprefix('network.')} from the seed outside the "
                f"network, which a package cannot do: draw it inside the network, from its (seed, draw) key"
            )
        keys.add(name)
    return keys


def _check_plain(graph: fx.GraphModule) -> None:
    """Raise ValueError if the graph still has an operator of vbdl or one that draws from torch's generator."""
    for node in graph.graph.nodes:
        if node.op != "call_function":
            continue
        if draws_from_generator(node):
            raise ValueError(f"{node.target} draws from torch's generator, so a package could not repeat its draws")
        if str(node.target).startswith("vbdl.") and node.target is not recurrent_layer.recurrent_layer:
            raise ValueError(f"{node.target} is an operator of vbdl, which a package cannot hold")
