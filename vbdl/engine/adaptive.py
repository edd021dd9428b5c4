"""Stopping rules: after each step of draws, a rule says which rows are settled, that is, need no more draws.

    predict(x, tolerance=0.01)                      standard error of every probability (or mean) at most 0.01
    predict(x, tolerance=LabelDecided(0.95))        the label of infinitely many draws, with this confidence
    predict(x, tolerance=ThresholdDecided(0.2, of=1))   which side of 0.2 the probability of class 1 is on
    predict(x, deadline=0.005)                      as many steps of draws as fit into five milliseconds

A number is a `StandardError` (`as_rule`); a `Rule` of your own has two methods. Rules look after each step of
`step_size` draws, of which there are about `LOOKS`. No standard error settles a row with fewer than `LEAST_DRAWS`.

`LabelDecided` and `ThresholdDecided` are sequential tests by betting, valid however often they look at the draws: a
bettor's wealth that starts at 1 and is a non-negative supermartingale if the decision is wrong ever reaches 1 / alpha
with probability at most alpha (Ville, 1939).

Waudby-Smith and Ramdas, Estimating Means of Bounded Random Variables by Betting, JRSS B 2024,
https://arxiv.org/abs/2010.09686
Howard, Ramdas, McAuliffe and Sekhon, Time-uniform, Nonparametric, Nonasymptotic Confidence Sequences, Annals of
Statistics 2021, https://arxiv.org/abs/1810.08240
"""

import math
from dataclasses import dataclass
from numbers import Real
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from vbdl.types import State

LEAST_DRAWS = 16  # a standard error estimated from fewer draws is not used
LOOKS = 16  # the most steps that the draws are divided into; a step has at least 8 draws

# bet sizes, as fractions of the largest that cannot go bankrupt; a mixture of them works for small and large margins
_STAKES = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 0.95)


