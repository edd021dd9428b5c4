"""The Laplace evidence as a function of the prior precisions and of the noise, and where it is largest.

With the curvature H of the negative log-likelihood at the mean w, a prior N(0, 1 / d) and n weights,

    log p(D | d) = log p(D | w) - d |w|^2 / 2 + (n log d - log det(H + d)) / 2

MacKay, Bayesian Interpolation, Neural Computation 4, 1992; Immer et al., Scalable Marginal Likelihood Estimation for
Model Selection in Deep Learning, ICML 2021, https://arxiv.org/abs/2104.04975. With the eigenvalues of H, an evaluation
is a sum, and the largest value for one precision is the only root of an increasing function. Everything is float64.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST, LARGEST = 1e-8, 1e12  # prior precisions, beyond which the evidence is flat or the weights are fixed
_HALVINGS = 60  # of a bracket of log precisions 46 wide: to 4e-17
_ROUNDS = 200  # of coordinates in turn, which converge to the precision of float64 in far fewer


@dataclass(frozen=True)
class Part:
    """Weights that share one prior precision.

    eigenvalues: of the curvature of each block of them, flattened. squares: |w|^2 of their means.
    """

    eigenvalues: Tensor
    squares: float

    @property
    def count(self) -> int:
        return self.eigenvalues.numel()

    def term(self, precision: float) -> float:
        """The terms of the log evidence that depend on the prior precision, in nats."""
        log_det = float((self.eigenvalues + precision).log().sum())
        return 0.5 * (self.count * math.log(precision) - log_det - precision * self.squares)

    def determined(self, precision: float) -> float:
        """The number of weights that the data determine, sum of l / (l + precision); MacKay's gamma."""
        return float((self.eigenvalues / (self.eigenvalues + precision)).sum())

    def best(self) -> float:
        """The prior precision with the largest evidence: the root of gamma(d) = d |w|^2."""
        return math.exp(_root(lambda d: self.determined(math.exp(d)) - math.exp(d) * self.squares))

    def scaled(self, factor: float) -> "Part":
        """The part with a curvature multiplied by this factor."""
        return Part(self.eigenvalues * factor, self.squares)


def _root(function: Callable[[float], float]) -> float:
    """The root of a decreasing function of the log precision, or the end of the range that it is beyond."""
    low, high = math.log(SMALLEST), math.log(LARGEST)
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if function(middle) > 0 else (low, middle)
    return 0.5 * (low + high)


def log_evidence(log_likelihood: float, parts: Sequence[Part], precisions: Sequence[float]) -> float:
    """The log evidence in nats; log_likelihood: at the means, summed over the rows."""
    return log_likelihood + sum(part.term(d) for part, d in zip(parts, precisions, strict=True))


def best_precisions(parts: Sequence[Part]) -> list[float]:
    """The prior precision of each part with the largest evidence."""
    return [part.best() for part in parts]


def best_noise(parts: Sequence[Part], precisions: Sequence[float], residuals: float, elements: int) -> float:
    """The factor of the noise std with the largest evidence for these prior precisions.

    residuals: the sum of squared residuals in units of the noise variance. elements: the number of targets. With the
    noise scaled by t the slope of the evidence in log t, residuals / t^2 + gamma(t) - elements, decreases.
    """

    def slope(log_square: float) -> float:
        inverse = math.exp(-log_square)
        gamma = sum(part.scaled(inverse).determined(d) for part, d in zip(parts, precisions, strict=True))
        return residuals * inverse + gamma - elements

    return math.exp(0.5 * _root(slope))


def best_with_noise(parts: Sequence[Part], residuals: float, elements: int) -> tuple[list[float], float]:
    """The prior precisions and the factor of the noise std with the largest evidence.

    residuals: the sum of squared residuals in units of the noise variance. elements: the number of targets.

    With the noise scaled by t, the curvature is H / t^2 and the evidence, with r = t^2 d of each part,

        - elements log t - (residuals + sum r |w|^2) / (2 t^2) + sum (n log r - log det(H + r)) / 2

    which is largest at t^2 = (residuals + sum r |w|^2) / elements for any r. The r are found in turn.
    """
    ratios = best_precisions(parts)
    for _ in range(_ROUNDS):
        before = list(ratios)
        for i, part in enumerate(parts):
            rest = residuals + sum(r * p.squares for j, (r, p) in enumerate(zip(ratios, parts, strict=True)) if j != i)

            def slope(log_ratio: float, part: Part = part, rest: float = rest) -> float:
                ratio = math.exp(log_ratio)
                return part.determined(ratio) - elements * ratio * part.squares / (rest + ratio * part.squares)

            ratios[i] = math.exp(_highest(part, rest, elements, slope))
        if all(abs(math.log(a / b)) < 1e-12 for a, b in zip(ratios, before, strict=True)):
            break
    scale = (residuals + sum(r * p.squares for r, p in zip(ratios, parts, strict=True))) / elements
    scale = max(scale, 1e-30)
    return [min(max(r / scale, SMALLEST), LARGEST) for r in ratios], math.sqrt(scale)


_GRID = 200


def _highest(part: Part, rest: float, elements: int, slope: Callable[[float], float]) -> float:
    """The log of the ratio r with the largest evidence, with the noise at its best for each r.

    As a function of r the evidence may have several maxima: the best point of a grid, then the root of the slope
    between its neighbors.
    """

    def value(log_ratio: float) -> float:
        ratio = math.exp(log_ratio)
        fit = math.log(max(rest + ratio * part.squares, 1e-300))
        log_det = float((part.eigenvalues + ratio).log().sum())
        return 0.5 * (part.count * log_ratio - log_det - elements * fit)

    grid = torch.linspace(math.log(SMALLEST), math.log(LARGEST), _GRID, dtype=torch.float64).tolist()
    values = [value(r) for r in grid]
    at = max(range(_GRID), key=values.__getitem__)
    low, high = grid[max(at - 1, 0)], grid[min(at + 1, _GRID - 1)]
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return 0.5 * (low + high)
