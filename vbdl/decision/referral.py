"""Medical referral: which rows a person should see.

Geifman, El-Yaniv, Selective Classification for Deep Neural Networks, 2017, https://arxiv.org/abs/1705.08500 (selection
with guaranteed risk)
Angelopoulos, Bates, Candès, Jordan, Lei, Learn then Test, 2021, https://arxiv.org/abs/2110.01052
Leibig, Allken, Ayhan, Berens, Wahl, Leveraging uncertainty information from deep neural networks for disease detection,
2017, https://doi.org/10.1038/s41598-017-17876-z (the application)
"""

import math
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vbdl.decision.cost import REFER
from vbdl.decision.distribution import Evidence
from vbdl.decision.guarantee import last_passed, lowest_passing, risk_p_value, risk_upper_bound, starting_shares
from vbdl.metrics._checks import check_rate, check_scores
from vbdl.metrics._counts import at_most
from vbdl.metrics.estimate import Interval, proportion_interval
from vbdl.types import Decision, Prediction


def check_kind(kind: str) -> None:
    """Raises ValueError for a kind of uncertainty that does not exist."""
    if kind not in ("total", "aleatoric", "epistemic", "confidence"):
        raise ValueError(f"kind must be 'total', 'aleatoric', 'epistemic' or 'confidence', not {kind!r}")


def uncertainty_of(prediction: Prediction | Evidence | Tensor, kind: str = "total") -> Tensor:
    """One number a row, (batch,), high for uncertain.

    prediction: a tensor (batch,) is taken as the uncertainty itself; of a prediction it is total, aleatoric or
    epistemic (nats or squared target units), or "confidence", which is 1 - the largest probability. A regression of
    several outputs has no one number: pass a tensor.
    """
    check_kind(kind)
    if isinstance(prediction, Tensor):
        values = prediction
    elif kind == "total":
        values = prediction.total
    elif kind == "aleatoric":
        values = prediction.aleatoric
    elif kind == "epistemic":
        values = prediction.epistemic
    elif (probs := prediction.probs) is None:
        raise ValueError("a confidence needs class probabilities, and this prediction is a regression")
    else:
        values = 1 - (torch.maximum(probs, 1 - probs) if probs.ndim == 1 else probs.amax(dim=-1))
    if values.ndim == 2 and values.shape[1] == 1:
        values = values.squeeze(1)
    if values.ndim != 1:
        raise ValueError(
            f"an uncertainty is one number a row, (batch,), and this is {tuple(values.shape)}; "
            "reduce it over outputs and pass the tensor"
        )
    return values


@dataclass(frozen=True)
class Certificate:
    """The guarantee that a threshold was chosen for, and the calibration rows it rests on."""

    risk: float  # asked for
    delta: float  # probability with which the promise may fail
    risk_bound: float  # upper bound on the mean loss of the kept rows, at this delta
    coverage: float  # share of the calibration rows kept
    n_kept: int
    n: int
    lowest_risk: float | None = None  # the lowest that these rows allow to promise; None where it was not recorded

    def refusal(self) -> str:
        """The message that says why every row is referred."""
        text = (
            f"no threshold can be promised to keep a risk of {self.risk:g} but for a probability of {self.delta:g}: "
            f"every row is referred"
        )
        if self.lowest_risk is None or self.lowest_risk >= 1:
            return f"{text}. Calibrate on more rows than these {self.n}"
        return (
            f"{text}. The lowest risk that these {self.n} rows allow to promise is {self.lowest_risk:.3g}: ask for "
            f"that, or calibrate on more rows"
        )


