"""Value at risk (VaR) and expected shortfall (ES) of predictive distributions, including parameter uncertainty.

McNeil, Frey, Embrechts, Quantitative Risk Management, 2015, chapter 2
Acerbi, Tasche, On the coherence of expected shortfall, 2002, https://arxiv.org/abs/cond-mat/0104295

The outcome y is a return or a profit: high is good. At level 0.99, VaR is minus the 1 % quantile of y and ES is minus
the mean of y below that quantile; both are in units of y and positive for losses.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vbdl.decision.distribution import Distribution, Evidence, distribution_of
from vbdl.metrics._checks import check_finite, check_rate
from vbdl.metrics._counts import at_least, at_most
from vbdl.metrics.intervals import normal_cdf
from vbdl.metrics.nll import check_mixture
from vbdl.types import Decision, Prediction


@dataclass(frozen=True)
class TailRisk:
    """The value at risk and expected shortfall of each row, in units of the outcome, positive for losses.

    >>> tail = vbdl.decision.gaussian_tail(torch.zeros(1), torch.ones(1), level=0.99)
    >>> tail.level, tail.var.round(decimals=3)
    (0.99, tensor([2.3260], dtype=torch.float64))
    """

    level: float
    var: Tensor  # (batch,) or (batch, ...)
    es: Tensor  # (batch,) or (batch, ...)


def mixture_tail(means: Tensor, stds: Tensor, level: float, weights: Tensor | None = None) -> TailRisk:
    """VaR and ES of the Gaussian mixture over samples: the quantile by bisection, ES in closed form.

    means, stds: (samples, batch) or (samples, batch, ...), stds > 0. weights: (samples,), equal by default.
    A single sample is a Gaussian without parameter uncertainty.

    >>> means = torch.tensor([[-1.0], [1.0]])  # (samples, rows)
    >>> vbdl.decision.mixture_tail(means, torch.ones(2, 1), level=0.99).var.round(decimals=2)
    tensor([3.0500], dtype=torch.float64)
    """
    check_rate(level, "level")
    means, stds, _, log_weights = check_mixture(means, stds, None, weights)
    weight = log_weights.exp().reshape(-1, *[1] * (means.ndim - 1))
    tail = 1 - level
    # a quantile of the mixture lies between those of its components
    quantiles = means + stds * torch.special.ndtri(torch.tensor(tail, dtype=torch.float64))
    low, high = quantiles.amin(dim=0), quantiles.amax(dim=0)
    for _ in range(200):
        middle = 0.5 * (low + high)
        below = (weight * normal_cdf((middle - means) / stds)).sum(dim=0) < tail
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        # stop when the interval is as narrow as a rounding error
        if bool((high - low <= 4e-16 * (low.abs() + high.abs())).all()):
            break
    quantile = 0.5 * (low + high)
    z = (quantile - means) / stds
    density = torch.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    partial = (weight * (means * normal_cdf(z) - stds * density)).sum(dim=0)
    return TailRisk(level, -quantile, -partial / tail)


def gaussian_tail(mean: Tensor, std: Tensor, level: float) -> TailRisk:
    """VaR and ES of N(mean, std²). mean, std: (batch,) or (batch, ...)

    >>> tail = vbdl.decision.gaussian_tail(torch.zeros(1), torch.ones(1), level=0.99)
    >>> tail.var.round(decimals=3), tail.es.round(decimals=3)
    (tensor([2.3260], dtype=torch.float64), tensor([2.6650], dtype=torch.float64))
    """
    return mixture_tail(mean.unsqueeze(0), std.unsqueeze(0), level)


def sample_tail(samples: Tensor, level: float) -> TailRisk:
    """VaR and ES of the samples' empirical distribution, exact also if the tail ends inside a sample's mass.

    samples: (samples, batch) or (samples, batch, ...), draws of y with its noise. Raises ValueError if the tail holds
    less than one sample, (1 - level) · samples < 1.

    >>> samples = torch.arange(100.0).unsqueeze(1) - 50  # (samples, rows)
    >>> tail = vbdl.decision.sample_tail(samples, level=0.95)
    >>> tail.var, tail.es
    (tensor([46.], dtype=torch.float64), tensor([48.], dtype=torch.float64))
    """
    check_rate(level, "level")
    samples = check_finite(samples, "samples")
    if samples.ndim < 2 or samples.shape[0] == 0:
        raise ValueError(f"samples must be (samples, batch) or (samples, batch, ...), not {tuple(samples.shape)}")
    whole, last = at_most(1 - level, samples.shape[0]), at_least(1 - level, samples.shape[0])
    mass = float(whole) if whole == last else (1 - level) * samples.shape[0]
    if whole < 1:
        raise ValueError(
            f"the {1 - level:.3g} tail of {samples.shape[0]} samples holds less than one sample; "
            f"draw at least {math.ceil(1 / (1 - level) - 1e-9)}"
        )
    ordered = samples.sort(dim=0).values
    total = ordered[:whole].sum(dim=0)
    end = ordered[last - 1]
    return TailRisk(level, -end, -(total + (mass - whole) * end) / mass)


class Risk(Decision):
    """A decision on predicted returns: a position that shrinks with uncertainty, value at risk, expected shortfall.

    All are computed from the calibrated mixture of all draws, so they include parameter uncertainty. For a prediction
    made outside a deciding predictor this needs predict(x, samples=True); without samples it is taken as the normal
    distribution with its mean and total variance.

    level: of VaR and ES.
    fraction: the position is fraction · mean / variance, as a share of wealth: at fraction 1 growth-optimal for small
        returns (Kelly), in general mean-variance with a risk aversion of 1 / fraction.
    limit: bound on the position, ±limit.
    max_var: the position is scaled down until its own VaR is at most this, in units of the return.
    A row whose mean or variance is not finite gets the position 0.

    >>> net = nn.Linear(4, 2)  # mean and log-variance of a return
    >>> predict = vbdl.Predictor(vbdl.DeepEnsemble(net, 3), vbdl.HeteroscedasticGaussian(), compile=False)
    >>> p = vbdl.with_decision(predict, vbdl.decision.Risk(level=0.99))(torch.randn(5, 4))
    >>> p.action.shape, bool((p.es >= p.var).all())
    (torch.Size([5, 1]), True)
    """

    reads_distribution = True

    def __init__(self, level: float = 0.99, fraction: float = 0.5, limit: float = 1.0, max_var: float | None = None):
        super().__init__()
        self.level = check_rate(level, "level")
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction must lie in (0, 1], not {fraction}")
        if not limit > 0 or not (max_var is None or max_var > 0):
            raise ValueError(f"limit and max_var must be positive, not {limit} and {max_var}")
        self.fraction, self.limit, self.max_var = fraction, limit, max_var

    def extra_repr(self) -> str:
        return f"level={self.level}, fraction={self.fraction}, limit={self.limit}, max_var={self.max_var}"

    def forward(self, prediction: Prediction | Evidence) -> dict[str, Tensor]:
        """The `action` (position), and `var` and `es` of a position of 1, for a regression: (batch, ...) each."""
        distribution = distribution_of(prediction)
        dtype = prediction.mean.dtype
        if distribution is None:
            components = torch.stack((prediction.mean, prediction.total.log()), -1)
            distribution = Distribution(components.unsqueeze(0))
        low = distribution.quantile(1 - self.level)
        shortfall = -distribution.mean_below(low, 1 - self.level)
        mean, variance = distribution.moments()
        position = (self.fraction * mean / variance).clamp(-self.limit, self.limit)
        if self.max_var is not None:
            # the losses of a short position are in the upper tail
            var = torch.where(position < 0, -position * distribution.quantile(self.level), -position * low)
            position = position * (self.max_var / var.clamp(min=self.max_var))
        position = torch.where(mean.isfinite() & variance.isfinite() & (variance > 0), position, 0.0)
        return {"action": position.to(dtype), "var": (-low).to(dtype), "es": shortfall.to(dtype)}
