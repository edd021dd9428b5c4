"""Beta calibration: a curve with three parameters in the logs of the probability and of its complement.

Kull, Silva Filho, Flach, Beta calibration: a well-founded and easily implemented improvement on logistic calibration
for binary classifiers, 2017, https://proceedings.mlr.press/v54/kull17a.html
"""

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from vbdl.calibration._fit import TINY, binary_problems, minimize, one_versus_rest
from vbdl.types import Calibrator


class Beta(Calibrator):
    """The map p -> σ(a log p - b log(1 - p) + c) with a, b >= 0: monotone, the identity for a = b = 1, c = 0.

    It acts on the mean probability; more than two classes are calibrated one-versus-rest and normalized.

    >>> _ = torch.manual_seed(0)
    >>> true = torch.rand(1000)
    >>> y = torch.bernoulli(true).long()
    >>> probs = true.square()  # a curved error
    >>> method = vbdl.calibration.Beta().fit(probs, y)
    >>> method(torch.tensor([0.25])).round(decimals=1)  # the true probability is 0.5
    tensor([0.5000])
    """

    acts_on = "probs"
    coefficients: Tensor | None

    def __init__(self):
        super().__init__()
        self.register_buffer("coefficients", None)  # (maps, 3): a, b, c

    def fit(self, probs: Tensor, y: Tensor) -> "Beta":
        """Fit; return self. probs: (batch, classes), or (batch,) of class 1;  y: (batch,). Every class needs a row."""
        coefficients = []
        for p, hit in binary_problems(probs, y, "Beta"):
            low, high = p.clamp(min=TINY).log(), -(1 - p).clamp(min=TINY).log()
            coefficients.append(
                minimize(
                    lambda v, low=low, high=high, hit=hit: binary_cross_entropy_with_logits(
                        v[0] * low + v[1] * high + v[2], hit
                    ),
                    torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64, device=p.device),
                    # bounds as in the paper: with a negative coefficient the curve would not be monotone
                    [(0.0, None), (0.0, None), (None, None)],
                )
            )
        self.coefficients = torch.stack(coefficients)
        return self

    def forward(self, probs: Tensor) -> Tensor:
        """Calibrate probabilities: (batch, classes) -> (batch, classes), or (batch,) -> (batch,)."""
        if self.coefficients is None:
            raise RuntimeError("Beta has not been fitted: call fit first")
        a, b, c = self.coefficients.T[:, :, None]

        def curve(p: Tensor) -> Tensor:
            return torch.sigmoid(a * p.clamp(min=TINY).log() - b * (1 - p).clamp(min=TINY).log() + c)

        return one_versus_rest(curve, a.shape[0], probs)
