"""Split conformal prediction: sets of classes that hold the true one with a stated probability.

Vovk, Gammerman, Shafer, Algorithmic Learning in a Random World, 2005, https://doi.org/10.1007/b106715 (split conformal,
class-conditional)
Sadinle, Lei, Wasserman, Least Ambiguous Set-Valued Classifiers with Bounded Error Levels, 2019,
https://arxiv.org/abs/1609.00451 (LAC)
Romano, Sesia, Candès, Classification with Valid and Adaptive Coverage, 2020, https://arxiv.org/abs/2006.02544 (APS)
Angelopoulos, Bates, Malik, Jordan, Uncertainty Sets for Image Classifiers using Conformal Prediction, 2021,
https://arxiv.org/abs/2009.14193 (RAPS)

The promise, for rows exchangeable with the calibration rows: P(y in set) >= 1 - alpha, on average over calibration sets
and rows. It is about all rows together, not about each kind of row, and it ends where the rows shift. Every
number of calibration rows keeps it: with too few, the set holds every class.
"""

import torch
from torch import Tensor, nn

from vbdl.calibration.conformal_quantile import conformal_quantile
from vbdl.metrics._checks import check_probs_and_labels, check_rate
from vbdl.types import Calibrator, Prediction, State


class LAC(nn.Module):
    """The score 1 - p_k, which gives the smallest sets on average; a hard row may get an empty one."""

    def forward(self, probs: Tensor, u: Tensor | None = None) -> Tensor:
        """(batch, classes) -> (batch, classes) scores, low for likely"""
        return 1 - probs


def _cumulative(probs: Tensor) -> tuple[Tensor, Tensor]:
    """The mass of the classes at least as likely as each class, and its rank, counted from 1.

    Equal probabilities are ranked by class number.
    """
    order = probs.argsort(dim=1, descending=True, stable=True)
    mass = probs.gather(1, order).cumsum(1)
    # the least likely class has exactly 1: a threshold of 1 must not be a matter of rounding, row by row
    mass = mass / mass[:, -1:]
    rank = torch.arange(1, probs.shape[1] + 1, dtype=probs.dtype, device=probs.device).expand_as(order)
    back = order.argsort(dim=1)
    return mass.gather(1, back), rank.gather(1, back)


class APS(nn.Module):
    """The score of class k is the mass of the classes down to k: sets grow with the difficulty of the row.

    randomized: takes u · p_k off again, u uniform of the row, given by the caller. Coverage is then 1 - alpha and not
    above; without, sets are larger than they need be.
    """

    def __init__(self, randomized: bool = False):
        super().__init__()
        self.randomized = randomized

    def extra_repr(self) -> str:
        return f"randomized={self.randomized}"

    def forward(self, probs: Tensor, u: Tensor | None = None) -> Tensor:
        """(batch, classes), u (batch,) in [0, 1] -> (batch, classes) scores"""
        mass, _ = _cumulative(probs)
        return mass - _uniform(self.randomized, u, probs) * probs


class RAPS(nn.Module):
    """The score of APS plus penalty · (rank - k_reg)₊, which keeps unlikely classes out of large sets."""

    def __init__(self, penalty: float = 0.01, k_reg: int = 5, randomized: bool = False):
        super().__init__()
        if penalty < 0 or k_reg < 0:
            raise ValueError(f"penalty and k_reg must not be negative, got {penalty}, {k_reg}")
        self.penalty, self.k_reg, self.randomized = penalty, k_reg, randomized

    def extra_repr(self) -> str:
        return f"penalty={self.penalty}, k_reg={self.k_reg}, randomized={self.randomized}"

    def forward(self, probs: Tensor, u: Tensor | None = None) -> Tensor:
        """(batch, classes), u (batch,) in [0, 1] -> (batch, classes) scores"""
        mass, rank = _cumulative(probs)
        extra = self.penalty * (rank - self.k_reg).clamp(min=0)
        return mass - _uniform(self.randomized, u, probs) * probs + extra


