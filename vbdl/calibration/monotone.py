"""Smooth increasing curves, fitted by maximum likelihood to map scores to standard normal ones.

A curve is quadratic between knots and linear beyond the last ones. Its slope is positive and linear between knots, so
the corresponding density is continuous, and the inverse has a closed form.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vbdl.calibration._fit import minimize

_KNOTS = (3, 5, 9, 17, 33)
_ROWS_A_PARAMETER = 10
_MOST_SCORES = 8192  # of more scores this many, at even ranks, are used: the curve shows no finer detail
_STEEPEST = 20.0  # largest ratio of a slope to that of the fitted straight line
_SLOPES = (1e-3, 1e3)


class MonotoneCurve(NamedTuple):
    """An increasing curve g, given by its knots and the slope at each knot."""

    knots: Tensor  # (knots,) ascending
    slopes: Tensor  # (knots,) positive
    offset: Tensor  # () value of g at the first knot

    def __call__(self, z: Tensor) -> Tensor:
        """g(z), in float64 and the shape of z."""
        z = z.to(torch.float64)
        first, last = self.knots[0], self.knots[-1]
        ends = self.slopes[0] * (z - first).clamp(max=0) + self.slopes[-1] * (z - last).clamp(min=0)
        if self.knots.numel() == 1:
            return self.offset + ends
        width, into = self._into(z)
        inside = self.slopes[:-1] * into + self.slopes.diff() / (2 * width) * into.square()
        return self.offset + ends + inside.sum(-1)

    def slope(self, z: Tensor) -> Tensor:
        """g'(z), in float64 and the shape of z."""
        z = z.to(torch.float64)
        if self.knots.numel() == 1:
            return self.slopes[0].expand(z.shape)
        width, into = self._into(z)
        return self.slopes[0] + (self.slopes.diff() * (into / width)).sum(-1)

    def inverse(self, value: Tensor) -> Tensor:
        """The z with g(z) = value, in float64 and the shape of value."""
        value = value.to(torch.float64)
        at = self(self.knots)
        below, above = (value - at[0]).clamp(max=0) / self.slopes[0], (value - at[-1]).clamp(min=0) / self.slopes[-1]
        if self.knots.numel() == 1:
            return self.knots[0] + below + above
        rise, bend = at.diff(), self.slopes.diff() / self.knots.diff()
        far = torch.minimum((value.unsqueeze(-1) - at[:-1]).clamp(min=0), rise)
        # solves slope x + bend x² / 2 = far for x in each segment, without cancellation
        root = (self.slopes[:-1].square() + 2 * bend * far).clamp(min=0).sqrt()
        return self.knots[0] + (2 * far / (self.slopes[:-1] + root)).sum(-1) + below + above

    def _into(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(width of each segment, (segments,); distance of z from its start, clamped to it, (..., segments))."""
        width = self.knots.diff()
        return width, torch.minimum((z.unsqueeze(-1) - self.knots[:-1]).clamp(min=0), width)


def fit_curve(scores: Tensor) -> MonotoneCurve:
    """Fit the curve that maps scores, (n,) float64, to standard normal ones; BIC chooses the number of knots.

    The candidates are the identity, a shift, a straight line, and curves with 3, 5, 9, 17 and 33 knots, if there are at
    least ten different scores per parameter.
    """
    z = scores.sort().values
    n, different = z.numel(), z.unique().numel()
    if n > _MOST_SCORES:
        z = z[torch.linspace(0, n - 1, _MOST_SCORES, dtype=torch.float64, device=z.device).round().long()]
    zero, one = z.new_zeros(1), z.new_ones(1)
    mean, std = scores.mean(), scores.std(correction=0)
    candidates = [(0, MonotoneCurve(zero, one, zero[0])), (1, MonotoneCurve(zero, one, -mean))]
    if different >= _ROWS_A_PARAMETER:
        slope = (1 / std).clamp(*_SLOPES)
        candidates.append((2, MonotoneCurve(zero, slope.reshape(1), -slope * mean)))
        for count in _KNOTS:
            if different >= _ROWS_A_PARAMETER * (count + 1):
                candidates.append((count + 1, _fit_knots(z, count, n, float(slope))))

    def worth(candidate: tuple[int, MonotoneCurve]) -> float:
        parameters, curve = candidate
        gain = 0.5 * (z.square() - curve(z).square()) + curve.slope(z).log()
        return n * float(gain.mean()) - 0.5 * parameters * math.log(n)

    return max(candidates, key=worth)[1]


def _fit_knots(z: Tensor, count: int, n: int, slope: float) -> MonotoneCurve:
    """Fit a curve with `count` knots by maximum likelihood, a convex problem in the slopes and the offset.

    Knots are at quantiles of the scores, evenly spaced in normal scores; ten scores lie beyond each outermost knot.
    """
    end = float(torch.special.ndtri(torch.tensor(1 - min(10 / n, 0.25), dtype=torch.float64)))
    levels = torch.special.ndtr(torch.linspace(-end, end, count, dtype=torch.float64, device=z.device))
    knots = z.quantile(levels).unique()
    # drops knots so close to the previous one that a division by their distance would overflow
    knots = knots[torch.cat((knots.new_ones(1, dtype=torch.bool), knots.diff() > 1e-6))]
    size = knots.numel()
    # the curve and its slope are linear in slopes and offset, so evaluate them for each slope 1 with the others 0
    each = torch.eye(size, dtype=torch.float64, device=z.device)
    curves = [MonotoneCurve(knots, one, knots.new_zeros(())) for one in each]
    values, slopes = torch.stack([c(z) for c in curves], 1), torch.stack([c.slope(z) for c in curves], 1)

    def loss(v: Tensor) -> Tensor:
        return (0.5 * (values @ v[:-1] + v[-1]).square() - (slopes @ v[:-1]).log()).mean()

    start = z.new_tensor([slope] * size + [slope * (float(knots[0]) - float(z.mean()))])
    bounds: list[tuple[float | None, float | None]] = [(slope / _STEEPEST, slope * _STEEPEST)] * size
    best = minimize(loss, start, [*bounds, (None, None)])
    return MonotoneCurve(knots, best[:-1].clone(), best[-1].clone())