def step_size(n_samples: int) -> int:
    """The number of draws in one step of a predictor with `n_samples` draws.

    >>> vbdl.adaptive.step_size(32), vbdl.adaptive.step_size(1000)
    (8, 63)
    """
    return min(n_samples, max(8, -(-n_samples // LOOKS)))


@runtime_checkable
class Rule(Protocol):
    """A stopping rule: says after each step of draws which rows are settled.

    >>> isinstance(vbdl.adaptive.LabelDecided(0.95), vbdl.adaptive.Rule)
    True
    """

    @property
    def bets(self) -> bool:
        """True if the rule needs the probabilities of each draw, False if the prediction's fields are enough."""
        ...

    def update(self, state: State, draws: Tensor) -> State:
        """Return the rule's state after more draws.

        state: {} at first. draws: the probabilities of each new draw, (draws, rows, ...).
        """
        ...

    def settled(self, fields: State, count: int, state: State) -> Tensor:
        """Return which rows need no more draws, (rows,) bool, given the prediction's fields after `count` draws."""
        ...


@dataclass(frozen=True)
class StandardError:
    """A rule that settles a row once the standard error of each of its probabilities (or means) is at most `at_most`.

    The standard error is itself estimated from the draws, so no row is settled with fewer than 16.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3))
    >>> predict = vbdl.Predictor(vbdl.MCDropout(net), vbdl.Categorical(), n_samples=256, compile=False)
    >>> p = predict(torch.randn(5, 4), tolerance=vbdl.adaptive.StandardError(0.02))
    >>> bool((p.standard_error <= 0.02).all() or (p.n_samples == 256).any())
    True
    """

    at_most: float
    bets = False

    def __post_init__(self):
        if not (self.at_most > 0 and math.isfinite(self.at_most)):
            raise ValueError(f"a tolerance is a standard error and must be positive and finite, got {self.at_most}")

    def update(self, state: State, draws: Tensor) -> State:
        return state

    def settled(self, fields: State, count: int, state: State) -> Tensor:
        error = fields.get("standard_error")
        if error is None:
            raise NotImplementedError(
                f"a tolerance reads the standard error of the mean, and the likelihood's finish() gives only "
                f"{', '.join(fields)}: let it return a field `standard_error` too, or give a deadline"
            )
        return (error.flatten(1) if error.ndim > 1 else error.unsqueeze(1)).amax(1).le(self.at_most) & (
            count >= LEAST_DRAWS
        )


@dataclass(frozen=True)
class LabelDecided:
    """A rule that settles a row once its label is, with this confidence, that of infinitely many draws.

    The first step of draws names a label. Later draws test it against every other class b by betting on
    p(label) - p(b), whose mean is not positive if b is the more probable class. The rule errs only if the bet against
    the truly most probable class succeeds by chance, so alpha = 1 - confidence needs no correction for the number of
    classes or looks. For a Bernoulli likelihood it decides on which side of 0.5 the probability lies.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3))
    >>> predict = vbdl.Predictor(vbdl.MCDropout(net), vbdl.Categorical(), n_samples=256, compile=False)
    >>> p = predict(torch.randn(5, 4), tolerance=vbdl.adaptive.LabelDecided(0.95))
    >>> p.n_samples.shape  # the draws that each row needed
    torch.Size([5])
    """

    confidence: float = 0.95
    bets = True

    def __post_init__(self):
        _check_confidence(self.confidence)

    def update(self, state: State, draws: Tensor) -> State:
        if not _over_classes(draws):
            return ThresholdDecided(0.5, self.confidence).update(state, draws)
        if not state:
            label = draws.mean(0).argmax(-1)
            return {"label": label, "wealth": draws.new_zeros(*draws.shape[1:], len(_STAKES), dtype=torch.float64)}
        label = state["label"]
        margin = draws.gather(-1, label.expand(draws.shape[:-1]).unsqueeze(-1)) - draws
        return {"label": label, "wealth": state["wealth"] + _won(margin, 1.0)}

    def settled(self, fields: State, count: int, state: State) -> Tensor:
        if "label" not in state:
            return ThresholdDecided(0.5, self.confidence).settled(fields, count, state)
        enough = _log_wealth(state["wealth"]) >= -math.log(1 - self.confidence)
        itself = torch.nn.functional.one_hot(state["label"], enough.shape[-1]).bool()
        sure = (enough | itself).all(-1) & (fields["probs"].argmax(-1) == state["label"])
        return sure.flatten(1).all(1) if sure.ndim > 1 else sure


@dataclass(frozen=True)
class ThresholdDecided:
    """A rule that settles a row once it is decided, with this confidence, on which side of a threshold p lies.

    p is the probability that infinitely many draws would give to class `of` (None for a Bernoulli likelihood). The
    decision is wrong with a probability of at most 1 - confidence for each row, however often the rule looks: it bets
    that p is above and that p is below, and only one of the two can be wrong.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3))
    >>> predict = vbdl.Predictor(vbdl.MCDropout(net), vbdl.Categorical(), n_samples=256, compile=False)
    >>> p = predict(torch.randn(5, 4), tolerance=vbdl.adaptive.ThresholdDecided(0.2, of=1))
    >>> p.n_samples.shape  # the draws that each row needed
    torch.Size([5])
    """

    threshold: float
    confidence: float = 0.95
    of: int | None = None
    bets = True

    def __post_init__(self):
        _check_confidence(self.confidence)
        if not 0.0 < self.threshold < 1.0:
            raise ValueError(f"a threshold of a probability must lie between 0 and 1, got {self.threshold}")

    def update(self, state: State, draws: Tensor) -> State:
        if self.of is not None:
            if not -draws.shape[-1] <= self.of < draws.shape[-1]:
                n_classes = draws.shape[-1]
                raise ValueError(f"there are {n_classes} classes, and of={self.of}: pass a class below {n_classes}")
            draws = draws[..., self.of]
        elif _over_classes(draws):
            raise ValueError(
                "this prediction has several classes; say which one the threshold is about: "
                "ThresholdDecided(threshold, of=class)"
            )
        beyond = draws - self.threshold
        above, below = _won(beyond, self.threshold), _won(-beyond, 1 - self.threshold)
        if not state:
            return {"above": above, "below": below}
        return {"above": state["above"] + above, "below": state["below"] + below}

    def settled(self, fields: State, count: int, state: State) -> Tensor:
        best = torch.maximum(_log_wealth(state["above"]), _log_wealth(state["below"]))
        sure = best >= -math.log(1 - self.confidence)
        return sure.flatten(1).all(1) if sure.ndim > 1 else sure


def as_rule(tolerance: object) -> Rule:
    """The rule that a tolerance stands for: a number becomes a `StandardError`, a rule stays as it is.

    Raises TypeError for anything else.

    >>> vbdl.adaptive.as_rule(0.01)
    StandardError(at_most=0.01)
    """
    if isinstance(tolerance, Real) and not isinstance(tolerance, bool):
        return StandardError(float(tolerance))
    if isinstance(tolerance, type) or not isinstance(tolerance, Rule):
        raise TypeError(
            f"tolerance must be a standard error or a rule of vbdl.adaptive, like LabelDecided(0.95), got {tolerance!r}"
        )
    return tolerance


def _check_confidence(confidence: float) -> None:
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"a confidence must lie between 0 and 1, got {confidence}")


def _over_classes(draws: Tensor) -> bool:
    """True if the last axis of the draws runs over classes: their probabilities sum to one."""
    return draws.ndim > 2 and torch.allclose(draws.sum(-1), draws.new_ones(()), atol=1e-3)


def _won(gains: Tensor, largest_loss: float) -> Tensor:
    """The log wealth that each bet size wins on these gains.

    gains: (draws, ...), each at least -largest_loss. Returns (..., stakes) float64.
    """
    stakes = torch.tensor(_STAKES, dtype=torch.float64, device=gains.device) / largest_loss
    return torch.log1p(gains.double().unsqueeze(-1) * stakes).sum(0)


def _log_wealth(each: Tensor) -> Tensor:
    """The log of the average wealth over bet sizes, (..., stakes) -> (...)."""
    return each.logsumexp(-1) - math.log(len(_STAKES))
