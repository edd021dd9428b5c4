"""Position sizes that shrink with uncertainty, including epistemic uncertainty.

Markowitz, Portfolio Selection, 1952, https://doi.org/10.2307/2975974
Kelly, A New Interpretation of Information Rate, 1956, https://doi.org/10.1002/j.1538-7305.1956.tb03809.x
Barberis, Investing for the Long Run when Returns Are Predictable, 2000, https://doi.org/10.1111/0022-1082.00205
(parameter uncertainty in the predictive)
"""

import torch
from torch import Tensor

from vbdl.metrics._checks import check_finite


def _limit(position: Tensor, limit: float) -> Tensor:
    if not limit > 0:
        raise ValueError(f"limit must be positive, not {limit}")
    return position.clamp(-limit, limit)


def mean_variance_position(mean: Tensor, variance: Tensor, risk_aversion: float = 1.0, limit: float = 1.0) -> Tensor:
    """The mean-variance position mean / (risk_aversion · variance), within ±limit, as a share of wealth.

    mean: predicted returns. variance: their *total* variance (aleatoric + epistemic), same shape, squared units of
    mean; the aleatoric variance alone would ignore what the model does not know.

    >>> vbdl.decision.mean_variance_position(torch.tensor([0.01]), torch.tensor([0.04]))
    tensor([0.2500], dtype=torch.float64)
    """
    if not risk_aversion > 0:
        raise ValueError(f"risk_aversion must be positive, not {risk_aversion}")
    mean, variance = check_finite(mean, "mean"), check_finite(variance, "variance")
    if mean.shape != variance.shape:
        raise ValueError(f"mean is {tuple(mean.shape)} but variance is {tuple(variance.shape)}; give both one shape")
    if bool((variance <= 0).any()):
        raise ValueError("variance must be positive")
    return _limit(mean / (risk_aversion * variance), limit)


def kelly_position(returns: Tensor, fraction: float = 0.5, limit: float = 1.0) -> Tensor:
    """The Kelly position: `fraction` times the w that maximizes the mean of log(1 + w r) over samples, |w| <= limit.

    returns: (samples, batch), draws of the simple return from the predictive distribution with its noise, each > -1.
        They include parameter uncertainty, so a model that is unsure of the sign of the mean bets less.
    w is limited so that wealth stays positive in every sample. Returns (batch,), as a share of wealth.

    >>> returns = torch.tensor([[0.1], [-0.05]])  # (samples, rows)
    >>> vbdl.decision.kelly_position(returns, fraction=0.1)
    tensor([0.1000], dtype=torch.float64)
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must lie in (0, 1], not {fraction}")
    if not limit > 0:
        raise ValueError(f"limit must be positive, not {limit}")
    returns = check_finite(returns, "returns")
    if returns.ndim != 2 or returns.shape[0] == 0:
        raise ValueError(f"returns must be (samples, batch), not {tuple(returns.shape)}")
    if bool((returns <= -1).any()):
        raise ValueError("returns must be simple returns above -1 (-100 %)")
    # keeps 1 + w r >= 1e-9 for the worst and the best sample
    room = 1 - 1e-9
    worst, best = returns.amin(dim=0), returns.amax(dim=0)
    high = torch.where(worst < 0, room / (-worst).clamp(min=1e-300), limit).clamp(max=limit)
    low = torch.where(best > 0, -room / best.clamp(min=1e-300), -limit).clamp(min=-limit)
    for _ in range(80):
        middle = 0.5 * (low + high)
        # the mean of the logs is concave in w, so its slope decreases
        rising = (returns / (1 + middle * returns)).mean(dim=0) > 0
        low, high = torch.where(rising, middle, low), torch.where(rising, high, middle)
    position = 0.5 * (low + high)
    # if all returns are zero, bisection would end at a limit
    return fraction * torch.where((returns == 0).all(dim=0), 0.0, position)
