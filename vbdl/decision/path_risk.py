"""The probability that a predicted path crosses a bound within its horizon.

`path_risk` counts sampled paths of any model; `PathBounds` computes the probability in closed form for each draw of a
regression predictor.

A sample is a whole path, whose steps are dependent, so the probability counts paths, not steps.
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
    """The risk of each path to leave its bounds, estimated from samples.

    >>> paths = torch.tensor([[[0.1, 0.2]], [[0.5, 1.5]]])  # (samples, rows, steps)
    >>> vbdl.decision.path_risk(paths, upper=1.0).by_step
    tensor([[0.0000, 0.5000]], dtype=torch.float64)
    """

    probability: Tensor  # (batch,) share of samples that leave the bounds
    upper: Tensor  # (batch,) exact one-sided upper confidence bound on the probability
    by_step: Tensor  # (batch, horizon) share of samples that have left the bounds at or before the step


def path_risk(
    paths: Tensor,
    lower: float | Tensor | None = None,
    upper: float | Tensor | None = None,
    level: float = 0.95,
) -> PathRisk:
    """Estimate the probability that a path leaves its bounds.

    paths: (samples, batch, horizon), samples of the predictive distribution including its noise. A value that is not
        finite counts as a crossing.
    lower, upper: bounds, numbers or tensors that broadcast to (batch, horizon); at least one.
    level: confidence level of the result's `upper`, which is informative even if no sample crosses.

    >>> paths = torch.tensor([[[0.1, 0.2]], [[0.5, 1.5]]])  # (samples, rows, steps)
    >>> vbdl.decision.path_risk(paths, upper=1.0).probability
    tensor([0.5000], dtype=torch.float64)
    """
    check_rate(level, "level")
    if paths.ndim != 3 or paths.shape[0] == 0 or paths.shape[2] == 0:
        raise ValueError(f"paths must be (samples, batch, horizon), not {tuple(paths.shape)}")
    if lower is None and upper is None:
        raise ValueError("give lower, upper or both; without a bound nothing can be crossed")
    outside = ~paths.isfinite()
    for bound, side in ((lower, -1), (upper, 1)):
        if bound is None:
            continue
        bound = torch.as_tensor(bound, dtype=paths.dtype, device=paths.device)
        if bool(bound.isnan().any()):
            raise ValueError("lower or upper is NaN; use -inf or inf for steps without a bound")
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
    """The probability of each draw that its path leaves the bounds, for a regression whose outputs are the steps.

    Given the draw, the steps are independent normals, so it is 1 - Π_t P(lower_t <= y_t <= upper_t). Its mean over
    draws is the exact probability under the predictive distribution, whose steps depend on each other through the draw.

    lower, upper: in units of the target, numbers, (horizon,), or of the shape of a row's targets; at least one. Every
        output of a row is a step.

    >>> bounds = vbdl.decision.PathBounds(-1.0, 1.0)
    >>> parameters = torch.zeros(2, 1, 3, 2)  # (samples, rows, steps, mean and log-variance)
    >>> bounds(parameters).round(decimals=3)
    tensor([[0.6820],
            [0.6820]], dtype=torch.float64)
    """

    lower: Tensor | None
    upper: Tensor | None

    def __init__(self, lower: float | Tensor | None = None, upper: float | Tensor | None = None):
        super().__init__()
        if lower is None and upper is None:
            raise ValueError("give lower, upper or both; without a bound nothing can be crossed")
        for name, bound in (("lower", lower), ("upper", upper)):
            t = None if bound is None else torch.as_tensor(bound, dtype=torch.float64)
            if t is not None and bool(t.isnan().any()):
                raise ValueError(f"{name} has a NaN; it must be a number or (horizon,)")
            self.register_buffer(name, t)

    def forward(self, parameters: Tensor) -> Tensor:
        """The probability of each draw: (samples, batch, horizon or ..., 2) mean, log-variance -> (samples, batch)."""
        self._check(tuple(parameters.shape))
        mean, log_variance = parameters.to(torch.float64).unbind(-1)
        return self._outside(mean, (0.5 * log_variance).exp(), self.lower, self.upper)

    def of(self, distribution: Distribution) -> Tensor:
        """The probability under a calibrated distribution, (batch,); recalibration is applied to the bounds."""
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
                raise ValueError(f"{name} has {_listed(bound.shape)} steps, but the path has {_listed(steps)}")

    @staticmethod
    def _outside(mean: Tensor, std: Tensor, lower: Tensor | None, upper: Tensor | None) -> Tensor:
        # sums the tail probabilities, so that a small risk is not lost by rounding next to one
        outside = torch.zeros_like(mean)
        if lower is not None:
            outside = outside + normal_cdf((lower - mean) / std)
        if upper is not None:
            outside = outside + normal_cdf((mean - upper) / std)
        return -torch.expm1(torch.log1p(-outside.clamp(max=1)).flatten(2).sum(-1))


def _listed(shape: Sequence[int]) -> str:
    return " x ".join(str(n) for n in shape)
