"""One architecture at one shape of input: traced, cut, planned, compiled, and ready to be called.

An execution is made once and never changes; calls share nothing that they write to, so threads may call it together.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from vbdl.autograd import only_forwards
from vbdl.graph import BODY, DRAWN, ONCE, PREFIX, Cut, cut, part_of, trace
from vbdl.model import Model
from vbdl.plan import Plan, choose
from vbdl.program import Program, Ready, tracing
from vbdl.rewrite import rewrite
from vbdl.rewrite.linear import DECOMPOSITIONS, WholeLinears, free_layout
from vbdl.stacking import call_each, call_stacked, select, tensors
from vbdl.trial import check_apart, run_plainly
from vbdl.types import Inputs, State


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
        model: Model,
        tile: Inputs,  # (rows, ...) each
        settings: Settings,
        n_samples: int,
    ):
        self.model, self.posterior, self.likelihood = model, model.posterior, model.likelihood
        self.settings, self.n_samples = settings, n_samples
        self.device = tensors(tile)[0].device
        self._programs: dict[tuple[int, str], Program] = {}
        self._measured: dict[str, int] = {}
        self._once: dict[str, Tensor] | None = None  # what depends on neither draw nor input, one for all chunks
        self.warm: set[str] = set()  # ends of calls that are compiled: what the predictor need not hold its lock for
        with torch.no_grad(), tracing():
            self._prepare(tile)

    # -- making it

    def _prepare(self, tile: Inputs) -> None:
        """Trace a few draws, and let the plan choose from what is found."""
        self.posterior.prepare(tile)
        probe = self.entries(torch.arange(min(2, self.n_samples)))
        self.shared = {n: t.detach() for n, t in self.model.shared(probe).items()}
        self.tile = tile
        first = {**self.shared, **select(probe, 0)}
        outputs = run_plainly(self.model, first, tile)
        # rows that lie alike round alike: promised for tiles of multiples of 64 rows, and of no use to one row
        self.aligned = tensors(tile)[0].shape[0] % 64 == 0
        strategy, reasons = "stacked", ()
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", ".*batching rule.*")  # torch would loop, inside, and only warn
                traced = self.trace(strategy, probe)
        except Exception as error:  # what vmap cannot take, it says in many ways
            strategy = "loop"
            reasons = (f"the draws cannot be mapped together: {_first_line(error)}",)
            probe = self.entries(torch.arange(1))
            try:
                traced = self.trace(strategy, probe)
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
        check_apart(outputs, self.model, first, tile)
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
            state = self.entries(self._chunks[0].numbers)
            found = self._cut(self.trace(strategy, state), state)
        self._found = found
        self._measured.clear()
        parameters = found.values[found.outputs[0]].meta["val"]
        self.parameter_shape, self.parameter_dtype = parameters.shape[1:], parameters.dtype

    def entries(self, numbers: Tensor) -> State:
        """What these draws have of their own, (samples, ...) each, under the predictor's seed."""
        return self.model.entries(numbers, self.settings.seed)

    def trace(self, strategy: str, state: State) -> fx.GraphModule:
        """The call of these draws, (samples, rows, ...) parameters of p(y | x); linear layers are whole."""

        def parameters(stacked: list[Tensor], shared: list[Tensor], tile: Inputs) -> tuple[Tensor]:
            entries = dict(zip(state, stacked, strict=True))
            rest = dict(zip(self.shared, shared, strict=True))
            execute = call_stacked if strategy == "stacked" else call_each
            return (execute(self.model, entries, rest, tile),)

        with WholeLinears(), only_forwards() as names:
            traced = trace(parameters, *self._arguments(state), aligned=False)
        self.handwritten = sorted(set(names))
        return traced

    def _arguments(self, state: State) -> tuple[list[Tensor], list[Tensor], Inputs]:
        return list(state.values()), list(self.shared.values()), self.tile

    def _cut(self, traced: fx.GraphModule, state: State) -> Cut:
        """A traced call, rewritten, its linear layers lowered to products, and cut."""
        kinds = [DRAWN] * len(state) + [ONCE] * len(self.shared) + [PREFIX] * len(tensors(self.tile))
        self.rewrites = rewrite(
            traced,
            kinds,
            rows=tensors(self.tile)[0].shape[0],
            n_samples=self.n_samples,
            budget=self.settings.memory_budget // 2,
            joint=self.settings.joint,
            largest_tile=self.settings.largest_tile,
            measure=lambda node, of: self._measure(traced, node, of),
        )
        free_layout(traced)
        lowered = trace(traced, *self._arguments(state), aligned=self.aligned, decompositions=DECOMPOSITIONS)
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
                values = dict(zip(names, [*self.entries(numbers).values(), *self.shared.values()], strict=False))
                found.append(of(part.graph(*[values[n] for n in part.inputs])[0]))
            self._measured[node.name] = max(found)
        return self._measured[node.name]

    def empty_sums(self) -> State:
        """Running sums of no draws, on one tile, in the dtype that draws add to: it is compiled for."""
        none = torch.zeros((1, *self.parameter_shape), dtype=self.parameter_dtype, device=self.device)
        return {n: torch.zeros_like(t) for n, t in self.likelihood.summarize(none).items()}

    def _program(self, count: int, finish: str) -> Program:
        """The call of this many draws that ends in "parameters", "sums" or "fields"; made when first asked for."""
        key = (count, finish)
        if key not in self._programs:
            regions = (PREFIX, BODY) if self.one_call else (BODY,)
            program = Program(self._found, regions, self.settings.compile, self.aligned, self.handwritten)
            program.finish(self.likelihood, finish, count, self.empty_sums() if finish == "sums" else {})
            if finish == "fields" and isinstance(self.tile, Tensor):
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
            zip(found.placeholders, [*self.entries(chunk.numbers).values(), *self.shared.values()], strict=False)
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
                program = Program(found, (PREFIX,), self.settings.compile, self.aligned, self.handwritten)
                self._programs[key] = program
            values.update(self._programs[key]({**self._drawn(self._chunks[0]), **values}, {}))
        return values

    def fields(self, tile: Inputs) -> State:
        """Fields of the prediction of a tile, all draws in one call."""
        return self._run(self._chunks[0], "fields", self._inputs(tile), {})

    def ready(self) -> Ready | None:
        """The call of one tile alone, where all that it needs besides the tile is at hand; after a first `fields`."""
        program = self._programs.get((self._chunks[0].count, "fields"))
        kept = self._chunks[0].kept
        if program is None or kept is None or not isinstance(self.tile, Tensor):
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
