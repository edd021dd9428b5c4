"""An execution: one model at one shape of input, ready to be called in chunks of draws.

There are two ways to run the draws: as the traced and planned graph, and with the network as it is (`plain.py`). Which
one is used follows from what the network computes (`ways.py`); with compile="background" the network as it is answers
until the graph is compiled. Calls share no data that they write to, so several threads may use an execution at once:
they read entries from one model, which is never called, and call or trace twins of it.
"""

import contextlib
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor

from vbdl.calling import freed
from vbdl.calling.graphs import in_words
from vbdl.calling.inputs import Flat
from vbdl.compiling.rewrite import draws_outputs, layers_that_draw_outputs
from vbdl.engine import background, remembered
from vbdl.engine.chunking import Calls, Chunking
from vbdl.engine.first_run import FirstRun
from vbdl.engine.plain import Plain, PlainCalls, PlainPlan, draws_in_a_call, wants_gradient
from vbdl.engine.plan import Plan, choose
from vbdl.engine.prepared import prepared
from vbdl.engine.program import Ready, tracing
from vbdl.engine.remembered import Memory
from vbdl.engine.settings import PredictorSettings
from vbdl.engine.traced import CannotTrace, Traced
from vbdl.engine.trial import draws_by_itself
from vbdl.engine.ways import MEASURE, PLAIN, after_tracing, before_tracing
from vbdl.model import Model
from vbdl.nn.keyed import KeyedNetwork
from vbdl.types import State

_ONE_DRAW = "the posterior is one network, which knows no epistemic uncertainty: epistemic is 0, aleatoric is total"
_CLEARLY = 0.97  # the graph has to take less than this of the time: it needs the members' weights stacked
_FEWEST, _ROUNDS, _ENOUGH = 3, 9, 200.0  # both ways are timed in turn: at least and at most so often, or milliseconds
_PART = 32  # draws that are timed for all where they run one after the other


@dataclass(frozen=True)
class _Way:
    """One way to run the draws: its plan, and the calls of all draws."""

    plan: Plan | PlainPlan
    calls: Calls


