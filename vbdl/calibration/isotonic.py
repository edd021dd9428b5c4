"""Isotonic regression of the outcome on the probability.

Zadrozny, Elkan, Transforming classifier scores into accurate multiclass probability estimates, 2002,
https://doi.org/10.1145/775047.775151
"""

import numpy as np
import torch
from scipy.optimize import isotonic_regression
from torch import Tensor

from vbdl.calibration._fit import binary_problems, one_versus_rest, stack_padded
from vbdl.types import Calibrator


def isotonic_knots(x: np.ndarray, y: np.ndarray, weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The knots (x, value) of the non-decreasing least-squares fit, which is linear between knots.

    x, y, weights: (n,). Equal x are replaced by their weighted mean, because scipy's routine treats them as different.
    """
    weights = np.ones_like(x) if weights is None else weights
    unique, where = np.unique(x, return_inverse=True)
    mass = np.bincount(where, weights=weights)
    mean = np.bincount(where, weights=weights * y) / mass
    fitted = isotonic_regression(mean, weights=mass).x
    # of a run of equal values only the ends are needed
    keep = np.ones(len(fitted), dtype=bool)
    keep[1:-1] = (fitted[1:-1] != fitted[:-2]) | (fitted[1:-1] != fitted[2:])
    return unique[keep], fitted[keep]


class Isotonic(Calibrator):
    """A non-decreasing curve fitted to the outcomes, linear between knots and constant outside.

    It acts on the mean probability; more than two classes are calibrated one-versus-rest and normalized. The curve may
    reach 0 or 1, so the log-likelihood can be infinite.

    >>> _ = torch.manual_seed(0)
    >>> true = torch.rand(1000)
    >>> y = torch.bernoulli(true).long()
    >>> probs = true.square()  # a curved error
    >>> method = vbdl.calibration.Isotonic().fit(probs, y)
    >>> method(torch.tensor([0.25])).round(decimals=1)  # the true probability is 0.5
    tensor([0.5000])
    """

    acts_on = "probs"
    knots: Tensor | None
    values: Tensor | None

    def __init__(self):
        super().__init__()
        self.register_buffer("knots", None)  # (maps, knots), padded with the last one
        self.register_buffer("values", None)  # (maps, knots)

    def fit(self, probs: Tensor, y: Tensor, weights: Tensor | None = None) -> "Isotonic":
        """Fit; return self. probs: (batch, classes), or (batch,) of class 1;  y: (batch,). Every class needs a row.

        weights: (batch,) positive weight of each row.
        """
        mass = None
        if weights is not None:
            mass = weights.detach().cpu().to(torch.float64).numpy()
            if mass.shape != (y.shape[0],) or not (np.isfinite(mass) & (mass > 0)).all():
                raise ValueError("weights must be (batch,), finite and positive")
        knots, values = [], []
        for p, hit in binary_problems(probs, y, "Isotonic"):
            x, value = isotonic_knots(p.cpu().numpy(), hit.cpu().numpy(), mass)
            # a curve with one knot is constant; repeating the knot avoids a special case in the lookup
            x, value = (np.repeat(x, 2), np.repeat(value, 2)) if len(x) == 1 else (x, value)
            knots.append(torch.from_numpy(x).to(p.device))
            values.append(torch.from_numpy(value).to(p.device))
        self.knots, self.values = stack_padded(knots), stack_padded(values)
        return self

    def forward(self, probs: Tensor) -> Tensor:
        """Calibrate probabilities: (batch, classes) -> (batch, classes), or (batch,) -> (batch,)."""
        knots, values = self.knots, self.values
        if knots is None or values is None:
            raise RuntimeError("Isotonic has not been fitted: call fit first")

        def curve(p: Tensor) -> Tensor:
            right = torch.searchsorted(knots, p, right=True).clamp(1, knots.shape[1] - 1)
            x0, x1 = knots.gather(1, right - 1), knots.gather(1, right)
            y0, y1 = values.gather(1, right - 1), values.gather(1, right)
            width = x1 - x0
            share = ((p - x0) / torch.where(width > 0, width, 1.0)).clamp(0, 1)
            return torch.where(width > 0, y0 + share * (y1 - y0), y1)

        return one_versus_rest(curve, values.shape[0], probs)
