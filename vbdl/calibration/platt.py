"""Platt scaling: a logistic curve in the logit of each class's probability.

Platt, Probabilistic Outputs for Support Vector Machines and Comparisons to Regularized Likelihood Methods, 1999,
https://www.researchgate.net/publication/2594015
"""

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from vbdl.calibration._fit import TINY, binary_problems, minimize, one_versus_rest
from vbdl.types import Calibrator


def _logit(p: Tensor) -> Tensor:
    return p.clamp(min=TINY).log() - (1 - p).clamp(min=TINY).log()


class Platt(Calibrator):
    """The map p -> σ(a · logit(p) + b) of the mean probability; more than two classes one-versus-rest, normalized.

    smoothed: fit to Platt's targets (n₊ + 1)/(n₊ + 2) and 1/(n₋ + 2) instead of 1 and 0, which keeps the curve finite
        if the classes are separable.

    >>> _ = torch.manual_seed(0)
    >>> true = torch.rand(1000)
    >>> y = torch.bernoulli(true).long()
    >>> probs = true.square()  # a curved error
    >>> method = vbdl.calibration.Platt().fit(probs, y)
    >>> vbdl.metrics.ece(method(probs), y) < vbdl.metrics.ece(probs, y)
    True
    """

    acts_on = "probs"
    slope: Tensor | None
    intercept: Tensor | None

    def __init__(self, smoothed: bool = True):
        super().__init__()
        self.smoothed = smoothed
        self.register_buffer("slope", None)
        self.register_buffer("intercept", None)

    def fit(self, probs: Tensor, y: Tensor) -> "Platt":
        """Fit; return self. probs: (batch, classes), or (batch,) of class 1;  y: (batch,). Every class needs a row."""
        curves = []
        for p, hit in binary_problems(probs, y, "Platt"):
            z = _logit(p)
            target = hit
            if self.smoothed:
                positive = hit.sum()
                high, low = (positive + 1) / (positive + 2), 1 / (hit.numel() - positive + 2)
                target = torch.where(hit > 0, high, low)
            curves.append(
                minimize(
                    lambda v, z=z, target=target: binary_cross_entropy_with_logits(v[0] * z + v[1], target),
                    torch.tensor([1.0, 0.0], dtype=torch.float64, device=z.device),
                )
            )
        self.slope, self.intercept = torch.stack(curves).T.contiguous()
        return self

    def forward(self, probs: Tensor) -> Tensor:
        """Calibrate probabilities: (batch, classes) -> (batch, classes), or (batch,) -> (batch,)."""
        slope, intercept = self.slope, self.intercept
        if slope is None or intercept is None:
            raise RuntimeError("Platt has not been fitted: call fit first")
        curve = lambda p: torch.sigmoid(slope[:, None] * _logit(p) + intercept[:, None])
        return one_versus_rest(curve, slope.numel(), probs)
