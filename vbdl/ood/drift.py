"""Drift of a stream of scores, with a bound on the probability of a false alarm, ever.

Ville, Étude critique de la notion de collectif, 1939
Waudby-Smith, Ramdas, Estimating means of bounded random variables by betting, 2024,
https://arxiv.org/abs/2010.09686
"""

import math

from torch import Tensor

from vbdl.metrics._checks import check_rate, check_scores
from vbdl.ood.threshold import threshold_at_fpr


class DriftMonitor:
    """Watches how often scores exceed a level that familiar rows exceed at most with rate `rate`.

    A bettor starts with 1 and bets, row by row, on the rate being higher than that; while it is not, the
    expected fortune does not grow, so that it ever reaches 1/a with probability at most a (Ville). Part of
    the money waits: row t is joined by 1/((t + 1)(t + 2)) of it, so that a change after a long quiet time
    is met by money that the quiet time has not eaten. The bettor is a mixture over constant bets.

    Alarm once the fortune reaches 1/a: no matter how long the stream runs or how often one looks, a stream
    like the reference raises an alarm with probability at most `false_alarm` (half of it is spent on the
    level being an estimate). Memory is O(1). After an alarm `alarm` stays True until `reset`.
    """

    _BETS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8)  # as shares of the largest bet that cannot lose everything

    def __init__(self, reference: Tensor, rate: float = 0.1, false_alarm: float = 0.01):
        """reference: (n,) scores of familiar rows, high for unfamiliar. ValueError when they are
        too few."""
        check_rate(rate, "rate")
        self.rate, self.false_alarm = rate, check_rate(false_alarm, "false_alarm")
        level = threshold_at_fpr(check_scores(reference, "reference"), rate, 1 - false_alarm / 2)
        if math.isinf(level.value):
            needed = math.ceil(math.log(false_alarm / 2) / math.log1p(-rate))
            raise ValueError(
                f"{reference.numel()} reference scores cannot bound a rate of {rate} at this false_alarm; "
                f"give at least {needed}, or a higher rate"
            )
        self.level = level.value
        self.reset()

    def reset(self) -> None:
        """Forgets the stream, keeps the level."""
        self.n, self.exceeded, self.alarm = 0, 0, False
        self._log_fortunes = [-math.inf] * len(self._BETS)  # of the money at play

    def update(self, scores: Tensor) -> bool:
        """(batch,) scores in order -> whether the alarm is on. A NaN counts as exceeding the
        level."""
        for score in scores.tolist():
            hit = not score <= self.level
            joins = -math.log((self.n + 1) * (self.n + 2))
            self.n += 1
            self.exceeded += hit
            for i, share in enumerate(self._BETS):
                # fortune times 1 + bet (hit - rate), bet up to 1 / rate: mean 1 at the rate, less below
                factor = math.log1p(share / self.rate * ((1.0 if hit else 0.0) - self.rate))
                self._log_fortunes[i] = _log_add(self._log_fortunes[i], joins) + factor
            if self.log_fortune >= math.log(2 / self.false_alarm):
                self.alarm = True
        return self.alarm

    @property
    def log_fortune(self) -> float:
        """Log of the mixture's fortune: the evidence against no drift, in nats."""
        fortune = -math.log(self.n + 1)  # what still waits
        for log_fortune in self._log_fortunes:
            fortune = _log_add(fortune, log_fortune - math.log(len(self._BETS)))
        return fortune

    def state(self) -> dict:
        """Everything `load` needs, as numbers and a list."""
        return {
            "n": self.n,
            "exceeded": self.exceeded,
            "alarm": self.alarm,
            "log_fortunes": list(self._log_fortunes),
            "level": self.level,
        }

    def load(self, state: dict) -> "DriftMonitor":
        self.n, self.exceeded, self.alarm = state["n"], state["exceeded"], state["alarm"]
        self._log_fortunes, self.level = list(state["log_fortunes"]), state["level"]
        return self


def _log_add(a: float, b: float) -> float:
    """log(exp(a) + exp(b))"""
    high, low = max(a, b), min(a, b)
    return high + math.log1p(math.exp(low - high))
