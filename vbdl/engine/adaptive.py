"""Rules for stopping: after each step of draws, a rule says which rows have a settled answer and need no more draws.

    predict(x, tolerance=0.01)                      standard error of every probability (or mean) at most 0.01
    predict(x, tolerance=LabelDecided(0.95))        the label of infinitely many draws, with this confidence
    predict(x, tolerance=ThresholdDecided(0.2, of=1))   which side of 0.2 the probability of class 1 is on
    predict(x, deadline=0.005)                      what five milliseconds allow

The rules of decisions look after every step and stay valid however often they look: they bet on the draws. A
non-negative supermartingale that starts at 1 reaches 1 / alpha with probability at most alpha, ever (Ville, 1939).

Waudby-Smith and Ramdas, Estimating Means of Bounded Random Variables by Betting, JRSS B 2024,
https://arxiv.org/abs/2010.09686
Howard, Ramdas, McAuliffe and Sekhon, Time-uniform, Nonparametric, Nonasymptotic Confidence Sequences, Annals of
Statistics 2021, https://arxiv.org/abs/1810.08240
"""

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from vbdl.types import State

LEAST_DRAWS = 16  # before a standard error is believed
LOOKS = 16  # steps the draws are divided into, of at least 8

# bet sizes, as fractions of the largest that cannot go bankrupt; a mixture of them works for small and large margins
_STAKES = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 0.95)


def step_size(n_samples: int) -> int:
    """The number of draws in a step of a predictor of so many samples."""
    return min(n_samples, max(8, -(-n_samples // LOOKS)))


@runtime_checkable
class Rule(Protocol):
    """A rule says after each step of draws which rows are settled."""

    @property
    def bets(self) -> bool:
        """True if the rule reads the probabilities of each draw, False if the fields of the prediction suffice."""
        ...

    def update(self, state: State, draws: Tensor) -> State:
        """The rule's state after the probabilities of more draws, (draws, rows, ...); the first state is {}."""
        ...

    def settled(self, fields: State, count: int, state: State) -> Tensor:
        """(rows,) bool: which rows need no more draws, given the fields of the prediction from `count` draws."""
        ...


@dataclass(frozen=True)
class StandardError:
    """A row is settled when the standard error of each of its means, probabilities or outputs, is at most `at_most`.

    A standard error is an estimate itself: it is believed from 16 draws on.
    """

    at_most: float
    bets = False

    def __post_init__(self):
        if not (self.at_most > 0 and math.isfinite(self.at_most)):
            raise ValueError(f"a tolerance is a standard error, positive and finite, got {self.at_most}")

    def update(self, state: State, draws: Tensor) -> State:
        return state

    def settled(self, fields: State, count: int, state: State) -> Tensor:
        error = fields["standard_error"]
        return (error.flatten(1) if error.ndim > 1 else error.unsqueeze(1)).amax(1).le(self.at_most) & (
            count >= LEAST_DRAWS
        )


@dataclass(frozen=True)
class LabelDecided:
    """A row is settled when its label is, with this confidence, the one that infinitely many draws would give.

    The label of the first step is held against every other class on the draws that follow: against class b the stake
    is on p(label) - p(b), whose mean is not positive if b is the better one. One bet alone has to be lost for an
    error, the one against the best class, so that no share of alpha is lost to the number of classes or of looks.
    Bernoulli: which side of 0.5.
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
    """A row is settled when it is known, with this confidence, on which side of a threshold its probability lies.

    The probability is the one that infinitely many draws would give. of: its class; not given for Bernoulli. The
    answer is wrong with a probability of at most 1 - confidence, row by row, however often the rule looks: of the two
    bets, that the probability is above and that it is below, only one can be lost.
    """

    threshold: float
    confidence: float = 0.95
    of: int | None = None
    bets = True

    def __post_init__(self):
        _check_confidence(self.confidence)
        if not 0.0 < self.threshold < 1.0:
            raise ValueError(f"a threshold of a probability lies between 0 and 1, got {self.threshold}")

    def update(self, state: State, draws: Tensor) -> State:
        if self.of is not None:
            if not -draws.shape[-1] <= self.of < draws.shape[-1]:
                raise ValueError(f"there are {draws.shape[-1]} classes, and of={self.of}")
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


def as_rule(tolerance: Any) -> Rule:
    """The rule that a tolerance stands for: a number is a `StandardError`. Raises TypeError for anything else."""
    if isinstance(tolerance, Real) and not isinstance(tolerance, bool):
        return StandardError(float(tolerance))
    if isinstance(tolerance, type) or not isinstance(tolerance, Rule):
        raise TypeError(
            f"a tolerance is a standard error or a rule of vbdl.adaptive, like LabelDecided(0.95), got {tolerance!r}"
        )
    return tolerance


def _check_confidence(confidence: float) -> None:
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"a confidence lies between 0 and 1, got {confidence}")


def _over_classes(draws: Tensor) -> bool:
    """Whether the last axis runs over classes whose probabilities sum to one."""
    return draws.ndim > 2 and torch.allclose(draws.sum(-1), draws.new_ones(()), atol=1e-3)


def _won(gains: Tensor, largest_loss: float) -> Tensor:
    """The log wealth of each bet size after these gains: (draws, ...) at least -largest_loss -> (..., stakes)."""
    stakes = torch.tensor(_STAKES, dtype=torch.float64, device=gains.device) / largest_loss
    return torch.log1p(gains.double().unsqueeze(-1) * stakes).sum(0)


def _log_wealth(each: Tensor) -> Tensor:
    """The log of the wealth averaged over bet sizes: (..., stakes) -> (...)."""
    return each.logsumexp(-1) - math.log(len(_STAKES))
