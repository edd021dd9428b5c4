"""Split conformal prediction: sets of classes that contain the true class with a stated probability.

Vovk, Gammerman, Shafer, Algorithmic Learning in a Random World, 2005, https://doi.org/10.1007/b106715 (split conformal,
class-conditional)
Sadinle, Lei, Wasserman, Least Ambiguous Set-Valued Classifiers with Bounded Error Levels, 2019,
https://arxiv.org/abs/1609.00451 (LAC)
Romano, Sesia, Candès, Classification with Valid and Adaptive Coverage, 2020, https://arxiv.org/abs/2006.02544 (APS)
Angelopoulos, Bates, Malik, Jordan, Uncertainty Sets for Image Classifiers using Conformal Prediction, 2021,
https://arxiv.org/abs/2009.14193 (RAPS)

The guarantee is P(y in set) >= 1 - alpha for rows exchangeable with the calibration rows, on average over calibration
sets and rows. It is marginal, not for each kind of row, and does not hold under distribution shift. It holds for any
number of calibration rows: with too few, every set contains all classes.
"""

import torch
from torch import Tensor, nn

from vbdl.calibration.conformal_quantile import conformal_quantile
from vbdl.metrics._checks import check_probs_and_labels, check_rate
from vbdl.types import Calibrator, Prediction, State


class LAC(nn.Module):
    """The score 1 - p_k, which gives the smallest sets on average; a difficult row may get an empty set.

    >>> probs = torch.tensor([[0.6, 0.3, 0.1]])
    >>> vbdl.calibration.LAC()(probs).round(decimals=2)
    tensor([[0.4000, 0.7000, 0.9000]])
    """

    def forward(self, probs: Tensor, u: Tensor | None = None) -> Tensor:
        """The scores of classes, low for likely ones: probs (batch, classes) -> (batch, classes)."""
        return 1 - probs


def _cumulative(probs: Tensor) -> tuple[Tensor, Tensor]:
    """For each class (mass of the classes at least as likely, rank from 1): (batch, classes) each.

    Equal probabilities are ranked by class index.
    """
    order = probs.argsort(dim=1, descending=True, stable=True)
    mass = probs.gather(1, order).cumsum(1)
    # makes the mass of the least likely class exactly 1, so that a threshold of 1 does not depend on rounding
    mass = mass / mass[:, -1:]
    rank = torch.arange(1, probs.shape[1] + 1, dtype=probs.dtype, device=probs.device).expand_as(order)
    back = order.argsort(dim=1)
    return mass.gather(1, back), rank.gather(1, back)


class APS(nn.Module):
    """The score of class k is the mass of the classes at least as likely as k; sets grow with the row's difficulty.

    randomized: subtract u · p_k, where u is a uniform number per row from the caller. The coverage is then exactly
        1 - alpha; without it sets are larger than necessary.

    >>> probs = torch.tensor([[0.6, 0.3, 0.1]])
    >>> vbdl.calibration.APS()(probs).round(decimals=2)
    tensor([[0.6000, 0.9000, 1.0000]])
    """

    def __init__(self, randomized: bool = False):
        super().__init__()
        self.randomized = randomized

    def extra_repr(self) -> str:
        return f"randomized={self.randomized}"

    def forward(self, probs: Tensor, u: Tensor | None = None) -> Tensor:
        """The scores of classes: probs (batch, classes), u (batch,) in [0, 1] -> (batch, classes)."""
        mass, _ = _cumulative(probs)
        return mass - _uniform(self.randomized, u, probs) * probs


class RAPS(nn.Module):
    """The score of APS plus penalty · max(rank - k_reg, 0), which keeps unlikely classes out of large sets.

    >>> probs = torch.tensor([[0.6, 0.3, 0.1]])
    >>> vbdl.calibration.RAPS(penalty=0.1, k_reg=1)(probs).round(decimals=2)
    tensor([[0.6000, 1.0000, 1.2000]])
    """

    def __init__(self, penalty: float = 0.01, k_reg: int = 5, randomized: bool = False):
        super().__init__()
        if penalty < 0 or k_reg < 0:
            raise ValueError(f"penalty and k_reg must not be negative, got {penalty}, {k_reg}")
        self.penalty, self.k_reg, self.randomized = penalty, k_reg, randomized

    def extra_repr(self) -> str:
        return f"penalty={self.penalty}, k_reg={self.k_reg}, randomized={self.randomized}"

    def forward(self, probs: Tensor, u: Tensor | None = None) -> Tensor:
        """The scores of classes: probs (batch, classes), u (batch,) in [0, 1] -> (batch, classes)."""
        mass, rank = _cumulative(probs)
        extra = self.penalty * (rank - self.k_reg).clamp(min=0)
        return mass - _uniform(self.randomized, u, probs) * probs + extra


def _uniform(randomized: bool, u: Tensor | None, probs: Tensor) -> Tensor | float:
    if not randomized:
        return 0.0
    if u is None:
        raise ValueError("randomized=True needs u, one uniform number per row, (batch,)")
    if u.shape != probs.shape[:1]:
        raise ValueError(f"u must be ({probs.shape[0]},), not {tuple(u.shape)}")
    return u.to(probs.dtype).unsqueeze(1)


class ConformalSets(Calibrator):
    """A calibrator that adds sets of classes: those with a score of at most a quantile of the true classes' scores.

    score: LAC(), APS() or RAPS(), or any module with their signature.
    per_class: a quantile for each class from its own rows, which gives the guarantee for each class; a class with too
        few rows is in every set.
    never_empty: add the most probable class to empty sets; the coverage can only increase.

    >>> _ = torch.manual_seed(0)
    >>> logits = 3 * torch.randn(500, 3)  # too large by a factor of two
    >>> y = torch.distributions.Categorical(logits=logits / 2).sample()
    >>> probs = logits.softmax(1)
    >>> method = vbdl.ConformalSets(alpha=0.1).fit(probs[:250], y[:250])
    >>> sets = method(probs[250:])  # (rows, classes) bool
    >>> round(vbdl.calibration.set_coverage(sets, y[250:]).mean().item(), 2)
    0.89
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
        """Fit the thresholds; return self.

        probs: (batch, classes), or (batch,) of class 1;  y: (batch,);  u: (batch,), see APS.
        """
        if probs.ndim == 2 and y.shape == probs.shape:
            raise ValueError(
                f"y has {probs.shape[1]} binary outputs per row (multi-label), but a conformal set is for one output: "
                f"fit one ConformalSets for each, fit(probs[:, i], y[:, i])"
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
        """The sets: probs (batch, classes), or (batch,) of class 1 -> (batch, classes) bool."""
        if self.thresholds is None:
            raise RuntimeError("ConformalSets has not been fitted: call fit first")
        # the same arithmetic and precision as in fit, so that a score equal to the threshold stays equal
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
            raise ValueError("ConformalSets needs class probabilities, but this prediction is a regression")
        return self.fit(prediction.probs, y.long())  # binary targets are floats, 0.0 and 1.0

    def fields(self, fields: State) -> State:
        """The prediction's fields, and `sets`, (batch, classes) bool."""
        return {**fields, "sets": self(fields["probs"])}


def set_coverage(sets: Tensor, y: Tensor) -> Tensor:
    """1.0 for each row whose set contains the true class, else 0.0: (batch, classes) bool, (batch,) -> (batch,).

    >>> sets = torch.tensor([[True, True, False], [False, True, False]])
    >>> vbdl.calibration.set_coverage(sets, torch.tensor([0, 2]))
    tensor([1., 0.], dtype=torch.float64)
    """
    return sets.gather(1, y[:, None]).squeeze(1).to(torch.float64)
