"""Ensemble temperature scaling: tempered probabilities, mixed with the original ones and the uniform distribution.

Zhang, Kailkhura, Han, Mix-n-Match: Ensemble and Compositional Methods for Uncertainty Calibration in Deep Learning,
2020, https://arxiv.org/abs/2003.07329
"""

import torch
from torch import Tensor

from vbdl.calibration._fit import TINY, minimize
from vbdl.metrics._checks import check_probs_and_labels
from vbdl.types import Calibrator


class EnsembleTemperature(Calibrator):
    """The map p -> w₁ softmax(log p / T) + w₂ p + w₃ / classes of the mean probability, with w on the simplex.

    It keeps the most probable class. "Ensemble" is the paper's word for the three parts; for the temperature of a deep
    ensemble use Temperature("logits") or Temperature("probs").

    >>> _ = torch.manual_seed(0)
    >>> logits = 3 * torch.randn(500, 3)  # too large by a factor of two
    >>> y = torch.distributions.Categorical(logits=logits / 2).sample()
    >>> probs = logits.softmax(1)
    >>> method = vbdl.calibration.EnsembleTemperature().fit(probs, y)
    >>> vbdl.metrics.ece(method(probs), y) < vbdl.metrics.ece(probs, y)
    True
    """

    acts_on = "probs"

    def __init__(self):
        super().__init__()
        self.register_buffer("log_temperature", torch.zeros((), dtype=torch.float64))
        self.register_buffer("weights", torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64))

    def fit(self, probs: Tensor, y: Tensor) -> "EnsembleTemperature":
        """Minimize the negative log-likelihood. probs: (batch, classes), or (batch,) of class 1;  y: (batch,)."""
        probs, y = check_probs_and_labels(probs, y)
        log_p, classes = probs.clamp(min=TINY).log(), probs.shape[1]
        picked = probs.gather(1, y[:, None]).squeeze(1)

        def loss(v: Tensor) -> Tensor:
            scaled = (log_p * torch.exp(-v[0])).log_softmax(1).gather(1, y[:, None]).squeeze(1)
            w = v[1:].softmax(0)
            mixed = w[0] * scaled.exp() + w[1] * picked + w[2] / classes
            return -mixed.clamp(min=TINY).log().mean()

        # logits of the weights differ by at most 30, so a weight can be as small as 1e-13, in effect 0
        start = torch.tensor([0.0, 2.0, 0.0, -2.0], dtype=torch.float64, device=probs.device)
        best = minimize(loss, start, [(-6.9, 6.9), (-15, 15), (-15, 15), (-15, 15)])
        self.log_temperature, self.weights = best[0], best[1:].softmax(0)
        return self

    def forward(self, probs: Tensor) -> Tensor:
        """Calibrate probabilities: (batch, classes) -> (batch, classes), or (batch,) -> (batch,)."""
        p = probs.to(torch.float64)
        if probs.ndim == 1:
            p = torch.stack((1 - p, p), dim=1)
        scaled = (p.clamp(min=TINY).log() * torch.exp(-self.log_temperature)).softmax(1)
        q = self.weights[0] * scaled + self.weights[1] * p + self.weights[2] / p.shape[1]
        return (q[:, 1] if probs.ndim == 1 else q).to(probs.dtype)
