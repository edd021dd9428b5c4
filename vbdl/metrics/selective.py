"""Selective prediction: the loss of what is kept when the most uncertain rows are refused.

Geifman, Uziel, El-Yaniv, Bias-Reduced Uncertainty Estimation for Deep Neural Classifiers, 2019,
https://arxiv.org/abs/1805.08206 (AURC, E-AURC)

uncertainty: (batch,), lower is kept first. loss: (batch,), of any kind (0/1 errors, squared errors, costs). Rows of
equal uncertainty are kept in no particular order: where a cut falls inside such a group, the expected loss over its
orders counts, so the order of rows cannot matter. All rows are
needed and sorted once: for a stream wrap them, Rows(aurc).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vbdl.metrics._checks import check_scores
from vbdl.metrics._counts import at_least


def _check(uncertainty: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(loss, Tensor) and loss.dtype == torch.bool:
        loss = loss.to(torch.float64)
    uncertainty, loss = check_scores(uncertainty, "uncertainty"), check_scores(loss, "loss")
    if uncertainty.shape != loss.shape:
        raise ValueError(f"uncertainty has {uncertainty.numel()} rows, loss {loss.numel()}")
    return uncertainty, loss.to(uncertainty.device)


@dataclass(frozen=True)
class RiskCoverage:
    """Mean loss of the k least uncertain rows, k = 1..batch."""

    coverage: Tensor  # (batch,) k / batch
    risk: Tensor  # (batch,) loss units


def risk_coverage(uncertainty: Tensor, loss: Tensor) -> RiskCoverage:
    """The whole risk-coverage curve: uncertainty, loss (batch,) -> coverage, risk (batch,)."""
    uncertainty, loss = _check(uncertainty, loss)
    n = loss.numel()
    _, inverse, counts = uncertainty.unique(return_inverse=True, return_counts=True)
    zeros = torch.zeros(counts.numel(), dtype=torch.float64, device=loss.device)
    group_mean = zeros.index_add(0, inverse, loss) / counts
    kept = torch.arange(1, n + 1, dtype=torch.float64, device=loss.device)
    return RiskCoverage(kept / n, group_mean.repeat_interleave(counts).cumsum(0) / kept)


def aurc(uncertainty: Tensor, loss: Tensor) -> float:
    """Area under the risk-coverage curve: the mean of its risks over k = 1..batch, loss units."""
    return float(risk_coverage(uncertainty, loss).risk.mean())


def excess_aurc(uncertainty: Tensor, loss: Tensor) -> float:
    """E-AURC: AURC minus that of the best possible order (by the loss itself); at least 0.

    The optimum is computed exactly, not by the approximation r + (1 - r) log(1 - r).
    """
    uncertainty, loss = _check(uncertainty, loss)
    return aurc(uncertainty, loss) - aurc(loss, loss)


def _n_kept(coverage: float, n: int) -> int:
    if not 0 < coverage <= 1:
        raise ValueError(f"coverage must lie in (0, 1], not {coverage}")
    return max(1, at_least(coverage, n))


def risk_at_coverage(uncertainty: Tensor, loss: Tensor, coverage: float) -> float:
    """Mean loss of the ceil(coverage · batch) least uncertain rows, loss units."""
    curve = risk_coverage(uncertainty, loss)
    return float(curve.risk[_n_kept(coverage, curve.risk.numel()) - 1])


def coverage_at_risk(uncertainty: Tensor, loss: Tensor, risk: float) -> float:
    """Largest coverage that some threshold on the uncertainty reaches with mean loss <= risk; 0 if none.

    Only cuts between different uncertainties count, since a threshold can make no other. This is the empirical figure;
    for one that holds on new rows see vbdl.decision.Referral.
    """
    uncertainty, loss = _check(uncertainty, loss)
    curve = risk_coverage(uncertainty, loss)
    ordered = uncertainty.sort().values
    cut = torch.ones_like(ordered, dtype=torch.bool)
    cut[:-1] = ordered[1:] > ordered[:-1]
    # a sum of n losses carries n roundings; a risk equal to the target must not fail by one
    allowed = cut & (curve.risk <= risk + 1e-12 * max(1.0, abs(risk)))
    return float(curve.coverage[allowed].max()) if bool(allowed.any()) else 0.0
