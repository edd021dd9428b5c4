"""Flags for anomalous rows (transactions) with a budget of false alarms.

Bates, Candès, Lei, Romano, Sesia, Testing for Outliers with Conformal p-values, 2023, https://arxiv.org/abs/2104.08279
Benjamini, Hochberg, Controlling the False Discovery Rate, 1995, https://doi.org/10.1111/j.2517-6161.1995.tb02031.x
"""

import torch
from torch import Tensor, nn

from vbdl.metrics._checks import check_rate, check_scores


class AnomalyFlags(nn.Module):
    """Conformal p-values of anomaly scores (high for odd) against scores of normal rows.

    p = (1 + normal rows with a score at least as high) / (n + 1): for a normal row, exchangeable with those of `fit`,
    P(p <= a) <= a for every a. A NaN score gets the smallest p-value there is.
    """

    scores: Tensor | None

    def __init__(self):
        super().__init__()
        self.register_buffer("scores", None)  # (n,) sorted

    def fit(self, scores: Tensor) -> "AnomalyFlags":
        """scores: (n,) of rows known to be normal, that the score was not fitted on"""
        self.scores = check_scores(scores).sort().values
        return self

    def forward(self, scores: Tensor) -> Tensor:
        """(batch,) -> (batch,) float64 p-values"""
        if self.scores is None:
            raise RuntimeError("AnomalyFlags has not been fitted: call fit first")
        n = self.scores.numel()
        asked = scores.to(torch.float64).nan_to_num(nan=torch.inf, posinf=torch.inf).contiguous()
        at_least = n - torch.searchsorted(self.scores, asked)
        return (1 + at_least).to(torch.float64) / (n + 1)

    def flag(self, scores: Tensor, false_alarms: float) -> Tensor:
        """(batch,) bool: each normal row is flagged with probability at most false_alarms.

        ValueError when the budget is below 1 / (n + 1): no row could ever be flagged.
        """
        p = self(scores)
        assert self.scores is not None
        check_rate(false_alarms, "false_alarms")
        if false_alarms * (self.scores.numel() + 1) < 1 - 1e-12:
            raise ValueError(
                f"a budget of {false_alarms} needs at least {int(1 / false_alarms)} normal rows, "
                f"there are {self.scores.numel()}: nothing could ever be flagged"
            )
        return p <= false_alarms * (1 + 1e-12)

    def flag_fdr(self, scores: Tensor, share: float) -> Tensor:
        """(batch,) bool: among the flagged of this batch at most this share is false, on average (Benjamini and
        Hochberg; conformal p-values depend on each other in the way it allows)."""
        check_rate(share, "share")
        p = self(scores)
        m = p.numel()
        if m == 0:
            return p.to(torch.bool)
        ordered = p.sort().values
        allowed = share * torch.arange(1, m + 1, dtype=torch.float64, device=p.device) / m
        passing = (ordered <= allowed).nonzero()
        return p <= ordered[passing.max()] if passing.numel() else torch.zeros_like(p, dtype=torch.bool)
