"""Metrics of selective prediction: the loss of the rows that are kept when the most uncertain ones are rejected.

Geifman, Uziel, El-Yaniv, Bias-Reduced Uncertainty Estimation for Deep Neural Classifiers, 2019,
https://arxiv.org/abs/1805.08206 (AURC, E-AURC)

uncertainty: (batch,), rows with lower uncertainty are kept first. loss: (batch,), of any kind (0/1 errors, squared
errors, costs). If a cut falls inside a group of rows with equal uncertainty, the expected loss over the orders of the
group is taken, so that the order of rows does not matter. All rows are needed at once: for a stream use Rows(aurc).
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
    """The risk-coverage curve: the mean loss of the k least uncertain rows for k = 1..batch.

    >>> uncertainty, wrong = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.0, 0.0, 1.0, 1.0])
    >>> vbdl.metrics.risk_coverage(uncertainty, wrong).coverage
    tensor([0.2500, 0.5000, 0.7500, 1.0000], dtype=torch.float64)
    """

    coverage: Tensor  # (batch,) k / batch
    risk: Tensor  # (batch,) in units of the loss


def risk_coverage(uncertainty: Tensor, loss: Tensor) -> RiskCoverage:
    """The risk-coverage curve. uncertainty, loss: (batch,)

    >>> uncertainty, wrong = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.0, 0.0, 1.0, 1.0])
    >>> vbdl.metrics.risk_coverage(uncertainty, wrong).risk.round(decimals=3)
    tensor([0.0000, 0.0000, 0.3330, 0.5000], dtype=torch.float64)
    """
    uncertainty, loss = _check(uncertainty, loss)
    n = loss.numel()
    _, inverse, counts = uncertainty.unique(return_inverse=True, return_counts=True)
    zeros = torch.zeros(counts.numel(), dtype=torch.float64, device=loss.device)
    group_mean = zeros.index_add(0, inverse, loss) / counts
    kept = torch.arange(1, n + 1, dtype=torch.float64, device=loss.device)
    return RiskCoverage(kept / n, group_mean.repeat_interleave(counts).cumsum(0) / kept)


def aurc(uncertainty: Tensor, loss: Tensor) -> float:
    """The area under the risk-coverage curve: the mean risk over k = 1..batch, in units of the loss.

    >>> uncertainty, wrong = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.0, 0.0, 1.0, 1.0])
    >>> round(vbdl.metrics.aurc(uncertainty, wrong), 3)
    0.208
    """
    return float(risk_coverage(uncertainty, loss).risk.mean())


def excess_aurc(uncertainty: Tensor, loss: Tensor) -> float:
    """The excess AURC: the AURC minus that of the best order, which is by the loss itself; at least 0.

    The best AURC is computed exactly, not by the approximation r + (1 - r) log(1 - r).

    >>> uncertainty, wrong = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.0, 0.0, 1.0, 1.0])
    >>> vbdl.metrics.excess_aurc(uncertainty, wrong)  # no order could be better
    0.0
    """
    uncertainty, loss = _check(uncertainty, loss)
    return aurc(uncertainty, loss) - aurc(loss, loss)


def _n_kept(coverage: float, n: int) -> int:
    if not 0 < coverage <= 1:
        raise ValueError(f"coverage must lie in (0, 1], not {coverage}")
    return max(1, at_least(coverage, n))


def risk_at_coverage(uncertainty: Tensor, loss: Tensor, coverage: float) -> float:
    """The mean loss of the ceil(coverage · batch) least uncertain rows, in units of the loss.

    >>> uncertainty, wrong = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.0, 0.0, 1.0, 1.0])
    >>> vbdl.metrics.risk_at_coverage(uncertainty, wrong, coverage=0.5)
    0.0
    """
    curve = risk_coverage(uncertainty, loss)
    return float(curve.risk[_n_kept(coverage, curve.risk.numel()) - 1])


def coverage_at_risk(uncertainty: Tensor, loss: Tensor, risk: float) -> float:
    """The largest coverage at which a threshold on the uncertainty keeps rows with mean loss <= risk; 0 if none does.

    Rows of equal uncertainty are kept or rejected together. This describes the given rows; for a guarantee on new rows
    see vbdl.decision.Referral.

    >>> uncertainty, wrong = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.0, 0.0, 1.0, 1.0])
    >>> vbdl.metrics.coverage_at_risk(uncertainty, wrong, risk=0.1)
    0.5
    """
    uncertainty, loss = _check(uncertainty, loss)
    curve = risk_coverage(uncertainty, loss)
    ordered = uncertainty.sort().values
    cut = torch.ones_like(ordered, dtype=torch.bool)
    cut[:-1] = ordered[1:] > ordered[:-1]
    # the sum of n losses has n rounding errors; they must not reject a risk that equals the target
    allowed = cut & (curve.risk <= risk + 1e-12 * max(1.0, abs(risk)))
    return float(curve.coverage[allowed].max()) if bool(allowed.any()) else 0.0
