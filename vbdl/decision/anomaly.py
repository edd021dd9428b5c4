"""Flags for anomalous rows (e.g. transactions) with a bounded rate of false alarms.

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
    """A decision that flags rows by conformal p-values of their anomaly scores (high for anomalous rows).

    Inside a predictor the score is the prediction's uncertainty of the given `kind` (see uncertainty_of), and `action`
    is True for a flagged row; a normal row is flagged with probability at most `false_alarms`.

    p = (1 + number of normal rows with a score at least as high) / (n + 1). For a normal row exchangeable with those
    of `fit`, P(p <= a) <= a for every a. A NaN score gets the smallest possible p-value.

    >>> flags = vbdl.decision.AnomalyFlags(false_alarms=0.05).fit(torch.arange(100.0))  # scores of normal rows
    >>> flags.p_values(torch.tensor([50.0, 200.0])).round(decimals=3)
    tensor([0.5050, 0.0100], dtype=torch.float64)
    >>> flags.flag(torch.tensor([50.0, 200.0]), 0.05)
    tensor([False,  True])
    """

    scores: Tensor | None

    def __init__(self, false_alarms: float | None = None, kind: str = "epistemic"):
        super().__init__()
        self.false_alarms = None if false_alarms is None else check_rate(false_alarms, "false_alarms")
        self.kind = kind
        self.register_buffer("scores", None)  # (n,) sorted

    @property
    def reads_epistemic(self) -> bool:  # type: ignore[override]
        return self.kind == "epistemic"

    def fit(self, scores: Tensor) -> "AnomalyFlags":
        """Store the scores of normal rows, (n,), which must not have been used to fit the score; return self."""
        self.scores = check_scores(scores).sort().values
        if self.false_alarms is not None:
            self._check_budget(self.false_alarms)
        return self

    def forward(self, prediction: Prediction | Evidence) -> Tensor:
        """Whether each row of the prediction is flagged at the constructor's `false_alarms`, (batch,) bool."""
        if self.false_alarms is None:
            raise RuntimeError("deciding needs a rate of false alarms: AnomalyFlags(false_alarms=0.01)")
        return self._within(uncertainty_of(prediction, self.kind), self.false_alarms)

    @property
    def fitted_in_words(self) -> str:
        n = 0 if self.scores is None else self.scores.numel()
        return f"{self.kind} against {n:,} normal rows, false alarms {self.false_alarms}"

    def words(self, action: Tensor) -> list[str]:
        return ["anomaly" if flagged else "normal" for flagged in action.tolist()]

    def p_values(self, scores: Tensor) -> Tensor:
        """The conformal p-values of scores: (batch,) -> (batch,) float64."""
        count, n = self._count(scores)
        return count.to(torch.float64) / (n + 1)

    def _count(self, scores: Tensor) -> tuple[Tensor, int]:
        """(1 + the number of normal rows with a score at least as high, (batch,) int64; the number of normal rows)."""
        if self.scores is None:
            raise RuntimeError("AnomalyFlags has not been fitted: call fit first")
        n = self.scores.numel()
        asked = scores.to(torch.float64).nan_to_num(nan=torch.inf, posinf=torch.inf).contiguous()
        return 1 + n - torch.searchsorted(self.scores, asked), n

    def _within(self, scores: Tensor, false_alarms: float) -> Tensor:
        """Whether the p-value is at most `false_alarms`, compared exactly in numbers of rows."""
        count, n = self._count(scores)
        return count <= at_most(false_alarms, n + 1)

    def flag(self, scores: Tensor, false_alarms: float) -> Tensor:
        """Whether each row is flagged, (batch,) bool; a normal row is flagged with probability at most false_alarms.

        Raises ValueError if false_alarms is below 1 / (n + 1), because no row could ever be flagged.
        """
        within = self._within(scores, check_rate(false_alarms, "false_alarms"))
        self._check_budget(false_alarms)
        return within

    def _check_budget(self, false_alarms: float) -> None:
        assert self.scores is not None
        if at_most(false_alarms, self.scores.numel() + 1) < 1:
            raise ValueError(
                f"with {self.scores.numel()} normal rows nothing could ever be flagged at false_alarms="
                f"{false_alarms:.6g}; fit on at least {math.ceil(1 / false_alarms - 1e-9) - 1} normal rows"
            )

    def flag_fdr(self, scores: Tensor, share: float) -> Tensor:
        """Whether each row of this batch is flagged, (batch,) bool, with a false discovery rate of at most `share`.

        This is the procedure of Benjamini and Hochberg; conformal p-values have the dependence that it allows (Bates et
        al.).
        """
        check_rate(share, "share")
        p = self.p_values(scores)
        m = p.numel()
        if m == 0:
            return p.to(torch.bool)
        ordered = p.sort().values
        allowed = share * torch.arange(1, m + 1, dtype=torch.float64, device=p.device) / m
        passing = (ordered <= allowed).nonzero()
        return p <= ordered[passing.max()] if passing.numel() else torch.zeros_like(p, dtype=torch.bool)
