"""Adaptive conformal inference: coverage kept over a stream whose distribution moves.

Gibbs, Candès, Adaptive Conformal Inference Under Distribution Shift, 2021, https://arxiv.org/abs/2106.00170
"""

import math
from collections import deque

import torch

from vbdl.calibration.conformal_quantile import conformal_quantile
from vbdl.metrics._checks import check_rate


class AdaptiveConformal:
    """A threshold on a non-conformity score, moved after every outcome: a miss lowers the level alpha_t by step · (1 -
    alpha), a hit raises it by step · alpha.

    For any sequence whatever, also an adversary's, the share of misses in the first T differs from alpha by at most
    (max(alpha, 1 - alpha) + step) / (step · T).

    window: how many of the latest scores the quantile is taken from. The state is plain numbers; a stream that stops
    can be resumed from `state()`.
    """

    def __init__(self, alpha: float, step: float = 0.005, window: int = 1000):
        self.alpha = check_rate(alpha, "alpha")
        if not step > 0:
            raise ValueError(f"step must be positive, not {step}")
        if window < 1:
            raise ValueError(f"window must be at least 1, not {window}")
        self.step, self.window = step, window
        self.level = self.alpha  # alpha_t; leaves [0, 1] on purpose
        self.scores: deque[float] = deque(maxlen=window)
        self.n, self.misses = 0, 0

    def threshold(self) -> float:
        """The largest score inside the next set: +inf for level <= 0 or too few scores, -inf for level >= 1."""
        if self.level <= 0:
            return math.inf
        if self.level >= 1:
            return -math.inf
        scores = torch.tensor(list(self.scores), dtype=torch.float64)
        return float(conformal_quantile(scores, self.level))

    def update(self, score: float) -> bool:
        """Take the score of the next outcome, and return whether it was inside the set.

        ValueError for a score that is not finite: the state stays as it was.
        """
        score = float(score)
        if not math.isfinite(score):
            raise ValueError(f"a score must be finite, and is {score}")
        inside = score <= self.threshold()
        self.level += self.step * (self.alpha - (0.0 if inside else 1.0))
        self.scores.append(score)
        self.n += 1
        self.misses += not inside
        return inside

    def state(self) -> dict:
        """The state as numbers and a list, which `load` takes."""
        return {
            "level": self.level,
            "scores": list(self.scores),
            "n": self.n,
            "misses": self.misses,
        }

    def load(self, state: dict) -> "AdaptiveConformal":
        self.level, self.n, self.misses = state["level"], state["n"], state["misses"]
        self.scores = deque(state["scores"], maxlen=self.window)
        return self
