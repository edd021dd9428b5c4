"""Probability that a predicted path crosses a bound within its horizon.

`path_risk` counts sampled paths, whatever made them; `PathBounds` is the closed form for the normals of a regression
predictor, draw by draw, and needs no sampling.

The predictive samples are whole paths: each is one function of the inputs, so that its steps belong together, and the
probability counts paths and not steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor, nn

from vbdl.decision.distribution import Distribution
from vbdl.likelihoods.mixture import averaged
from vbdl.metrics._checks import check_rate
from vbdl.metrics.intervals import normal_cdf


@dataclass(frozen=True)
class PathRisk:
    """probability: share of paths that leave the bounds. by_step is cumulative: crossed at or before."""

    probability: Tensor  # (batch,)
    upper: Tensor  # (batch,) exact one-sided bound on it, given this many samples
    by_step: Tensor  # (batch, horizon)


def path_risk(
    paths: Tensor,
    lower: float | Tensor | None = None,
    upper: float | Tensor | None = None,
    level: float = 0.95,
) -> PathRisk:
    """paths: (samples, batch, horizon), samples of the predictive including its noise.

    lower, upper: bounds, numbers or anything that broadcasts to (batch, horizon); at least one. A path that is not
    finite anywhere counts as crossing there: the safe reading of a broken number.
    level: confidence of `upper`, which is all that a few samples with no crossing can promise.
    """
    check_rate(level, "level")
    if paths.ndim != 3 or paths.shape[0] == 0 or paths.shape[2] == 0:
        raise ValueError(f"paths must be (samples, batch, horizon), not {tuple(paths.shape)}")
    if lower is None and upper is None:
        raise ValueError("give lower, upper or both: without a bound nothing can be crossed")
    outside = ~paths.isfinite()
    for bound, side in ((lower, -1), (upper, 1)):
        if bound is None:
            continue
        bound = torch.as_tensor(bound, dtype=paths.dtype, device=paths.device)
        if bool(bound.isnan().any()):
            raise ValueError("a bound is NaN")
        outside = outside | (side * (paths - bound) > 0)
    crossed = outside.cummax(dim=2).values  # (samples, batch, horizon)
    samples = paths.shape[0]
    count = crossed[:, :, -1].sum(dim=0)
    # Clopper-Pearson, one-sided
    ppf = stats.beta.ppf(level, count.cpu().numpy() + 1, (samples - count).clamp(min=1).cpu().numpy())
    bound = torch.from_numpy(ppf).to(paths.device, torch.float64)
    return PathRisk(
        probability=count.to(torch.float64) / samples,
        upper=torch.where(count == samples, 1.0, bound),
        by_step=crossed.to(torch.float64).mean(dim=0),
    )


class PathBounds(nn.Module):
    """Probability of each draw that its path leaves the bounds within the horizon, where outputs are the steps.

    Given the draw, steps are independent normals: 1 - Π_t P(lower_t <= y_t <= upper_t). The mean over draws is that of
    the whole predictive, exactly; steps of one path belong together through the draw that they share.

    lower, upper: numbers, (horizon,), or the axes of the targets behind the batch, in target units; at least one.
    Every element of a row is a step.
    """

    lower: Tensor | None
    upper: Tensor | None

    def __init__(self, lower: float | Tensor | None = None, upper: float | Tensor | None = None):
        super().__init__()
        if lower is None and upper is None:
            raise ValueError("give lower, upper or both: without a bound nothing can be crossed")
        for name, bound in (("lower", lower), ("upper", upper)):
            t = None if bound is None else torch.as_tensor(bound, dtype=torch.float64)
            if t is not None and bool(t.isnan().any()):
                raise ValueError(f"{name} must be a number or (horizon,), and not NaN")
            self.register_buffer(name, t)

    def forward(self, parameters: Tensor) -> Tensor:
        """(samples, batch, horizon, 2), or (samples, batch, ..., 2), mean and log-variance -> (samples, batch)"""
        self._check(tuple(parameters.shape))
        mean, log_variance = parameters.to(torch.float64).unbind(-1)
        return self._outside(mean, (0.5 * log_variance).exp(), self.lower, self.upper)

    def of(self, distribution: Distribution) -> Tensor:
        """(batch,) the probability for a calibrated predictive: bounds are put where their levels have moved."""
        mean, std = distribution.mean, distribution.std
        self._check((*mean.shape, 2))
        moved = [None if b is None else distribution.moved(b) for b in (self.lower, self.upper)]
        return averaged(self._outside(mean, std, *moved), distribution.weights)

    def _check(self, shape: tuple[int, ...]) -> None:
        if len(shape) < 4 or shape[-1] != 2:
            raise ValueError(
                "a path risk needs a regression whose outputs are the steps of the path, (samples, batch, horizon, 2), "
                f"not {shape}"
            )
        for name, bound in (("lower", self.lower), ("upper", self.upper)):
            if bound is None or bound.ndim == 0:
                continue
            steps = shape[2:-1]
            if bound.ndim > len(steps) or tuple(bound.shape) != steps[len(steps) - bound.ndim :]:
                raise ValueError(f"{name} has {_listed(bound.shape)} steps, and the path {_listed(steps)}")

    @staticmethod
    def _outside(mean: Tensor, std: Tensor, lower: Tensor | None, upper: Tensor | None) -> Tensor:
        # the smaller tails are added, so that a small risk is not lost beside a probability next to one
        outside = torch.zeros_like(mean)
        if lower is not None:
            outside = outside + normal_cdf((lower - mean) / std)
        if upper is not None:
            outside = outside + normal_cdf((mean - upper) / std)
        return -torch.expm1(torch.log1p(-outside.clamp(max=1)).flatten(2).sum(-1))


def _listed(shape: Sequence[int]) -> str:
    return " x ".join(str(n) for n in shape)