def _uniform(randomized: bool, u: Tensor | None, probs: Tensor) -> Tensor | float:
    if not randomized:
        return 0.0
    if u is None:
        raise ValueError("randomized=True needs u, one uniform number a row, (batch,)")
    if u.shape != probs.shape[:1]:
        raise ValueError(f"u must be ({probs.shape[0]},), not {tuple(u.shape)}")
    return u.to(probs.dtype).unsqueeze(1)


class ConformalSets(Calibrator):
    """Adds to predictions the set of classes whose score is at most a quantile of the true classes' scores.

    score: LAC(), APS() or RAPS(), or any module of theirs' signature. per_class: a quantile for each class from its own
    rows, which gives the promise class by class; a class with too few rows (or none)
    is in every set. never_empty: adds the most probable class to an empty set, coverage can only rise.
    """

    of_classes = True
    thresholds: Tensor | None

    def __init__(
        self,
        alpha: float,
        score: nn.Module | None = None,
        per_class: bool = False,
        never_empty: bool = False,
    ):
        super().__init__()
        self.alpha = check_rate(alpha, "alpha")
        self.score = LAC() if score is None else score
        self.per_class, self.never_empty = per_class, never_empty
        self.register_buffer("thresholds", None)  # (classes,)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, per_class={self.per_class}, never_empty={self.never_empty}"

    def fit(self, probs: Tensor, y: Tensor, u: Tensor | None = None) -> "ConformalSets":
        """probs: (batch, classes), or (batch,) of class 1;  y: (batch,);  u: see APS."""
        if probs.ndim == 2 and y.shape == probs.shape:
            raise ValueError(
                f"y answers {probs.shape[1]} questions of yes or no a row (multi-label), and a conformal set is of the "
                f"classes of one question: fit one ConformalSets a question, fit(probs[:, i], y[:, i])"
            )
        probs, y = check_probs_and_labels(probs, y)
        scores = self.score(probs, u).gather(1, y[:, None]).squeeze(1)  # of the true class
        classes = probs.shape[1]
        if self.per_class:
            self.thresholds = torch.stack([conformal_quantile(scores[y == k], self.alpha) for k in range(classes)])
        else:
            self.thresholds = conformal_quantile(scores, self.alpha).repeat(classes)
        return self

    def forward(self, probs: Tensor, u: Tensor | None = None) -> Tensor:
        """(batch, classes), or (batch,) of class 1 -> (batch, classes) bool"""
        if self.thresholds is None:
            raise RuntimeError("ConformalSets has not been fitted: call fit first")
        # the arithmetic of fit, in its precision: a score equal to the threshold must stay equal
        p = probs.to(torch.float64)
        if probs.ndim == 1:
            p = torch.stack((1 - p, p), dim=1)
        chosen = self.score(p, u) <= self.thresholds
        if self.never_empty:
            top = torch.nn.functional.one_hot(p.argmax(1), p.shape[1]).to(torch.bool)
            chosen = chosen | (top & ~chosen.any(dim=1, keepdim=True))
        return chosen

    def fit_prediction(self, prediction: Prediction, y: Tensor) -> "ConformalSets":
        if prediction.probs is None:
            raise ValueError("ConformalSets is fitted to probabilities, and this is a regression")
        return self.fit(prediction.probs, y.long())  # yes or no comes as 0.0 and 1.0

    def fields(self, fields: State) -> State:
        """The prediction's fields, and `sets`, (batch, classes) bool."""
        return {**fields, "sets": self(fields["probs"])}


def set_coverage(sets: Tensor, y: Tensor) -> Tensor:
    """1.0 where the set holds the true class: (batch, classes) bool, (batch,) -> (batch,) float64"""
    return sets.gather(1, y[:, None]).squeeze(1).to(torch.float64)
