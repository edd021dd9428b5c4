"""Detect drift in a stream of scores, with a bound on the probability of ever raising a false alarm.

Ville, Étude critique de la notion de collectif, 1939
Waudby-Smith, Ramdas, Estimating means of bounded random variables by betting, 2024,
https://arxiv.org/abs/2010.09686
"""

import math

from torch import Tensor

from vbdl.metrics._checks import check_rate, check_scores
from vbdl.ood.threshold import threshold_at_fpr


class DriftMonitor:
    """A monitor of how often scores exceed a level that familiar rows exceed with a rate of at most `rate`.

    It is a sequential test by betting. A bettor starts with wealth 1 and bets at each row that the rate is higher than
    `rate`. Unless it is, the expected wealth does not grow, so the probability that it ever reaches 1/a is at most a
    (Ville). The wealth 1/((t + 1)(t + 2)) enters play only at row t, so that a long time without drift does not use up
    the wealth needed to detect a later one. The bettor mixes several constant bet sizes.

    The alarm is raised when the wealth reaches 2/false_alarm: however long the stream runs and however often it is
    checked, a stream like the reference raises an alarm with probability at most `false_alarm` (half of which covers
    the estimation of the level). After an alarm `alarm` stays True until `reset`. Memory is O(1).

    >>> _ = torch.manual_seed(0)
    >>> monitor = vbdl.ood.DriftMonitor(torch.randn(1000))
    >>> monitor.update(torch.randn(1000)), monitor.update(torch.randn(1000) + 2)
    (False, True)
    """

    _BETS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8)  # bet sizes, as fractions of the largest that cannot go bankrupt

    def __init__(self, reference: Tensor, rate: float = 0.1, false_alarm: float = 0.01):
        """Set the level. reference: (n,) scores of familiar rows, low if familiar; ValueError if they are too few."""
        check_rate(rate, "rate")
        self.rate, self.false_alarm = rate, check_rate(false_alarm, "false_alarm")
        level = threshold_at_fpr(check_scores(reference, "reference"), rate, 1 - false_alarm / 2)
        if math.isinf(level.value):
            needed = math.ceil(math.log(false_alarm / 2) / math.log1p(-rate))
            raise ValueError(
                f"{reference.numel()} reference scores are too few for rate={rate} at false_alarm={false_alarm}; "
                f"give at least {needed}, or a higher rate"
            )
        self.level = level.value
        self.reset()

    def reset(self) -> None:
        """Forget the stream but keep the level."""
        self.n, self.exceeded, self.alarm = 0, 0, False
        self._log_fortunes = [-math.inf] * len(self._BETS)  # log wealth in play for each bet size

    def update(self, scores: Tensor) -> bool:
        """Add scores, (batch,) in order, and return whether the alarm is on. A NaN counts as exceeding the level."""
        for score in scores.tolist():
            hit = not score <= self.level
            joins = -math.log((self.n + 1) * (self.n + 2))
            self.n += 1
            self.exceeded += hit
            for i, share in enumerate(self._BETS):
                # wealth is multiplied by 1 + bet (hit - rate), bet <= 1 / rate: mean 1 at this rate, less below it
                factor = math.log1p(share / self.rate * ((1.0 if hit else 0.0) - self.rate))
                self._log_fortunes[i] = _log_add(self._log_fortunes[i], joins) + factor
            if self.log_fortune >= math.log(2 / self.false_alarm):
                self.alarm = True
        return self.alarm

    @property
    def log_fortune(self) -> float:
        """The log of the bettor's wealth: the evidence for drift, in nats."""
        fortune = -math.log(self.n + 1)  # log wealth not yet in play
        for log_fortune in self._log_fortunes:
            fortune = _log_add(fortune, log_fortune - math.log(len(self._BETS)))
        return fortune

    def state(self) -> dict:
        """The monitor's state as a dict of numbers and a list, for `load`."""
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
    """The logarithm log(exp(a) + exp(b))."""
    high, low = max(a, b), min(a, b)
    return high + math.log1p(math.exp(low - high))
