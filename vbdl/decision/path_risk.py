"""Probability that a predicted path crosses a bound within its horizon.

The predictive samples are whole paths: each is one function of the inputs, so that its steps belong together, and the
probability counts paths and not steps.
"""

from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor

from vbdl.metrics._checks import check_rate


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
