"""The moment execution: takes the place of an `Execution` and propagates moments instead of drawing."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from vbdl.calling.inputs import Flat, rebuilt
from vbdl.calling.stacking import call, select
from vbdl.compiling.compiler import compile_graph
from vbdl.compiling.graph import trace
from vbdl.compiling.rewrite.linear import DECOMPOSITIONS, WholeLinears
from vbdl.engine.execution import Execution
from vbdl.engine.moments.interpret import Values, dependent, run
from vbdl.engine.moments.linear import MOST_JOINT
from vbdl.engine.moments.value import Correlated, Moments
from vbdl.engine.prepared import prepared
from vbdl.engine.program import tracing
from vbdl.engine.settings import PredictorSettings
from vbdl.model import Model
from vbdl.types import State

NODES = 256  # quasi-random points of the parameters of p(y | x), which the likelihood averages over
_MOST_DIMENSIONS = 4096  # the largest number of parameters of a row that get points of their own


@dataclass(frozen=True)
class MomentPlan:
    """The plan of a moment execution; `explain` also measures the approximation's error."""

    execution: "MomentExecution"
    strategy: str = "moments"

    def explain(self) -> str:
        """Describe the estimator and its error against sampling on the example, one line for each."""
        return "\n".join(
            [
                "strategy       moments: one deterministic pass with means and variances, AN APPROXIMATION: values are "
                "assumed to be normal and independent",
                f"predictive     {NODES} fixed points of the parameters' distribution"
                + (", with the covariance of a row's outputs" if self.execution.joint else ""),
                f"against sampling, {self.execution.n_samples} draws, on the example: {self.execution.error()}",
            ]
        )


class MomentExecution:
    """The prediction of tiles of one shape from the mean and variance of the network's outputs over draws.

    Raises ValueError for an ensemble, for autocast, and for an operation that has no rule.
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
                "estimator='moments' is for posteriors of one network. An ensemble has few members, and their "
                "exact average costs one pass each: use estimator='sampling'"
            )
        if settings.autocast is not None:
            raise ValueError("estimator='moments' computes in the network's own dtype: leave out autocast")
        if model.features is not None:
            raise ValueError("a decision by distances needs estimator='sampling': moments are of outputs, not features")
        self.likelihood, self.settings = model.likelihood, settings
        self.n_samples, self._tile = n_samples, tile
        self.compiled: set[str] = set()  # names of the calls that are compiled: these need no lock
        self.plan = MomentPlan(self)
        self._call: Callable[..., Sequence[Tensor]] | None = None
        self._graph: fx.GraphModule | None = None
        with torch.no_grad(), tracing():
            self.model = prepared(model, tile.nested)
            self._prepare()

    def _prepare(self) -> None:
        """Trace one draw, and compute what does not depend on the input, such as the moments of weights and masks."""
        stacked = self.model.entries(torch.arange(1), self.settings.seed)
        shared = {n: t.detach() for n, t in self.model.shared(stacked).items()}
        called = self.model.twin()

        def parameters(entries: list[Tensor], rest: list[Tensor], tile: list[Tensor]) -> tuple[Tensor]:
            one = select(dict(zip(stacked, entries, strict=True)), 0)
            inputs = rebuilt(self._tile.structure, tile)
            return (call(called, {**dict(zip(shared, rest, strict=True)), **one}, inputs),)

        state = [*stacked.values(), *shared.values()]
        with WholeLinears():
            self._traced = trace(
                parameters, list(stacked.values()), list(shared.values()), self._tensors(), aligned=False
            )
        self._traced.graph.eliminate_dead_code()  # of forward-mode products, which may have no rule
        nodes = list(self._traced.graph.nodes)
        places = [n for n in nodes if n.op == "placeholder"]
        (self._output,) = next(n for n in nodes if n.op == "output").args[0]
        self._inputs = places[len(state) :]
        moving = dependent(self._traced.graph, [n.name for n in self._inputs])
        self._moving = [n for n in nodes if n in moving and n.op != "output"]
        still = run(
            self._traced,
            [n for n in nodes if n not in moving and n.op != "output"],
            dict(zip(places, state, strict=False)),
        )
        self._kept = {n: still[n] for n in still if any(user in moving for user in n.users)}
        tile_values = dict(zip(self._inputs, self._tensors(), strict=True))
        outputs = run(self._traced, self._moving, {**self._kept, **tile_values}).get(self._output)
        if not isinstance(outputs, Moments):
            name = type(self.model.posterior).__name__
            if list(stacked) != ["network.key"]:
                raise ValueError(
                    f"estimator='moments' follows noise that a network draws from its key, as that of MC dropout and "
                    f"mean-field, and {name} draws {', '.join(stacked)[:80]} outside of it: use estimator='sampling'"
                )
            raise ValueError(f"nothing random reaches the output of this {name}")
        self.parameter_shape = outputs.shape
        self.joint = isinstance(outputs, Correlated) and _size(tuple(outputs.shape[1:])) <= MOST_JOINT
        self._points = _normal_points(tuple(outputs.shape[1:]), uncorrelated=self.joint).to(outputs.mean)

    def explain(self) -> str:
        """Describe the estimator and its error."""
        return self.plan.explain()

    def check(self, wait: bool) -> None:
        """Nothing to wait for: moments are compiled at the first call."""

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
        deviations = _spread(outputs, points) if self.joint else outputs.var.sqrt() * points
        fields = self.likelihood.finish(self.likelihood.summarize(outputs.mean + deviations))
        if "standard_error" in fields:
            # without draws there is no estimate of the error
            fields["standard_error"] = torch.full_like(fields["standard_error"], torch.nan)
        self._names = list(fields)
        return tuple(fields.values())

    def fields(self, tile: Flat) -> State:
        """The prediction's fields for a tile."""
        arguments = [*tile.tensors, *_tensors_of(self._kept), self._points]
        if self._call is None or self._graph is None:
            examples = [t.detach() for t in arguments]
            with torch.no_grad(), tracing():
                self._graph = trace(self._whole, *examples, decompositions=DECOMPOSITIONS)
                self._call = compile_graph(self._graph, examples) if self.settings.compile else self._graph
        if torch.is_grad_enabled() and any(t.requires_grad for t in arguments):
            return dict(zip(self._names, self._graph(*arguments), strict=True))
        with torch.no_grad():
            return dict(zip(self._names, self._call(*arguments), strict=True))

    def ready(self) -> None:
        """Always None: a moment execution has no call of a tile alone."""
        return None

    def moments(self, tile: Flat) -> tuple[Tensor, Tensor]:
        """The mean and the variance of the parameters of p(y | x) over draws, (rows, ...) each."""
        with torch.no_grad():
            values = dict(zip(self._inputs, tile.tensors, strict=True))
            outputs: Moments = run(self._traced, self._moving, {**self._kept, **values})[self._output]
        return outputs.mean, outputs.var

    def parameters(self, tile: Flat) -> Tensor:
        raise ValueError("estimator='moments' draws nothing: for samples and log_prob use estimator='sampling'")

    def error(self) -> str:
        """Compare the prediction for the traced example to that of sampling, in words."""
        settings = dataclasses.replace(self.settings, compile=False)
        sampling = Execution(self.model, self._tile, settings, self.n_samples)
        drawn = self.likelihood.finish(sampling.sums(self._tile, sampling.empty_sums()))
        by_moments = self.fields(self._tile)
        name = next(n for n in ("probs", "mean") if n in by_moments)
        error = (by_moments[name] - drawn[name]).abs()
        epistemic, epistemic_drawn = float(by_moments["epistemic"].mean()), float(drawn["epistemic"].mean())
        return (
            f"{name} differs by {float(error.mean()):.2g} on average and {float(error.max()):.2g} at most "
            f"(sampling's own standard error {float(drawn['standard_error'].mean()):.2g}); "
            f"mean epistemic {epistemic:.3g}, by sampling {epistemic_drawn:.3g}"
        )