class Execution:
    """The execution of draws 0, 1, ..., n_samples - 1 of one model on tiles of one shape.

    Raises ValueError, with the reason, if the module cannot be executed.
    """

    def __init__(
        self,
        model: Model,
        tile: Flat,  # (rows, ...) each
        settings: PredictorSettings,
        n_samples: int,
    ):
        self.likelihood, self.n_samples, self._settings = model.likelihood, n_samples, settings
        self.compiled: set[str] = set()  # names of the calls that are compiled: these need no lock
        self._traced: Traced | None = None
        self._graph_plan: Plan | None = None
        self._undecided: str | None = None  # why both ways are to be timed
        self._traced_before: tuple[_Way, str | None] | None = None  # what was chosen before the background began
        self._planned = threading.Event()  # set once it is known what the graph is
        self._job: Future[None] | None = None
        self._starting = threading.Lock()
        self._plain: Plain | None = None
        self._behind = settings.compile == "background"  # whether the graph is still being compiled
        self._name: str | None = None  # under which later processes find what this one finds out
        self._memory: Memory | None = None  # what earlier processes found out
        freed.keep()
        with torch.no_grad(), contextlib.nullcontext() if self._behind else tracing():
            self._model = prepared(model, tile.nested)
            self._first = FirstRun(self._model, tile, settings, n_samples)
        self._tile = self._first.tile
        self.parameter_shape, self._dtype = self._first.shape, self._first.dtype
        if self._behind:
            self._way = self._meanwhile()
        else:
            self._way, self._undecided = self._chosen()
        if self._plain is None and self._undecided is None:
            self._first.run = None  # which holds weights of a draw
        self._steps: dict[tuple[bool, int], Calls] = {}
        self._answered = False
        self._waits = False  # whether calls wait for the compiler, as in `Predictor.warm_up`
        self._later: dict[str, Future[None]] = {}  # calls that are compiled in the background once they were needed
        self._holder: weakref.ref | None = None  # who alone calls this execution, once it is known

    def belongs_to(self, holder: object) -> None:
        """Leave out compiling in the background that is still to come once this object is gone."""
        self._holder = weakref.ref(holder)

    @property
    def _is_wanted(self) -> bool:
        return self._holder is None or self._holder() is not None

    @property
    def plan(self) -> Plan | PlainPlan:
        """The plan by which draws are executed now."""
        return self._way.plan

    @property
    def traced(self) -> Traced:
        """The model as graphs. Raises ValueError, with the reason, if it cannot be traced."""
        if self._traced is None:
            self._graph()
        assert self._traced is not None
        return self._traced

    @property
    def graph_plan(self) -> Plan:
        """The plan for the model as graphs. Raises ValueError, with the reason, if it cannot be traced."""
        if self._graph_plan is None:
            self._graph()
        assert self._graph_plan is not None
        return self._graph_plan

    # -- the two ways

    def _as_it_is(self, *reasons: str, mapping: bool = False) -> _Way:
        """The way that runs the network as it is, for these reasons; mapping: all draws together if that is faster."""
        with self._starting:
            if self._plain is None:
                before, self._first.run = self._first.run, None
                self._plain = Plain(
                    self._model,
                    self._tile,
                    self._settings,
                    self.n_samples,
                    self._first.local_layers,
                    before,
                    self._first.written,
                )
            plain = self._plain
        if mapping and (reason := plain.map_if_faster()):
            reasons = (*reasons, reason)
        draws = min(plain.most_draws, self._settings.chunk_size or self.n_samples)
        if plain.repeated and (most := draws_in_a_call(plain.network, self._tile)) < draws:
            reasons = (*reasons, f"at most {most} draws run at once, so that a cache holds their largest value")
        plan = PlainPlan(plain.strategy, self.n_samples, draws, self._tile.rows, reasons)
        return _Way(plan, PlainCalls(plain, draws))

    def _staying(self, way: _Way, lay_out: bool = False) -> _Way:
        """A way that stays; the network as it is then holds the entries of members.

        lay_out: whether to lay out weights of convolutions for it.
        """
        if self._plain is None or not isinstance(way.plan, PlainPlan) or not self._plain.hold_members(lay_out):
            return way
        return _Way(way.plan.because("weights of convolutions are held with channels last"), way.calls)

    def _graph(self) -> tuple[_Way, str, str]:
        """Trace a draw or two; return the way that runs the graph, and what `ways.after_tracing` says of it."""
        few_draws = None if self._memory is None else self._memory.chunk
        with torch.no_grad(), tracing():
            traced = Traced(self._model, self._tile, self._settings, self.n_samples, few_draws)
            few, n_few, reasons = traced.probe()
            if few.random:
                raise draws_by_itself(f"calls {few.random}, which draws")
            one = self._model.posterior.n_draws == 1
            if not few.output_depends_on_draw and not one:
                raise ValueError(
                    f"nothing random reaches the output of this {type(self._model.posterior).__name__}: every sample "
                    f"would be the same. See vbdl.inspect(module, example) for the stochastic sites"
                )
            plan = choose(
                few,
                traced.strategy,
                traced_draws=n_few,
                n_samples=self.n_samples,
                tile=traced.rows,
                memory_budget=self._settings.memory_budget,
                chunk_size=self._settings.chunk_size,
                reasons=(*reasons, *traced.rewrites, *([_ONE_DRAW] if one else [])),
                entry_bytes=traced.entry_bytes(few),
            )
            calls = Chunking(
                traced, plan.chunk, plan.keep_draws, few if n_few == plan.chunk else None, bool(self._settings.compile)
            )
            if plan.chunk != n_few and few_draws is not None:  # it is another network after all
                self._memory = None
                return self._graph()
        if plan.chunk != n_few:
            self._remember(Memory(plan.chunk))
        self._traced, self._graph_plan = traced, plan
        drawn = few.placeholders[: -len(traced.shared) - len(self._tile.tensors)]
        return _Way(plan, calls), *after_tracing(few, plan, drawn, self._settings)

    def _remember(self, memory: Memory) -> None:
        """Keep what was found out for later processes, if this one compiles."""
        self._memory = memory
        if self._name is not None:
            remembered.store(self._name, memory)

    def _recall(self) -> None:
        """Look up what an earlier process found out about this model, if it is to be compiled."""
        if self._settings.compile is not False and self._model.device.type == "cpu":
            self._name = remembered.name_of(self._model, self._tile, self._settings, self.n_samples)
            self._memory = None if self._name is None else remembered.load(self._name)

    def _chosen(self) -> tuple[_Way, str | None]:
        """Choose the way; if both are to be timed, return the graph, and the reason to time them."""
        network = self._model.network
        if isinstance(network, KeyedNetwork) and network.row_by_row and not self._settings.keeps_bits:
            return self._as_it_is("rows cannot share masks, so they run one after the other"), None
        verdict, reason = before_tracing(self._model, self._settings, self._first.own)
        if verdict == PLAIN:
            return self._staying(self._as_it_is(reason), lay_out=self._settings.compile is not False), None
        self._recall()
        if self._memory is not None and self._memory.plain:
            return self._staying(self._as_it_is(f"{self._memory.words} (in an earlier process)")), None
        try:
            way, verdict, reason = self._graph()
        except CannotTrace as error:
            with torch.no_grad():
                return self._staying(self._as_it_is(str(error), mapping=True)), None
        if self._first.local is not None and self._first.local != layers_that_draw_outputs(way.plan.reasons):
            return self._as_it_is("in a graph other layers would draw outputs than here, with other draws"), None
        if verdict == PLAIN:
            return self._staying(self._as_it_is(reason)), None
        if verdict == MEASURE and self._memory is not None and self._memory.plain is False:
            return _Way(way.plan.because(f"{self._memory.words} (in an earlier process)"), way.calls), None
        return way, reason if verdict == MEASURE else None

    def settle(self, tile: Flat) -> None:
        """Time both ways on this tile and keep the faster, once, if the plan could not tell which it is."""
        if self._undecided is None:
            return
        reason, self._undecided = self._undecided, None
        with torch.no_grad():  # a graph may have no gradient
            self._way = self._faster(self._way, self._as_it_is(), tile.map(Tensor.detach), reason)

    def _faster(self, graph: _Way, plain: _Way, tile: Flat, reason: str) -> _Way:
        """The faster of the two ways on a tile, with the times as a reason."""
        ways = (graph, self._staying(plain))  # holding parts of what is stacked takes no memory
        for way in ways:
            self._timed(way, tile)  # compiles, and makes the values that are kept
        rounds: list[tuple[float, ...]] = []
        while len(rounds) < _FEWEST or (len(rounds) < _ROUNDS and sum(map(sum, rounds)) < _ENOUGH):
            rounds.append(tuple(self._timed(way, tile) for way in ways))
        times = [min(each) for each in zip(*rounds, strict=True)]
        words = f"{reason}, so both were timed: {times[0]:.3g} ms as a graph, {times[1]:.3g} ms as it is"
        best = ways[times[1] * _CLEARLY < times[0]]
        self._remember(Memory(self.graph_plan.chunk, best is not graph, words))
        if best is graph and self._settings.compile is not False:
            self._fields(graph.calls, tile)  # compiles what was not timed
        return _Way(best.plan.because(words), best.calls)

    def _timed(self, way: _Way, tile: Flat) -> float:
        """The milliseconds of one prediction in this way; where draws run in turn, by those of the first draws."""
        calls, count = way.calls, len(way.calls)
        if way.plan.strategy in ("loop", "plain") and self.n_samples > _PART:
            calls = calls.of(_PART) if isinstance(calls, PlainCalls) else calls
            count = -(-_PART // calls.count(0))
        start = time.perf_counter()
        if count < len(calls):
            self._sums(calls, tile, self.empty_sums(tile.rows), count)
        else:
            self._fields(calls, tile)
        return (time.perf_counter() - start) * 1e3 * len(calls) / min(count, len(calls))

    # -- compiling in the background

    def _meanwhile(self) -> _Way:
        """The way that answers while the graph is being compiled: with the draws of the graph, up to rounding."""
        network = self._model.network
        waits = isinstance(network, KeyedNetwork) and network.draws_weights and not self._settings.joint
        if waits and self._first.local is None:
            self._traced_before = way, _ = self._chosen()
            if isinstance(way.calls, Chunking) and draws_outputs(way.plan.reasons):
                return _Way(way.plan, way.calls.uncompiled())
        return self._as_it_is("the graph is being compiled")

    def _begin(self) -> None:
        """Begin to compile in the background, once: after the first answer, which is then not slowed down by it."""
        if self._behind and self._job is None:
            with self._starting:
                if self._behind and self._job is None:
                    self._job = background.submit(self, Execution._compile_behind)

    def _compile_behind(self) -> None:
        """Trace, compile and time in the background, then put the faster way in the place of the network as it is.

        Raises ValueError or NotImplementedError for a module that must not be predicted with.
        """
        freed.give_back()  # what the first answer has freed: this thread cannot reuse another's
        try:
            self._first.check_apart()
            self._way = self._prepared()
            self._behind = False
        except (ValueError, NotImplementedError):
            raise
        except Exception as error:
            self._way = self._as_it_is(f"the graph could not be compiled: {in_words(error)}")
            self._behind = False
        finally:
            self._planned.set()

    def _prepared(self) -> _Way:
        """The way that is to be used, ready to run."""
        way, reason = self._traced_before or self._chosen()
        self._planned.set()
        if not self._is_wanted:  # tracing has taken a second, and Inductor takes longer
            return self._way
        if isinstance(way.calls, Chunking):
            with torch.no_grad():
                if reason is None:
                    self._let_go()  # first, because the graph keeps the same draws
                    if isinstance(way.plan, Plan) and way.plan.keep_draws:
                        self._fields(way.calls, self._tile)
                    else:
                        self._compile(way.calls, ("fields" if len(way.calls) == 1 else "sums",))
                else:
                    way = self._faster(way, self._as_it_is(), self._tile, reason)
            if isinstance(way.calls, Chunking):
                self._let_go()
                self.compiled = {"sums"}
        return way

    def _let_go(self) -> None:
        """Let the network as it is, for which a graph takes over, hold no draws, and give their memory back."""
        if self._plain is not None:
            self._plain.let_go()
            freed.give_back()

    def explain(self) -> str:
        """Describe how the draws are executed, and why; waits for the tracing, but not for the compiler."""
        if self._behind:
            self._begin()
            self._planned.wait()
        way, plan = self._way, self._graph_plan
        if self._behind and plan is not None:
            return f"{plan.explain()}\nuntil then     {way.plan.strategy}, uncompiled: the graph is being compiled"
        return way.plan.explain()

    def check(self, wait: bool, here: bool = False) -> None:
        """Raise what the background found wrong with the module, if it is known; wait: until it is.

        here: compile in this thread, which is the background.
        """
        if here and self._behind:
            return self._compile_behind()
        self._waits = wait
        if wait:
            self._begin()
        job = self._job
        if job is not None and (wait or job.done()):
            job.result()  # what it raises is raised in every call
            self._job = None

    # -- calls that are needed only now and then

    @property
    def compiling(self) -> bool:
        """Whether other calls than those of `fields` and `sums` are being compiled in the background."""
        return not all(job.done() for job in self._later.values())

    def _or_meanwhile(self, what: str, calls: Calls, needed: Sequence[str], otherwise: Callable[[], Calls]) -> Calls:
        """Calls of the graph or, while they are being compiled in the background, those of the network as it is.

        what: a name for the calls. needed: what they return, as `end` of `Calls.run`.
        """
        if self._settings.compile != "background" or self._behind or not isinstance(calls, Chunking):
            return calls
        if self._first.local is None and draws_outputs(self.graph_plan.reasons):
            return calls  # the network as it is would draw weights
        if what not in self._later:
            if self._waits:
                return calls
            with self._starting:
                if what not in self._later:
                    self._later[what] = background.submit(self, lambda self: self._compile(calls, needed))
        job = self._later[what]
        if self._waits:
            job.result()
        return calls if job.done() else otherwise()

    def _compile(self, calls: Calls, needed: Sequence[str]) -> None:
        """Run calls of each number of draws once, on the tile that the execution was made with."""
        if not self._is_wanted:
            return
        with torch.no_grad():
            inputs = calls.inputs(self._tile)
            for end in needed:
                for index in {calls.count(i): i for i in range(len(calls))}.values():
                    calls.run(index, end, inputs, self.empty_sums() if end == "sums" else None)

    @property
    def answers_as_it_is(self) -> bool:
        """Whether calls run the network as it is, which compiles nothing and needs no lock."""
        return isinstance(self._way.calls, PlainCalls) and self._undecided is None

    @property
    def stays_as_it_is(self) -> bool:
        """Whether no graph will take over."""
        return self.answers_as_it_is and not self._behind

    @property
    def is_warm(self) -> bool:
        """Whether a prediction would make and compile nothing.

        That is so of a network that runs as it is, now and later, and has run, and of a graph for some of the draws,
        which the background has run: there are no other calls of it for predictions.
        """
        if self._answered and self.stays_as_it_is:
            return True
        return self._settings.compile == "background" and not self._behind and len(self._way.calls) > 1

    # -- running

    def chunking(self, draws: int) -> Calls:
        """All draws in calls of at most `draws` each; made once for each number."""
        draws, way = min(draws, self.n_samples), self._way
        calls = self._in_steps(way.calls, way.plan.chunk, draws)
        if isinstance(calls, PlainCalls):
            return calls

        def otherwise() -> Calls:
            plain = self._as_it_is()
            return self._in_steps(plain.calls, plain.plan.chunk, draws)

        return self._or_meanwhile(f"steps of {draws}", calls, ("sums", "parameters"), otherwise)

    def _in_steps(self, calls: Calls, chunk: int, draws: int) -> Calls:
        """All draws in calls of `draws` each; calls: in calls of `chunk` each."""
        if draws == chunk:
            return calls
        key = (isinstance(calls, PlainCalls), draws)
        if key not in self._steps:
            self._steps[key] = calls.of(draws)
        return self._steps[key]

    @property
    def one_call(self) -> bool:
        """Whether one call executes all draws."""
        return len(self._way.calls) == 1

    def empty_sums(self, rows: int | None = None) -> State:
        """Running sums of zero draws for one tile, in the shapes and dtypes that the "sums" calls are compiled for.

        rows: the number of rows, if not that of a tile.
        """
        shape = (1, self.parameter_shape[0] if rows is None else rows, *self.parameter_shape[1:])
        zeros = torch.zeros(shape, dtype=self._dtype, device=self._tile.tensors[0].device)
        return {n: torch.zeros_like(t) for n, t in self.likelihood.summarize(zeros).items()}

    def fields(self, tile: Flat, rows: int | None = None) -> State:
        """The prediction's fields for a tile, if this execution has all draws.

        rows: the number of rows that count. Fields of the others, which pad the tile, may be left out.
        """
        calls = self._calls(tile)
        fields = self._fields(calls, _unpadded(calls, tile, rows))
        self._answered = True
        self._begin()
        return fields

    def _calls(self, tile: Flat) -> Calls:
        """The calls of the chosen way or, for a gradient that is written by hand, those of the network as it is."""
        calls = self._way.calls
        if isinstance(calls, PlainCalls) or not wants_gradient(tile) or not self.traced.handwritten:
            return calls
        if self._first.local is None and draws_outputs(self.graph_plan.reasons):
            return calls  # the network as it is has other draws: they raise the error
        return self._as_it_is().calls

    def _fields(self, calls: Calls, tile: Flat) -> State:
        if len(calls) == 1:
            return calls.run(0, "fields", calls.inputs(tile))
        return self.likelihood.finish(self._sums(calls, tile, self.empty_sums(tile.rows)))

    def ready(self) -> Ready | None:
        """The compiled call as a function of the tile alone, or None before it is compiled or if draws are not kept."""
        return self._way.calls.ready()

    def sums(self, tile: Flat, carried: State) -> State:
        """Add all draws of this execution to a tile's running sums, and return the new sums."""
        sums = self._sums(self._calls(tile), tile, carried)
        self._answered = True
        self._begin()
        return sums

    def _sums(self, calls: Calls, tile: Flat, carried: State, count: int | None = None) -> State:
        """Add draws to a tile's running sums; count: the number of the first calls, if not all."""
        inputs = calls.inputs(tile)
        for index in range(len(calls) if count is None else count):
            carried = calls.run(index, "sums", inputs, carried)
        return carried

    def parameters(self, tile: Flat, rows: int | None = None) -> Tensor:
        """The parameters of p(y | x) of each draw, (samples, rows, ...); rows: as of `fields`."""
        calls = self._calls(tile)
        calls = self._or_meanwhile("parameters", calls, ("parameters",), lambda: self._as_it_is().calls)
        tile = _unpadded(calls, tile, rows)
        inputs = calls.inputs(tile)
        return torch.cat([calls.run(index, "parameters", inputs)["parameters"] for index in range(len(calls))])


def _unpadded(calls: Calls, tile: Flat, rows: int | None) -> Flat:
    """A tile without its padding, if these calls take any number of rows."""
    if rows is None or rows == tile.rows or not (isinstance(calls, PlainCalls) and calls.any_rows):
        return tile
    return tile.map(lambda t: t[:rows])