class Referral(Decision):
    """Refers the rows whose uncertainty is at least a threshold. A NaN uncertainty is always referred.

    kind: which uncertainty of a prediction counts (see uncertainty_of). The threshold is given, or chosen on
    calibration rows by `for_capacity`, `for_cost`, or `for_risk`, the last with a guarantee.
    """

    threshold: Tensor

    def __init__(self, kind: str = "total", threshold: float = math.inf):
        super().__init__()
        if math.isnan(threshold):
            raise ValueError("threshold must be a number, and is NaN")
        check_kind(kind)
        self.kind = kind
        self.certificate: Certificate | None = None
        self.register_buffer("threshold", torch.tensor(threshold, dtype=torch.float64))

    def extra_repr(self) -> str:
        return f"kind={self.kind!r}, threshold={float(self.threshold):.6g}"

    @property
    def caution(self) -> str | None:
        if self.certificate is None or self.certificate.n_kept > 0:
            return None
        return self.certificate.refusal()

    def refer(self, prediction: Prediction | Evidence | Tensor) -> Tensor:
        """(batch,) bool; prediction: see uncertainty_of"""
        # not (u < threshold), so that a NaN is referred
        return ~(uncertainty_of(prediction, self.kind).to(torch.float64) < self.threshold)

    def forward(self, prediction: Prediction | Evidence) -> Tensor:
        """A classification -> (batch,) int64: the most probable class, or REFER (-1)."""
        if prediction.label is None:
            raise ValueError("a referral is of classes, and this prediction is a regression: use refer(prediction)")
        return torch.where(self.refer(prediction), REFER, prediction.label.to(torch.int64))

    def for_capacity(self, prediction: Prediction | Evidence | Tensor, share: float) -> "Referral":
        """Refers at most this share of the calibration rows, the most uncertain; ties stay together, unreferred."""
        if not 0 <= share <= 1:
            raise ValueError(f"share must lie in [0, 1], not {share}")
        ordered = check_scores(uncertainty_of(prediction, self.kind), "uncertainty").sort().values
        n = ordered.numel()
        allowed = at_most(share, n)
        above = torch.cat((ordered.new_tensor([-math.inf]), ordered))[n - allowed]
        # the first value above the largest that must be kept
        later = ordered[ordered > above]
        self.certificate = None
        return self._set(float(later[0]) if later.numel() else math.inf)

    def for_cost(self, prediction: Prediction | Evidence | Tensor, loss: Tensor, refer_cost: float) -> "Referral":
        """Least mean cost on the calibration rows: loss (batch,) of a kept row, refer_cost of a referred one.

        Of several best thresholds the one that refers least.
        """
        ordered, losses, cuts = self._sorted(prediction, loss)
        total = torch.cat((losses.new_zeros(1), losses.cumsum(0)))
        n = losses.numel()
        cost = total[cuts] + refer_cost * (n - cuts)
        best = int(cuts[(cost <= cost.min() * (1 + 1e-12) + 1e-12).nonzero().max()])
        self.certificate = None
        return self._set(self._keep(ordered, best))

    def for_risk(
        self,
        prediction: Prediction | Evidence | Tensor,
        loss: Tensor,
        risk: float,
        delta: float = 0.05,
        method: str = "sgr",
    ) -> "Referral":
        """The largest coverage whose mean loss on kept rows is at most `risk`, except with probability delta over
        calibration sets.

        loss: (batch,) bool, or in [0, 1]. method "sgr": selection with guaranteed risk, from several strictnesses at
        once, each with a share of delta that goes on to the next when it passes (see vbdl.decision.guarantee). The
        bisection of Geifman and El-Yaniv misses what can be kept where the p-value is not monotone in the coverage.
        "ltt": learn then test from the strictest alone, with the whole of delta, up to the first that fails.

        The promise is about rows exchangeable with these: on shifted rows there is none, and `check` tells. If no
        threshold can be promised every row is referred (threshold -inf), with a warning, and the certificate says
        n_kept = 0 and in `lowest_risk` what could have been promised.
        """
        check_rate(risk, "risk")
        check_rate(delta, "delta")
        if method not in ("sgr", "ltt"):
            raise ValueError(f"method must be 'sgr' or 'ltt', not {method!r}")
        ordered, losses, cuts = self._sorted(prediction, loss)
        if bool(((losses < 0) | (losses > 1)).any()):
            raise ValueError("for_risk needs losses in [0, 1]: divide by the largest possible loss")
        binary = bool(((losses == 0) | (losses == 1)).all())
        n = losses.numel()
        sums = np.concatenate(([0.0], losses.cumsum(0).cpu().numpy()))
        kept = cuts[cuts > 0].cpu().numpy()

        def find(asked: float) -> tuple[int, float]:
            p = risk_p_value(sums[kept] / kept, kept, asked, binary)
            shares = starting_shares(kept, asked, delta, several=method == "sgr")
            last, level = last_passed(p, shares)
            return (int(kept[last]), level) if last >= 0 else (0, delta)

        best, used = find(risk)
        bound = risk_upper_bound(float(sums[best]) / best, best, used, binary) if best else 0.0
        lowest = bound if best else lowest_passing(lambda asked: find(asked)[0] > 0, risk)
        self.certificate = Certificate(risk, delta, bound, best / n, best, n, lowest)
        if not best:
            warnings.warn(self.certificate.refusal(), stacklevel=2)
        return self._set(self._keep(ordered, best))

    def check(self, prediction: Prediction | Evidence | Tensor, y_loss: Tensor, level: float = 0.95) -> Interval:
        """Mean loss of the rows this keeps, with its exact binomial interval: is the promise true here?

        y_loss: (batch,) bool or 0/1. ValueError when every row is referred.
        """
        kept = ~self.refer(prediction)
        losses = y_loss.to(torch.float64)[kept.to(y_loss.device)]
        if losses.numel() == 0:
            raise ValueError("every row is referred: there is no kept row to check")
        if not bool(((losses == 0) | (losses == 1)).all()):
            raise ValueError("check needs losses of 0 and 1")
        return proportion_interval(int(losses.sum()), losses.numel(), level)

    def _sorted(self, prediction: Prediction | Evidence | Tensor, loss: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Uncertainties ascending, their losses, and the numbers of rows that a threshold can keep."""
        if loss.dtype == torch.bool:
            loss = loss.to(torch.float64)
        values = check_scores(uncertainty_of(prediction, self.kind), "uncertainty")
        loss = check_scores(loss, "loss").to(values.device)
        if loss.shape != values.shape:
            raise ValueError(f"uncertainty has {values.numel()} rows, loss {loss.numel()}")
        ordered, order = values.sort(stable=True)
        n = ordered.numel()
        cut = torch.ones(n + 1, dtype=torch.bool, device=values.device)
        cut[1:-1] = ordered[1:] > ordered[:-1]
        return ordered, loss[order], cut.nonzero().squeeze(1)

    @staticmethod
    def _keep(ordered: Tensor, kept: int) -> float:
        """Threshold that keeps the first `kept`: the next value, so that given it the kept rows are an independent
        sample of all rows below it, which the bounds rely on."""
        if kept == 0:
            return -math.inf
        return math.inf if kept == ordered.numel() else float(ordered[kept])

    def _set(self, threshold: float) -> "Referral":
        self.threshold = torch.tensor(threshold, dtype=torch.float64, device=self.threshold.device)
        return self


def refer_most_uncertain(prediction: Prediction | Evidence | Tensor, k: int, kind: str = "total") -> Tensor:
    """(batch,) bool: exactly the k most uncertain rows of this batch; NaN first, ties by row number."""
    values = uncertainty_of(prediction, kind).to(torch.float64)
    n = values.numel()
    if not 0 <= k <= n:
        raise ValueError(f"k must lie in 0..{n}, not {k}")
    values = values.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)
    chosen = torch.zeros(n, dtype=torch.bool, device=values.device)
    chosen[values.argsort(descending=True, stable=True)[:k]] = True
    return chosen


class ReferralBudget:
    """So many referrals a day, decided row by row: never more than the budget.

    reference: uncertainties of earlier rows, (rows,). A row is referred when it is among the share of the reference
    that the rest of the budget can pay for, given how many rows the day still expects; so an easy morning leaves more
    for the afternoon. After `expected` rows the rest is spent first come, first served.
    """

    def __init__(self, reference: Tensor, budget: int, expected: int):
        self.reference = check_scores(reference, "reference").cpu().sort().values
        if budget < 0 or expected < 1:
            raise ValueError(f"need budget >= 0 and expected >= 1, got {budget} and {expected}")
        self.budget, self.expected = budget, expected
        self.new_day()

    def new_day(self) -> None:
        self.left, self.seen = self.budget, 0

    def step(self, uncertainty: float) -> bool:
        """Whether this row is referred. NaN counts as the most uncertain."""
        remaining = max(1, self.expected - self.seen)
        self.seen += 1
        if self.left == 0:
            return False
        value = math.inf if math.isnan(uncertainty) else float(uncertainty)
        n = self.reference.numel()
        at_least = n - int(torch.searchsorted(self.reference, value))
        refer = at_least / n <= min(1.0, self.left / remaining)
        self.left -= refer
        return refer
