"""One architecture at one shape of input: traced, cut, planned, compiled, and ready to be called.

An execution is made once and never changes; calls share nothing that they write to, so threads may call it together.
"""

import contextlib
import logging
import math
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from vbdl_kernels.dispatch import with_derivative

from vbdl.compiler import compile_graph, on_cpu
from vbdl.graph import BODY, DRAWN, ONCE, PREFIX, Cut, cut, part_of, trace
from vbdl.nn.observed import Observed
from vbdl.plan import Plan, choose
from vbdl.rewrite import rewrite
from vbdl.rewrite.linear import DECOMPOSITIONS, WholeLinears, free_layout
from vbdl.rewrite.loops import transpose_last
from vbdl.stacking import Inputs, State, call, call_each, call_stacked, map_inputs, select, state_of, tensors
from vbdl.types import Likelihood, Posterior

_APART = 1e-2  # of the largest output: beyond all rounding, far below what a neighbour's values make of a row


@dataclass(frozen=True)
class Settings:
    """What a predictor was asked for."""

    seed: int
    memory_budget: int
    chunk_size: int | None
    compile: bool
    autocast: torch.dtype | None
    joint: bool  # weights are drawn even where drawing outputs has the same distribution of every row
    largest_tile: int


@dataclass
class _Chunk:
    """Some draws: their numbers, how many of them count (the last chunk repeats its last draw up to full size), and
    what of theirs does not depend on the input, where it is kept."""

    numbers: Tensor
    count: int
    kept: dict[str, Tensor] | None = None


