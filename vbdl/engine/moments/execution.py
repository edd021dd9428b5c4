"""A posterior at one shape of input, predicted by moments: traced, interpreted, compiled like an Execution."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from vbdl.calling.inputs import Flat, rebuilt
from vbdl.calling.stacking import call, select
from vbdl.compiling.compiler import compile_graph
from vbdl.compiling.graph import trace
from vbdl.engine.execution import Execution
from vbdl.engine.moments.interpret import dependent, run
from vbdl.engine.moments.value import Moments
from vbdl.engine.program import tracing
from vbdl.engine.settings import PredictorSettings
from vbdl.model import Model
from vbdl.types import State

NODES = 256  # points of p(y | x)'s parameters that its moments are read from
_MOST_DIMENSIONS = 4096


@dataclass(frozen=True)
class MomentPlan:
    """What is done instead of drawing, and what it costs in accuracy."""

    execution: "MomentExecution"
    strategy: str = "moments"

    def explain(self) -> str:
        """The estimator in words, and its error against sampling on the example, a line each."""
        return "\n".join(
            [
                "strategy       moments: one deterministic pass with means and variances, AN APPROXIMATION: values are "
                "taken to be normal and independent",
                f"predictive     {NODES} fixed points of the parameters' distribution",
                f"against sampling, {self.execution.n_samples} draws, on the example: {self.execution.error()}",
            ]
        )


class MomentExecution:
    """Draws of one posterior on tiles of one shape, replaced by the moments of their outputs.

    Raises ValueError for an ensemble, and for an operation that has no rule.
    """

    one_call = True

    def __init__(
        self,
        model: Model,
        tile: Flat,  # (rows, ...) each
        settings: PredictorSettings,
        n_samples: int,  # draws that `error` compares with
    ):
        if model.posterior.n_members > 1:
            raise ValueError(
                "estimator='moments' is for MC dropout and mean-field networks: the members of an ensemble are few and "
                "given, so that their average is exact and costs no more than a pass each. Use estimator='sampling'"
            )
        if settings.autocast is not None:
            raise ValueError("estimator='moments' computes in the network's own dtype: leave out autocast")
        self.model, self.likelihood, self.settings = model, model.likelihood, settings
        self.n_samples, self._tile = n_samples, tile
        self.compiled: set[str] = set()  # names of the calls that are compiled, which need no lock any more
        self.plan = MomentPlan(self)
        self._call: Any = None
        self._graph: Any = None
        with torch.no_grad(), tracing():
            self._prepare()

    def _prepare(self) -> None:
        """Trace one draw, and compute all that does not depend on the input: moments of weights and of masks."""
        self.model.posterior.prepare(self._tile.nested)
        stacked = self.model.entries(torch.arange(1), self.settings.seed)
        shared = {n: t.detach() for n, t in self.model.shared(stacked).items()}

        def parameters(entries: list[Tensor], rest: list[Tensor], tile: list[Tensor]) -> tuple[Tensor]:
            one = select(dict(zip(stacked, entries, strict=True)), 0)
            inputs = rebuilt(self._tile.structure, tile)
            return (call(self.model, {**dict(zip(shared, rest, strict=True)), **one}, inputs),)

        given = [*stacked.values(), *shared.values()]
        self._traced = trace(parameters, list(stacked.values()), list(shared.values()), self._tensors(), aligned=False)
        nodes = list(self._traced.graph.nodes)
        places = [n for n in nodes if n.op == "placeholder"]
        (self._output,) = next(n for n in nodes if n.op == "output").args[0]
        self._inputs = places[len(given) :]
        moving = dependent(self._traced.graph, [n.name for n in self._inputs])
        self._moving = [n for n in nodes if n in moving and n.op != "output"]
        still = run(
            self._traced,
            [n for n in nodes if n not in moving and n.op != "output"],
            dict(zip(places, given, strict=False)),
        )
        self._kept = {n: still[n] for n in still if any(user in moving for user in n.users)}
        found = run(self._traced, self._moving, {**self._kept, **dict(zip(self._inputs, self._tensors(), strict=True))})
        outputs = found.get(self._output)
        if not isinstance(outputs, Moments):
            raise ValueError(f"nothing random reaches the output of this {type(self.model.posterior).__name__}")
        self.parameter_shape = outputs.shape
        self._points = _normal_points(tuple(outputs.shape[1:])).to(outputs.mean)

    def _tensors(self) -> list[Tensor]:
        return list(self._tile.tensors)

    # -- running it

    def _whole(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        n = len(self._inputs)
        values = dict(zip(self._inputs, arguments[:n], strict=True))
        outputs: Moments = run(self._traced, self._moving, {**_filled(self._kept, arguments[n:-1]), **values})[
            self._output
        ]
        points = arguments[-1]  # (points, 1, ...) standard normals
        fields = self.likelihood.finish(self.likelihood.summarize(outputs.mean + outputs.var.sqrt() * points))
        if "standard_error" in fields:
            # nothing was drawn, so nothing says how far off this is
            fields["standard_error"] = torch.full_like(fields["standard_error"], torch.nan)
        self._names = list(fields)
        return tuple(fields.values())

    def fields(self, tile: Flat) -> State:
        """Fields of the prediction of a tile."""
        arguments = [*tile.tensors, *_tensors_of(self._kept), self._points]
        if self._call is None:
            examples = [t.detach() for t in arguments]
            with torch.no_grad(), tracing():
                self._graph = trace(self._whole, *examples)
                self._call = compile_graph(self._graph, examples) if self.settings.compile else self._graph
        if torch.is_grad_enabled() and any(t.requires_grad for t in arguments):
            return dict(zip(self._names, self._graph(*arguments), strict=True))
        with torch.no_grad():
            return dict(zip(self._names, self._call(*arguments), strict=True))

    def ready(self) -> None:
        """No shorter way than `fields`."""
        return None

    def moments(self, tile: Flat) -> tuple[Tensor, Tensor]:
        """Mean and variance of the parameters of p(y | x) over draws: (rows, ...) each."""
        with torch.no_grad():
            values = dict(zip(self._inputs, tile.tensors, strict=True))
            outputs: Moments = run(self._traced, self._moving, {**self._kept, **values})[self._output]
        return outputs.mean, outputs.var

    def parameters(self, tile: Flat) -> Tensor:
        raise ValueError("estimator='moments' draws nothing: samples and log_prob need estimator='sampling'")

    def error(self) -> str:
        """How far the prediction of the example is from that of sampling."""
        settings = dataclasses.replace(self.settings, compile=False)
        sampling = Execution(self.model, self._tile, settings, self.n_samples)
        drawn = self.likelihood.finish(sampling.sums(self._tile, sampling.empty_sums()))
        found = self.fields(self._tile)
        first = next(n for n in ("probs", "mean") if n in found)
        far = (found[first] - drawn[first]).abs()
        said = (
            f"{first} differs by {float(far.mean()):.2g} on average and {float(far.max()):.2g} at most "
            f"(sampling's own standard error {float(drawn['standard_error'].mean()):.2g})"
        )
        ours, theirs = float(found["epistemic"].mean()), float(drawn["epistemic"].mean())
        return f"{said}; mean epistemic {ours:.3g}, by sampling {theirs:.3g}"


def _tensors_of(kept: dict[fx.Node, Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in kept.values():
        found += [value.mean, value.var] if isinstance(value, Moments) else [value] if isinstance(value, Tensor) else []
    return found


def _filled(kept: dict[fx.Node, Any], given: tuple[Tensor, ...]) -> dict[fx.Node, Any]:
    """`kept` with these tensors in place of its own, in the order of `_tensors_of`."""
    each, filled = iter(given), {}
    for node, value in kept.items():
        if isinstance(value, Moments):
            value = Moments(next(each), next(each))
        elif isinstance(value, Tensor):
            value = next(each)
        filled[node] = value
    return filled


def _normal_points(shape: tuple[int, ...]) -> Tensor:
    """(points, 1, ...) standard normals that fill the space evenly, with means 0 and variances 1 exactly.

    A scrambled Sobol sequence: the same points for every row and every predictor.
    """
    if _size(shape) > _MOST_DIMENSIONS:  # images of pixels: one point moves every pixel
        shape = (*[1] * (len(shape) - 1), shape[-1])
    engine = torch.quasirandom.SobolEngine(max(_size(shape), 1), scramble=True, seed=0)
    points = torch.special.ndtri(engine.draw(NODES).double().clamp(1e-6, 1 - 1e-6))
    points = (points - points.mean(0)) / points.std(0, correction=0)
    return points.view(NODES, 1, *shape)


def _size(shape: tuple[int, ...]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count
