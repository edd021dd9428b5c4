"""Flags for anomalous rows (transactions) with a budget of false alarms.

Bates, Candès, Lei, Romano, Sesia, Testing for Outliers with Conformal p-values, 2023, https://arxiv.org/abs/2104.08279
Benjamini, Hochberg, Controlling the False Discovery Rate, 1995, https://doi.org/10.1111/j.2517-6161.1995.tb02031.x
"""

import math

import torch
from torch import Tensor

from vbdl.decision.distribution import Evidence
from vbdl.decision.referral import uncertainty_of
from vbdl.metrics._checks import check_rate, check_scores
from vbdl.metrics._counts import at_most
from vbdl.types import Decision, Prediction


class AnomalyFlags(Decision):
    """Conformal p-values of anomaly scores (high for odd) against scores of normal rows.

    Inside a predictor the score is an uncertainty of the prediction, `kind` (see uncertainty_of), and `action` says
    whether the row is flagged at a budget of `false_alarms`.

    p = (1 + normal rows with a score at least as high) / (n + 1): for a normal row, exchangeable with those of `fit`,
    P(p <= a) <= a for every a. A NaN score gets the smallest p-value there is.
    """

    scores: Tensor | None

    def __init__(self, false_alarms: float | None = None, kind: str = "epistemic"):
        super().__init__()
        self.false_alarms = None if false_alarms is None else check_rate(false_alarms, "false_alarms")
        self.kind = kind
        self.register_buffer("scores", None)  # (n,) sorted

    def fit(self, scores: Tensor) -> "AnomalyFlags":
        """scores: (n,) of rows known to be normal, that the score was not fitted on"""
        self.scores = check_scores(scores).sort().values
        if self.false_alarms is not None:
            self._check_budget(self.false_alarms)
        return self

    def forward(self, prediction: Prediction | Evidence) -> Tensor:
        """A prediction -> (batch,) bool flags, at the budget given to the constructor"""
        if self.false_alarms is None:
            raise RuntimeError("give AnomalyFlags a budget to decide with: AnomalyFlags(false_alarms=0.01)")
        return self._within(uncertainty_of(prediction, self.kind), self.false_alarms)

    def p_values(self, scores: Tensor) -> Tensor:
        """(batch,) -> (batch,) float64"""
        count, n = self._count(scores)
        return count.to(torch.float64) / (n + 1)

    def _count(self, scores: Tensor) -> tuple[Tensor, int]:
        """1 + normal rows with a score at least as high, (batch,) int64, and how many normal rows there are."""
        if self.scores is None:
            raise RuntimeError("AnomalyFlags has not been fitted: call fit first")
        n = self.scores.numel()
        asked = scores.to(torch.float64).nan_to_num(nan=torch.inf, posinf=torch.inf).contiguous()
        return 1 + n - torch.searchsorted(self.scores, asked), n

    def _within(self, scores: Tensor, false_alarms: float) -> Tensor:
        """Whether the p-value is at most the budget, counted in rows."""
        count, n = self._count(scores)
        return count <= at_most(false_alarms, n + 1)

    def flag(self, scores: Tensor, false_alarms: float) -> Tensor:
        """(batch,) bool: each normal row is flagged with probability at most false_alarms.

        ValueError when the budget is below 1 / (n + 1): no row could ever be flagged.
        """
        within = self._within(scores, check_rate(false_alarms, "false_alarms"))
        self._check_budget(false_alarms)
        return within

    def _check_budget(self, false_alarms: float) -> None:
        assert self.scores is not None
        if at_most(false_alarms, self.scores.numel() + 1) < 1:
            raise ValueError(
                f"a budget of {false_alarms:.6g} needs at least {math.ceil(1 / false_alarms - 1e-9) - 1} normal rows, "
                f"there are {self.scores.numel()}: nothing could ever be flagged"
            )

    def flag_fdr(self, scores: Tensor, share: float) -> Tensor:
        """(batch,) bool: among the flagged of this batch at most this share is false, on average (Benjamini and
        Hochberg; conformal p-values depend on each other in the way it allows)."""
        check_rate(share, "share")
        p = self.p_values(scores)
        m = p.numel()
        if m == 0:
            return p.to(torch.bool)
        ordered = p.sort().values
        allowed = share * torch.arange(1, m + 1, dtype=torch.float64, device=p.device) / m
        passing = (ordered <= allowed).nonzero()
        return p <= ordered[passing.max()] if passing.numel() else torch.zeros_like(p, dtype=torch.bool)