class Execution:
    """The draws 0, 1, ... of one posterior, on tiles of one shape."""

    def __init__(
        self,
        posterior: Posterior,
        likelihood: Likelihood,
        tile: Inputs,  # (rows, ...) each
        settings: Settings,
        n_samples: int,
        members: State,  # the likelihood's own entries, (members, ...) each, or empty
    ):
        self.posterior, self.likelihood, self.settings = posterior, likelihood, settings
        self.n_samples, self.members = n_samples, members
        self.device = tensors(tile)[0].device
        self._programs: dict[tuple[int, str], _Program] = {}
        self._measured: dict[str, int] = {}
        self._once: dict[str, Tensor] | None = None  # what depends on neither draw nor input, one for all chunks
        self.warm: set[str] = set()  # ends of calls that are compiled: what the predictor need not hold its lock for
        with torch.no_grad(), _tracing():
            self._prepare(tile)

    # -- making it

    def _prepare(self, tile: Inputs) -> None:
        """Trace a few draws, and let the plan choose from what is found."""
        self.posterior.prepare(tile)
        pair = nn.ModuleDict({"network": self.posterior.module, "likelihood": self.likelihood})  # type: ignore[dict-item]
        probe = self._state(torch.arange(min(2, self.n_samples)))
        self._shared = {n: t.detach() for n, t in state_of(pair).items() if n not in probe}
        self._tile = tile
        first, outputs = probe, self._plainly(probe, tile)
        # rows that lie alike round alike: promised for tiles of multiples of 64 rows, and of no use to one row
        self._aligned = tensors(tile)[0].shape[0] % 64 == 0
        strategy, reasons = "stacked", ()
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", ".*batching rule.*")  # torch would loop, inside, and only warn
                traced = self._trace(strategy, probe)
        except Exception as error:  # what vmap cannot take, it says in many ways
            strategy = "loop"
            reasons = (f"the draws cannot be mapped together: {_first_line(error)}",)
            probe = self._state(torch.arange(1))
            try:
                traced = self._trace(strategy, probe)
            except Exception as reason:  # it has just run, so tracing is what fails
                raise ValueError(
                    f"the module runs, but cannot be traced: {_first_line(reason)}. What it computes may depend on the "
                    f"shapes of its inputs and not on their values: no `if` on a tensor, no .item(), no packed sequence"
                ) from reason
        found = self._cut(traced, probe)
        if found.random:
            raise NotImplementedError(
                f"the module calls {found.random} in prediction, which draws from torch's generator: no seed of a "
                f"predictor reaches it. Wrap the module in vbdl.MCDropout if it is dropout, or remove the call"
            )
        self._check_apart(outputs, first, tile)
        if not found.output_depends_on_draw:
            raise ValueError(
                f"nothing random reaches the output of this {type(self.posterior).__name__}: every sample would be "
                f"the same. See vbdl.inspect(module, example) for the stochastic sites"
            )
        self.plan: Plan = choose(
            found,
            strategy,
            traced_draws=next(iter(probe.values())).shape[0],
            n_samples=self.n_samples,
            tile=tensors(tile)[0].shape[0],
            memory_budget=self.settings.memory_budget,
            chunk_size=self.settings.chunk_size,
            reasons=(*reasons, *self.rewrites),
        )
        size = self.plan.chunk
        self._chunks = [
            _Chunk(torch.arange(start, start + size).clamp_max(self.n_samples - 1), min(size, self.n_samples - start))
            for start in range(0, self.n_samples, size)
        ]
        if next(iter(probe.values())).shape[0] != size:
            state = self._state(self._chunks[0].numbers)
            found = self._cut(self._trace(strategy, state), state)
        self._found = found
        self._measured.clear()
        self.parameter_shape = found.values[found.outputs[0]].meta["val"].shape[1:]

    def _plainly(self, probe: State, tile: Inputs) -> Tensor:
        """One draw run as it is, (rows, ...): what the module cannot take it says in torch's own words."""
        network = Observed(self.posterior.module, self.likelihood, self.settings.autocast)  # type: ignore[arg-type]
        buffers = {n for n, _ in network.named_buffers()}  # which a forward may write to
        state = {**self._shared, **select(probe, 0)}
        outputs = call(network, {n: t.clone() if n in buffers else t for n, t in state.items()}, tile)
        rows = tensors(tile)[0].shape[0]
        if outputs.shape[0] != rows:
            raise ValueError(
                f"the module returned {outputs.shape[0]} rows for a batch of {rows}: the batch is the first axis of "
                f"every input and of the output (batch_first=True in recurrent layers and attention)"
            )
        return outputs

    def _check_apart(self, outputs: Tensor, probe: State, tile: Inputs) -> None:
        """ValueError where a row's output is another one with other rows beside it."""
        alike = self._plainly(probe, map_inputs(lambda t: t[:1].expand_as(t).contiguous(), tile))
        scale = float(outputs.abs().nan_to_num(posinf=0.0).amax()) if outputs.numel() else 0.0
        modules = self.posterior.module.modules()
        unstable = any(isinstance(m, _BatchNorm) and m.running_mean is None for m in modules)
        if unstable or not torch.allclose(outputs[:1], alike[:1], rtol=_APART, atol=_APART * scale, equal_nan=True):
            raise ValueError(
                "the output of a row depends on the other rows of its batch, so there is no prediction of a row: the "
                "batch is the first axis of every input (batch_first=True in recurrent layers and attention), and "
                "batch normalisation needs track_running_stats=True"
            )

    def _state(self, numbers: Tensor) -> State:
        """Entries of these draws: of the network, and of the likelihood where each member has its own."""
        state = {f"network.{n}": t.detach() for n, t in self.posterior.draws(numbers, self.settings.seed).items()}
        which = numbers % self.posterior.n_members
        for name, t in self.members.items():
            state[f"likelihood.{name}"] = t.detach().index_select(0, which.to(t.device))
        return {n: t.to(self.device) for n, t in state.items()}

    def _trace(self, strategy: str, state: State) -> fx.GraphModule:
        """The call of these draws, (samples, rows, ...) parameters of p(y | x); linear layers are whole."""
        network = Observed(self.posterior.module, self.likelihood, self.settings.autocast)  # type: ignore[arg-type]

        def parameters(stacked: list[Tensor], shared: list[Tensor], tile: Inputs) -> tuple[Tensor]:
            entries = dict(zip(state, stacked, strict=True))
            rest = dict(zip(self._shared, shared, strict=True))
            execute = call_stacked if strategy == "stacked" else call_each
            return (execute(network, entries, rest, tile),)

        with WholeLinears():
            return trace(parameters, *self._arguments(state), aligned=False)

    def _arguments(self, state: State) -> tuple[list[Tensor], list[Tensor], Inputs]:
        return list(state.values()), list(self._shared.values()), self._tile

    def _cut(self, traced: fx.GraphModule, state: State) -> Cut:
        """A traced call, rewritten, its linear layers lowered to products, and cut."""
        kinds = [DRAWN] * len(state) + [ONCE] * len(self._shared) + [PREFIX] * len(tensors(self._tile))
        self.rewrites = rewrite(
            traced,
            kinds,
            rows=tensors(self._tile)[0].shape[0],
            n_samples=self.n_samples,
            budget=self.settings.memory_budget // 2,
            joint=self.settings.joint,
            largest_tile=self.settings.largest_tile,
            measure=lambda node, of: self._measure(traced, node, of),
        )
        free_layout(traced)
        lowered = trace(traced, *self._arguments(state), aligned=self._aligned, decompositions=DECOMPOSITIONS)
        return cut(lowered, kinds)

    def _measure(self, traced: fx.GraphModule, node: fx.Node, of: Callable[[Tensor], int]) -> int:
        """The largest of a drawn value's blocks of draws, over all draws whatever number it was traced with."""
        if node.name not in self._measured:
            part = part_of(traced, node)
            names = [n.name for n in traced.graph.nodes if n.op == "placeholder"]
            block = node.meta["val"].shape[0]
            found = []
            for start in range(0, self.n_samples, block):
                numbers = torch.arange(start, start + block).clamp_max(self.n_samples - 1)
                values = dict(zip(names, [*self._state(numbers).values(), *self._shared.values()], strict=False))
                found.append(of(part.graph(*[values[n] for n in part.inputs])[0]))
            self._measured[node.name] = max(found)
        return self._measured[node.name]

    def empty_sums(self) -> State:
        """Running sums of no draws, on one tile."""
        none = torch.zeros((1, *self.parameter_shape), device=self.device)
        return {n: torch.zeros_like(t) for n, t in self.likelihood.summarize(none).items()}

    def _program(self, count: int, finish: str) -> "_Program":
        """The call of this many draws that ends in "parameters", "sums" or "fields"; made when first asked for."""
        key = (count, finish)
        if key not in self._programs:
            regions = (PREFIX, BODY) if self.one_call else (BODY,)
            program = _Program(self._found, regions, self.settings.compile, self._aligned)
            program.finish(self.likelihood, finish, count, self.empty_sums() if finish == "sums" else {})
            if finish == "fields" and isinstance(self._tile, Tensor):
                program.checked = [self._found.placeholders[-1]]
            self._programs[key] = program
        return self._programs[key]

    # -- running it

    @property
    def one_call(self) -> bool:
        """Whether all draws are in one chunk."""
        return len(self._chunks) == 1

    def _drawn(self, chunk: _Chunk) -> dict[str, Tensor]:
        """What of a chunk does not depend on the input: made once where the plan keeps it."""
        if chunk.kept is not None:
            return chunk.kept
        found = self._found
        values = dict(
            zip(found.placeholders, [*self._state(chunk.numbers).values(), *self._shared.values()], strict=False)
        )
        if self._once is None:
            self._once = self._region(ONCE, values)
        values |= self._once
        values |= self._region(DRAWN, values)
        needed = {*found.regions[PREFIX].inputs, *found.regions[BODY].inputs}
        values = {n: t for n, t in values.items() if n in needed}
        if self.plan.keep_draws:
            chunk.kept = values
        return values

    def _region(self, which: int, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """What a region of the graph makes of these values."""
        region = self._found.regions[which]
        if region.empty:
            return {}
        with torch.no_grad():
            return dict(zip(region.outputs, region.graph(*[values[n] for n in region.inputs]), strict=True))

    def _run(self, chunk: _Chunk, finish: str, inputs: dict[str, Tensor], carried: State) -> State:
        program = self._program(chunk.count, finish)
        return program({**self._drawn(chunk), **inputs}, carried)

    def _inputs(self, tile: Inputs) -> dict[str, Tensor]:
        """The tile by placeholder; with several chunks, also what the layers before the first random one make of it."""
        found, given = self._found, tensors(tile)
        values = dict(zip(found.placeholders[-len(given) :], given, strict=True))
        if not self.one_call and not found.regions[PREFIX].empty:
            key = (0, "prefix")
            if key not in self._programs:
                program = _Program(found, (PREFIX,), self.settings.compile, self._aligned)
                self._programs[key] = program
            values.update(self._programs[key]({**self._drawn(self._chunks[0]), **values}, {}))
        return values

    def fields(self, tile: Inputs) -> State:
        """Fields of the prediction of a tile, all draws in one call."""
        return self._run(self._chunks[0], "fields", self._inputs(tile), {})

    def ready(self) -> "Ready | None":
        """The call of one tile alone, where all that it needs besides the tile is at hand; after a first `fields`."""
        program = self._programs.get((self._chunks[0].count, "fields"))
        kept = self._chunks[0].kept
        if program is None or kept is None or not isinstance(self._tile, Tensor):
            return None
        return program.ready(kept, self._found.placeholders[-1])

    def sums(self, tile: Inputs, carried: State) -> State:
        """Running sums of a tile with these draws added."""
        inputs = self._inputs(tile)
        for chunk in self._chunks:
            carried = self._run(chunk, "sums", inputs, carried)
        return carried

    @property
    def n_steps(self) -> int:
        """How many calls the draws are made in."""
        return len(self._chunks)

    def step_count(self, index: int) -> int:
        """Draws of one of these calls."""
        return self._chunks[index].count

    def begin(self, tile: Inputs) -> dict[str, Tensor]:
        """What the steps on a tile share."""
        return self._inputs(tile)

    def step(self, index: int, begun: dict[str, Tensor], carried: State, finish: str) -> State:
        """One of these calls: running sums with its draws added, or "parameters" of its draws."""
        return self._run(self._chunks[index], finish, begun, carried)

    def parameters(self, tile: Inputs) -> Tensor:
        """(samples, rows, ...) parameters of p(y | x), each draw's."""
        inputs = self._inputs(tile)
        return torch.cat([self._run(chunk, "parameters", inputs, {})["parameters"] for chunk in self._chunks])


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class _Program:
    """Regions of a cut, and what is made of their output, as one compiled call on named values."""

    def __init__(self, found: Cut, regions: tuple[int, ...], compile: bool, aligned: bool):
        self._regions = [found.regions[r] for r in regions if not found.regions[r].empty]
        made = {name for region in self._regions for name in region.outputs}
        self.inputs = list(dict.fromkeys(n for r in self._regions for n in r.inputs if n not in made))
        self.outputs = [name for region in self._regions for name in region.outputs]
        self._output, self._compile, self._aligned = found.outputs[0], compile, aligned
        self._call: Any = None
        self._graph: Any = None
        self._end: Any = None
        self.checked: list[str] = []

    def finish(self, likelihood: Likelihood, finish: str, count: int, carried: State) -> None:
        """End in the first `count` draws' parameters, their running sums added to `carried`, or the finished fields."""

        def end(parameters: Tensor, carried: State) -> State:
            parameters = parameters[:count]
            if finish == "parameters":
                return {"parameters": parameters}
            sums = likelihood.summarize(parameters)
            return likelihood.finish(sums) if finish == "fields" else likelihood.merge(carried, sums)

        self._end = end
        self._carried = list(carried)

    def _whole(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        values = dict(zip(self.inputs, arguments, strict=False))
        for region in self._regions:
            values.update(zip(region.outputs, region.graph(*[values[n] for n in region.inputs]), strict=True))
        if self._end is None:
            return tuple(values[n] for n in self.outputs)
        carried = dict(zip(self._carried, arguments[len(self.inputs) :], strict=True))
        ended = self._end(values[self._output], carried)
        self.outputs = list(ended)
        return (*ended.values(), *self._checks(values))

    def _checks(self, values: dict[str, Tensor]) -> list[Tensor]:
        """A number that is not finite if an input is not, for calls that nothing else has looked at."""
        return [values[n].sum() for n in self.checked if values[n].is_floating_point()]

    def __call__(self, values: dict[str, Tensor], carried: State) -> State:
        arguments = [*(values[n] for n in self.inputs), *carried.values()]
        if self._call is None:
            examples = [t.detach() for t in arguments]
            with torch.no_grad(), _tracing():
                self._graph = trace(self._whole, *examples, aligned=self._aligned)
                if self._compile and on_cpu(examples):  # measured there alone
                    transpose_last(self._graph)
                self._call = compile_graph(self._graph, examples) if self._compile else self._graph
        if torch.is_grad_enabled() and any(t.requires_grad for t in arguments):
            found = _Differentiable(self._graph).run(*arguments)  # what is compiled has no gradient
            return dict(zip(self.outputs, found, strict=False))
        with torch.no_grad():
            return dict(zip(self.outputs, self._call(*arguments), strict=False))

    def ready(self, kept: dict[str, Tensor], tile: str) -> "Ready | None":
        if tile not in self.inputs or self._call is None or self._call is self._graph:
            return None
        return Ready(self._call, [kept.get(n) for n in self.inputs], self.inputs.index(tile), self.outputs)


class _Differentiable(fx.Interpreter):
    """A graph operation by operation, kernels with their derivatives."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().call_function(with_derivative(target), args, kwargs)


class Ready:
    """A compiled call of which only the tile is missing, for networks so small that the way to the call counts."""

    def __init__(self, call: Callable, arguments: list[Any], place: int, names: list[str]):
        self._call, self._arguments, self._place, self._names = call, arguments, place, names

    def __call__(self, tile: Tensor) -> State | None:
        """Fields of the prediction; None where an input is not finite, or its sum overflows."""
        found = self._found(tile)
        if len(found) > len(self._names) and not math.isfinite(found[-1].item()):
            return None
        return dict(zip(self._names, found, strict=False))

    def checked(self, tile: Tensor) -> State:
        """The same for a tile that has been looked at."""
        return dict(zip(self._names, self._found(tile), strict=False))

    def _found(self, tile: Tensor) -> Any:
        arguments = self._arguments.copy()
        arguments[self._place] = aligned(tile)
        return self._call(*arguments)


_lock = threading.RLock()


@contextlib.contextmanager
def _tracing() -> Iterator[None]:
    """For one thread at a time, because tracing and compiling change settings of the whole process; without the fused
    transformer and attention kernels, which have no batching rule."""
    with _lock, sdpa_kernel(SDPBackend.MATH):
        before = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        # torch 2.13 logs the whole traceback of an operation that does not fit; it is raised as well, and said once
        log = logging.getLogger("torch._subclasses.fake_tensor")
        level = log.level
        log.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            log.setLevel(level)
            torch.backends.mha.set_fastpath_enabled(before)


def aligned(t: Tensor) -> Tensor:
    """Contiguous, and from a boundary on, as all that torch allocates: products round by how their inputs lie."""
    if t.is_contiguous() and t.data_ptr() % 64 == 0:
        return t
    return t.clone(memory_format=torch.contiguous_format)


def pad(inputs: Inputs, start: int, rows: int) -> Inputs:
    """Rows [start, start + rows) of every tensor, the last row repeated where there are fewer; contiguous."""

    def one(t: Tensor) -> Tensor:
        piece = t[start : start + rows]
        if piece.shape[0] == rows:
            return aligned(piece)
        padded = t.new_zeros(rows, *t.shape[1:])
        padded[: piece.shape[0]] = piece
        if piece.shape[0]:
            padded[piece.shape[0] :] = piece[-1:]
        return padded

    return map_inputs(one, inputs)
