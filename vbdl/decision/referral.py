"""Referral of uncertain rows to a person, e.g. in medical screening.

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

from vbdl.decision.cost import REFER, refer_or_answer
from vbdl.decision.distribution import Evidence
from vbdl.decision.guarantee import last_passed, lowest_passing, risk_p_value, risk_upper_bound, starting_shares
from vbdl.metrics._checks import check_rate, check_scores
from vbdl.metrics._counts import at_most
from vbdl.metrics.estimate import Interval, proportion_interval
from vbdl.types import Decision, Prediction

# the end of a sentence about one draw
KNOWS_NONE = (
    "is 0 for every row of a single network (one draw), which knows no epistemic uncertainty: use kind='total', or a "
    "posterior with several draws, like vbdl.SWAG or vbdl.DeepEnsemble"
)


def check_kind(kind: str) -> None:
    """Raise ValueError for an unknown kind of uncertainty."""
    if kind not in ("total", "aleatoric", "epistemic", "confidence"):
        raise ValueError(f"kind must be 'total', 'aleatoric', 'epistemic' or 'confidence', not {kind!r}")


def uncertainty_of(prediction: Prediction | Evidence | Tensor, kind: str = "total") -> Tensor:
    """The uncertainty of each row, (batch,).

    prediction: a prediction, or a tensor (batch,), which is returned. A regression with several outputs has no single
        uncertainty per row: pass a tensor.
    kind: "total", "aleatoric" or "epistemic" (nats, or squared units of the target), or "confidence", which is 1 minus
        the largest probability.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> predict = vbdl.Predictor(vbdl.DeepEnsemble(net, 4), vbdl.Categorical(), compile=False)
    >>> p = predict(torch.randn(5, 4))
    >>> torch.equal(vbdl.decision.uncertainty_of(p, "epistemic"), p.epistemic)
    True
    """
    check_kind(kind)
    if isinstance(prediction, Tensor):
        values = prediction
    elif kind == "total":
        values = prediction.total
    elif kind == "aleatoric":
        values = prediction.aleatoric
    elif kind == "epistemic":
        if isinstance(prediction, Prediction) and prediction.n_samples == 1:
            raise ValueError(f"kind='epistemic' {KNOWS_NONE}")
        values = prediction.epistemic
    elif (probs := prediction.probs) is None:
        raise ValueError("kind='confidence' needs class probabilities, but this prediction is a regression")
    else:
        values = 1 - (torch.maximum(probs, 1 - probs) if probs.ndim == 1 else probs.amax(dim=-1))
    if values.ndim == 2 and values.shape[1] == 1:
        values = values.squeeze(1)
    if values.ndim != 1:
        raise ValueError(
            f"the uncertainty must be one number per row, (batch,), not {tuple(values.shape)}; reduce it over outputs "
            "and pass the tensor"
        )
    return values


@dataclass(frozen=True)
class Certificate:
    """The guarantee of a threshold, and the numbers of calibration rows it is based on.

    >>> _ = torch.manual_seed(0)
    >>> uncertainty = torch.rand(1000)
    >>> wrong = torch.rand(1000) < 0.1 * uncertainty
    >>> certificate = vbdl.decision.Referral().for_risk(uncertainty, wrong, risk=0.05).certificate
    >>> certificate.risk_bound <= 0.05, certificate.n
    (True, 1000)
    """

    risk: float  # requested upper bound on the mean loss of kept rows
    delta: float  # probability with which the guarantee may fail
    risk_bound: float  # upper bound on the mean loss of kept rows that holds except with probability delta; 1: none
    coverage: float  # share of the calibration rows that is kept
    n_kept: int
    n: int
    lowest_risk: float | None = None  # the lowest risk that these rows can guarantee; None if not recorded
    mean_loss: float | None = None  # of all these rows
    surest_loss: float | None = None  # of the half of them with the lowest uncertainty

    def __str__(self) -> str:
        if self.n_kept == 0:
            return f"no guarantee: {self.refusal()}"
        return (
            f"keeps {self.n_kept} of {self.n} calibration rows ({self.coverage:.1%}); the mean loss of kept rows is at "
            f"most {self.risk_bound:.4g}, except with probability {self.delta:g}"
        )

    def refusal(self) -> str:
        """The message that explains why every row is referred."""
        text = (
            f"every row is referred, because no threshold can guarantee a risk of at most {self.risk:g} except with "
            f"probability {self.delta:g}"
        )
        if self.lowest_risk is None or self.lowest_risk >= 1:
            return f"{text}. Calibrate on more rows than these {self.n}"
        text = f"{text}. The lowest risk that these {self.n} rows can guarantee is {self.lowest_risk:.3g}"
        if self.mean_loss is None or self.surest_loss is None or self.surest_loss <= self.risk:
            return f"{text}: use that, or calibrate on more rows"
        return (
            f"{text}. The predictor is the reason, not the number of rows: its mean loss is {self.mean_loss:.3g}, and "
            f"{self.surest_loss:.3g} on the half that it is surest of. Use a better network, or an uncertainty that "
            f"tells its errors apart (another kind, or posterior)"
        )


class Referral(Decision):
    """A decision that refers rows whose uncertainty is at least a threshold or NaN.

    kind: the uncertainty of a prediction that is compared (see uncertainty_of).
    threshold: given, or chosen by `for_capacity`, `for_cost` or, with a guarantee, `for_risk`, on rows that neither
        training nor calibration has used.

    >>> _ = torch.manual_seed(0)
    >>> uncertainty = torch.rand(1000)
    >>> wrong = torch.rand(1000) < 0.3 * uncertainty
    >>> referral = vbdl.decision.Referral().for_risk(uncertainty, wrong, risk=0.1)
    >>> referral.refer(torch.tensor([0.01, 0.99]))
    tensor([False,  True])
    """

    threshold: Tensor

    def __init__(self, kind: str = "total", threshold: float = math.inf):
        super().__init__()
        if math.isnan(threshold):
            raise ValueError("threshold must be a number, not NaN")
        check_kind(kind)
        self.kind = kind
        self.certificate: Certificate | None = None
        self._told: Certificate | None = None  # the refusal that `for_risk` has warned of
        self.register_buffer("threshold", torch.tensor(threshold, dtype=torch.float64))

    def extra_repr(self) -> str:
        return f"kind={self.kind!r}, threshold={float(self.threshold):.6g}"

    @property
    def reads_epistemic(self) -> bool:  # type: ignore[override]
        return self.kind == "epistemic"

    @property
    def caution(self) -> str | None:
        certificate = self.certificate
        if certificate is None or certificate is self._told or certificate.n_kept > 0:
            return None
        return certificate.refusal()

    @property
    def fitted_in_words(self) -> str:
        limit = "nothing" if self.threshold == math.inf else f"{self.kind} from {float(self.threshold):.6g}"
        if self.threshold == -math.inf:
            limit = "every row"
        return f"refer {limit}{'' if self.certificate is None else f' ({self.certificate})'}"

    @property
    def reasons(self) -> tuple[str, ...]:  # type: ignore[override]
        if self.threshold == -math.inf:
            return ("every row is referred",)
        return (f"{self.kind} uncertainty is {float(self.threshold):.6g} or more",)

    def words(self, action: Tensor) -> list[str]:
        return refer_or_answer(action)

    def refer(self, prediction: Prediction | Evidence | Tensor) -> Tensor:
        """Whether each row is referred, (batch,) bool. prediction: as in uncertainty_of."""
        # not (u < threshold), so that NaN is referred
        return ~(uncertainty_of(prediction, self.kind).to(torch.float64) < self.threshold)

    def forward(self, prediction: Prediction | Evidence) -> Tensor:
        """The most probable class of each row of a classification, or REFER (-1): (batch,) int64."""
        if prediction.label is None:
            raise ValueError("this prediction is a regression and has no class to return: use refer(prediction)")
        return torch.where(self.refer(prediction), REFER, prediction.label.to(torch.int64))

    def for_capacity(self, prediction: Prediction | Evidence | Tensor, share: float) -> "Referral":
        """Set the threshold to refer at most this share of the calibration rows, the most uncertain; return self.

        Rows of equal uncertainty are treated alike, and kept if referring all of them would exceed the share.
        """
        if not 0 <= share <= 1:
            raise ValueError(f"share must lie in [0, 1], not {share}")
        ordered = check_scores(uncertainty_of(prediction, self.kind), "uncertainty").sort().values
        n = ordered.numel()
        allowed = at_most(share, n)
        above = torch.cat((ordered.new_tensor([-math.inf]), ordered))[n - allowed]
        # the smallest value above the largest uncertainty that must be kept
        later = ordered[ordered > above]
        self.certificate = None
        return self._set(float(later[0]) if later.numel() else math.inf)

    def for_cost(self, prediction: Prediction | Evidence | Tensor, loss: Tensor, refer_cost: float) -> "Referral":
        """Set the threshold with the lowest mean cost on the calibration rows; return self.

        loss: (batch,), the cost of keeping each row. refer_cost: the cost of referring a row, in the same unit.
        Of equally good thresholds the one that refers fewest rows is taken.
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
        """Set the threshold of largest coverage that guarantees a mean loss of kept rows <= `risk`; return self.

        The guarantee holds except with probability delta over calibration sets, for rows exchangeable with these; use
        `check` to test it on other rows. The network and its calibration must not have been trained or fitted on these
        rows. A prediction does not know of which rows it is, so this is not checked here: `vbdl.unseen(predictor, x)`
        returns the rows that training has not seen.

        loss: (batch,) bool, or in [0, 1].
        method: "sgr", selection with guaranteed risk, tests thresholds from several starting points, each with a share
            of delta that passes on to the next threshold (see vbdl.decision.guarantee; the bisection of Geifman and
            El-Yaniv loses coverage if the p-value is not monotone in it). "ltt", learn then test, starts only at the
            strictest threshold, with all of delta, and ends at the first failure.

        If no threshold can be guaranteed, every row is referred (threshold -inf), with a warning; the certificate then
        has n_kept = 0, risk_bound = 1 and the lowest risk that could have been guaranteed.
        """
        check_rate(risk, "risk")
        check_rate(delta, "delta")
        if method not in ("sgr", "ltt"):
            raise ValueError(f"method must be 'sgr' or 'ltt', not {method!r}")
        ordered, losses, cuts = self._sorted(prediction, loss)
        if bool(((losses < 0) | (losses > 1)).any()):
            raise ValueError("for_risk needs losses in [0, 1]; divide them by the largest possible loss")
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
        bound = risk_upper_bound(float(sums[best]) / best, best, used, binary) if best else 1.0
        lowest = bound if best else lowest_passing(lambda asked: find(asked)[0] > 0, risk)
        half = max(1, n // 2)
        self.certificate = Certificate(
            risk, delta, bound, best / n, best, n, lowest, float(sums[n]) / n, float(sums[half]) / half
        )
        if not best:
            self._told = self.certificate
            warnings.warn(self.certificate.refusal(), stacklevel=2)
        return self._set(self._keep(ordered, best))

    def check(self, prediction: Prediction | Evidence | Tensor, y_loss: Tensor, level: float = 0.95) -> Interval:
        """The mean loss of the kept rows with its exact binomial interval, to test the guarantee on these rows.

        y_loss: (batch,) bool or 0/1. Raises ValueError if every row is referred.
        """
        kept = ~self.refer(prediction)
        losses = y_loss.to(torch.float64)[kept.to(y_loss.device)]
        if losses.numel() == 0:
            raise ValueError("every row is referred, so there is no kept row to check")
        if not bool(((losses == 0) | (losses == 1)).all()):
            raise ValueError("check needs losses of 0 and 1")
        return proportion_interval(int(losses.sum()), losses.numel(), level)

    def _sorted(self, prediction: Prediction | Evidence | Tensor, loss: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(uncertainties ascending, their losses, numbers of rows that a threshold can keep)."""
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
        """The threshold that keeps the first `kept` rows: the next larger uncertainty.

        Given that value, the kept rows are an independent sample of all rows below it, as the bounds require.
        """
        if kept == 0:
            return -math.inf
        return math.inf if kept == ordered.numel() else float(ordered[kept])

    def _set(self, threshold: float) -> "Referral":
        self.threshold = torch.tensor(threshold, dtype=torch.float64, device=self.threshold.device)
        return self


def refer_most_uncertain(prediction: Prediction | Evidence | Tensor, k: int, kind: str = "total") -> Tensor:
    """Select exactly the k most uncertain rows of this batch, (batch,) bool; NaN first, ties by row index.

    >>> vbdl.decision.refer_most_uncertain(torch.tensor([0.1, 0.9, 0.5]), k=1)
    tensor([False,  True, False])
    """
    values = uncertainty_of(prediction, kind).to(torch.float64)
    n = values.numel()
    if not 0 <= k <= n:
        raise ValueError(f"k must lie in 0..{n}, not {k}")
    values = values.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)
    chosen = torch.zeros(n, dtype=torch.bool, device=values.device)
    chosen[values.argsort(descending=True, stable=True)[:k]] = True
    return chosen


class ReferralBudget:
    """A daily budget of referrals, spent row by row and never exceeded.

    reference: (rows,), uncertainties of earlier rows. budget: referrals per day. expected: rows per day.
    A row is referred if its share of reference rows at least as uncertain is at most (budget left / rows still
    expected), so an easy morning leaves more for the afternoon. After `expected` rows every row is referred while the
    budget lasts.

    >>> budget = vbdl.decision.ReferralBudget(torch.rand(100), budget=2, expected=10)
    >>> sum(budget.step(1.0) for _ in range(10))  # all are uncertain, two are referred
    2
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
        """Decide whether this row is referred. A NaN counts as most uncertain."""
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
