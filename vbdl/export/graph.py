"""The whole prediction of one tile as one graph of plain torch operations: draws, network, statistics, calibration
and decision, with the seed and the rows as its inputs.

The noise of a predictor comes from opaque operators (`vbdl_kernels.philox`); here they are written out in the integer
arithmetic of their specification, which every back end has. The draws are the same, and so are the numbers, to
rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves
from vbdl_kernels import make_key
from vbdl_kernels.philox import reference_normal, reference_words

from vbdl.calling.inputs import Flat
from vbdl.compiling.graph import trace
from vbdl.compiling.rewrite import rewrite
from vbdl.compiling.rewrite.linear import DECOMPOSITIONS
from vbdl.engine.execution import Execution
from vbdl.engine.predictor import Predictor
from vbdl.engine.program import tracing
from vbdl.types import State

_NOISE = {torch.ops.vbdl.words.default: reference_words, torch.ops.vbdl.normal.default: reference_normal}


@dataclass(frozen=True)
class TileCall:
    """module(seed, *tile) -> the fields of the prediction of one tile, in the order of `fields`.

    seed: () int64. tile: the tensors of one tile of rows, in the order of the call.
    """

    module: fx.GraphModule
    fields: tuple[str, ...]


def tile_call(predictor: Predictor, tile: Flat) -> TileCall:
    """The prediction of tiles like this one, as a module that `torch.export` takes."""
    if predictor.estimator != "sampling":
        raise ValueError("a package predicts by sampling: export replace(estimator='sampling')")
    executions = predictor.executions.make(tile)
    likelihood = predictor.likelihood
    parts = [_Part(e, predictor) for e in executions]
    fields: list[str] = []

    def whole(constants: list[Tensor], seed: Tensor, given: list[Tensor]) -> list[Tensor]:
        left, sums = iter(constants), None
        for part in parts:
            added = likelihood.summarize(part.parameters(left, seed, given))
            sums = added if sums is None else likelihood.merge(sums, added)
        found = likelihood.finish(sums)
        fields[:] = found
        return list(found.values())

    constants = [t for part in parts for t in part.constants]
    seed = torch.tensor(predictor.seed, device=predictor.device)
    with torch.no_grad(), tracing():
        graph = trace(
            whole,
            constants,
            seed,
            list(tile.tensors),
            aligned=parts[0].aligned,
            decompositions={**DECOMPOSITIONS, **_NOISE},
        )
    _check_plain(graph)
    return TileCall(_closed(graph, constants), tuple(fields))


def _closed(traced: fx.GraphModule, constants: Sequence[Tensor]) -> fx.GraphModule:
    """The traced call with its constants inside, as buffers of one flat module: exporters lose those of submodules."""
    held: dict[str, Tensor] = {}
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}

    def constant(t: Tensor) -> fx.Node:
        name = f"constant_{len(held)}"
        held[name] = t
        return graph.get_attr(name)

    given = 0
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            inputs = given - len(constants)
            name = "seed" if inputs == 0 else f"x{inputs - 1}"
            copied[node] = constant(constants[given]) if inputs < 0 else graph.placeholder(name)
            given += 1
        elif node.op == "get_attr":
            copied[node] = constant(getattr(traced, node.target))
        elif node.op == "output":
            graph.output(tuple(copied[n] for n in tree_leaves(node.args)))
        else:
            copied[node] = graph.node_copy(node, lambda n: copied[n])
    # placeholders come first
    first = next(iter(graph.nodes))
    for node in [n for n in graph.nodes if n.op == "placeholder"]:
        first.prepend(node)
    holder = nn.Module()
    for name, t in held.items():
        holder.register_buffer(name, t.detach())
    return fx.GraphModule(holder, graph)


class _Part:
    """The draws of one architecture: the traced call, what of its arguments is constant, and which are keys."""

    def __init__(self, execution: Execution, predictor: Predictor):
        numbers = torch.arange(execution.n_samples)
        traced = execution.traced
        state = traced.entries(numbers)
        self.aligned = traced.aligned
        needed = execution.n_samples * execution.plan.activation_bytes
        if needed > predictor.settings.memory_budget:
            raise ValueError(
                f"a package makes all {execution.n_samples} draws of a tile at once, which takes {needed / 2**20:.0f} "
                f"MiB here, more than memory_budget: use smaller tiles, fewer draws or a larger memory_budget"
            )
        self._numbers = numbers.to(traced.device)
        self._keys = _keys(execution, numbers, state, predictor.seed)
        self._names, shared = list(state), list(traced.shared.values())
        with torch.no_grad(), tracing():
            graph = traced.graph(state)
        # no budget for what is kept of the draws: nothing may depend on the masks or weights of one seed
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
        self._graph = graph
        self.constants = [t for n, t in state.items() if n not in self._keys] + shared

    def parameters(self, constants: Any, seed: Tensor, x: list[Tensor]) -> Tensor:
        """(samples, rows, ...) parameters of p(y | x); takes its own from the front of what is left of `constants`."""
        entries = []
        for name in self._names:
            key = torch.stack((seed.expand(self._numbers.shape), self._numbers), dim=-1)
            entries.append(key if name in self._keys else next(constants))
        shared = [next(constants) for _ in range(len(self.constants) - len(self._names) + len(self._keys))]
        return self._graph(entries, shared, x)[0]


def _keys(execution: Execution, numbers: Tensor, state: State, seed: int) -> set[str]:
    """Entries of a draw that are its (seed, draw); ValueError where anything else of a draw depends on the seed."""
    posterior = execution.traced.model.posterior
    other = execution.traced.model.entries(numbers, seed + 1 if seed < 2**62 else seed - 1)
    found = set()
    for name, t in state.items():
        if torch.equal(other[name], t):
            continue
        if t.dtype != torch.int64 or not torch.equal(t.cpu(), make_key(seed, numbers)):
            raise ValueError(
                f"{name.removeprefix('network.')} of a {type(posterior).__name__} is drawn from the seed "
                f"outside the network, so a package could not draw it: only (seed, draw) keys can be"
            )
        found.add(name)
    return found


def _check_plain(graph: fx.GraphModule) -> None:
    """Nothing of vbdl and nothing that draws from torch's generator is left in the graph."""
    for node in graph.graph.nodes:
        if node.op != "call_function":
            continue
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise ValueError(f"{node.target} draws from torch's generator: a package of it would not be the predictor")
        if str(node.target).startswith("vbdl."):
            raise ValueError(f"{node.target} is an operator of vbdl, which a package cannot hold")
