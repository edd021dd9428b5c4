"""Adaptive conformal inference: conformal coverage over a stream whose distribution changes.

Gibbs, Candès, Adaptive Conformal Inference Under Distribution Shift, 2021, https://arxiv.org/abs/2106.00170
"""

import math
from collections import deque

import torch

from vbdl.calibration.conformal_quantile import conformal_quantile
from vbdl.metrics._checks import check_rate


class AdaptiveConformal:
    """A threshold on a non-conformity score that is updated after every outcome.

    A miss lowers the level alpha_t by step · (1 - alpha), a hit raises it by step · alpha. For any sequence, even an
    adversarial one, the share of misses among the first T outcomes differs from alpha by at most
    (max(alpha, 1 - alpha) + step) / (step · T).

    window: number of latest scores from which the quantile is computed. `state()` and `load` resume a stream.

    >>> band = vbdl.calibration.AdaptiveConformal(alpha=0.1, step=0.05)
    >>> _ = torch.manual_seed(0)
    >>> hits = [band.update(abs(score)) for score in torch.randn(2000).tolist()]
    >>> round(sum(hits) / len(hits), 2)
    0.9
    """

    def __init__(self, alpha: float, step: float = 0.005, window: int = 1000):
        self.alpha = check_rate(alpha, "alpha")
        if not step > 0:
            raise ValueError(f"step must be positive, not {step}")
        if window < 1:
            raise ValueError(f"window must be at least 1, not {window}")
        self.step, self.window = step, window
        self.level = self.alpha  # alpha_t; may leave [0, 1], as the method requires
        self.scores: deque[float] = deque(maxlen=window)
        self.n, self.misses = 0, 0

    def threshold(self) -> float:
        """The largest score included in the next set: +inf for level <= 0 or too few scores, -inf for level >= 1."""
        if self.level <= 0:
            return math.inf
        if self.level >= 1:
            return -math.inf
        scores = torch.tensor(list(self.scores), dtype=torch.float64)
        return float(conformal_quantile(scores, self.level))

    def update(self, score: float) -> bool:
        """Update with the score of the next outcome; return whether it was inside the set.

        Raises ValueError for a score that is not finite, without changing the state.
        """
        score = float(score)
        if not math.isfinite(score):
            raise ValueError(f"score must be finite, but is {score}")
        inside = score <= self.threshold()
        self.level += self.step * (self.alpha - (0.0 if inside else 1.0))
        self.scores.append(score)
        self.n += 1
        self.misses += not inside
        return inside

    def state(self) -> dict:
        """The state as a dict of numbers and a list, for `load`."""
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