def _tensors_of(kept: Values) -> list[Tensor]:
    """The tensors among these values in a flat list; moments give all that they consist of."""
    tensors: list[Tensor] = []
    for value in kept.values():
        if isinstance(value, Moments):
            tensors += value.tensors()
        elif isinstance(value, Tensor):
            tensors.append(value)
    return tensors


def _filled(kept: Values, tensors: tuple[Tensor, ...]) -> Values:
    """A copy of `kept` whose tensors are replaced by these, in the order of `_tensors_of`."""
    each, filled = iter(tensors), Values()
    for node, value in kept.items():
        if isinstance(value, Moments):
            value = value.filled(each)
        elif isinstance(value, Tensor):
            value = next(each)
        filled[node] = value
    return filled


_JITTER = 1e-6  # added to correlations, so that the factorization of singular ones succeeds in float32


def _spread(outputs: Moments, points: Tensor) -> Tensor:
    """Deviations from the mean with the covariance of each row's outputs, (points, rows, ...).

    points: (points, 1, ...) standard normals.
    """
    assert isinstance(outputs, Correlated)
    root, own = outputs.root.flatten(1, -2), outputs.own.flatten(1)  # (rows, outputs, normals), (rows, outputs)
    std = outputs.var.flatten(1).sqrt()
    scale = torch.where(std > 0, std, 1.0)
    root = root / scale.unsqueeze(-1)
    correlation = root @ root.mT + torch.diag_embed(own / scale.square() + (std == 0) + _JITTER)
    factor = torch.linalg.cholesky_ex(correlation).L * std.unsqueeze(-1)
    return torch.einsum("rij,pj->pri", factor, points.flatten(1)).unflatten(2, outputs.shape[1:])


def _normal_points(shape: tuple[int, ...], uncorrelated: bool = False) -> Tensor:
    """Quasi-random standard normals, (points, 1, *shape), with means exactly 0 and variances exactly 1.

    A scrambled Sobol sequence with a fixed seed: the same points for every row and every predictor.
    uncorrelated: with covariances exactly 0 too, for fewer dimensions than points.
    """
    if _size(shape) > _MOST_DIMENSIONS:  # images of pixels: all pixels share the coordinates of a point
        shape = (*[1] * (len(shape) - 1), shape[-1])
    engine = torch.quasirandom.SobolEngine(max(_size(shape), 1), scramble=True, seed=0)
    points = torch.special.ndtri(engine.draw(NODES).double().clamp(1e-6, 1 - 1e-6))
    points = (points - points.mean(0)) / points.std(0, correction=0)
    if uncorrelated:
        covariance = points.mT @ points / NODES
        points = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), points.mT, upper=False).mT
    return points.view(NODES, 1, *shape)


def _size(shape: tuple[int, ...]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count
