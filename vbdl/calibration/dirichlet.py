"""Dirichlet calibration: an affine map of the log-probabilities.

Kull, Perello-Nieto, Kängsepp, Silva Filho, Song, Flach, Beyond temperature scaling: Obtaining well-calibrated
multiclass probabilities with Dirichlet calibration, 2019, https://arxiv.org/abs/1910.12656
"""

import torch
from torch import Tensor

from vbdl.calibration._affine import Affine
from vbdl.calibration._fit import TINY
from vbdl.metrics._checks import check_probs_and_labels


class Dirichlet(Affine):
    """The map p -> softmax(W log p + b), W (classes, classes), of the mean probability. odir: see Affine.

    Probabilities below the smallest normal float32 are replaced by it.

    >>> _ = torch.manual_seed(0)
    >>> logits = 3 * torch.randn(500, 3)  # too large by a factor of two
    >>> y = torch.distributions.Categorical(logits=logits / 2).sample()
    >>> probs = logits.softmax(1)
    >>> method = vbdl.calibration.Dirichlet().fit(probs, y)
    >>> vbdl.metrics.ece(method(probs), y) < vbdl.metrics.ece(probs, y)
    True
    """

    acts_on = "probs"

    def fit(self, probs: Tensor, y: Tensor) -> "Dirichlet":
        """Fit; return self. probs: (batch, classes), or (batch,) of class 1;  y: (batch,). Every class needs a row."""
        probs, y = check_probs_and_labels(probs, y)
        self.fit_logits(probs.clamp(min=TINY).log().unsqueeze(0), y)
        return self

    def forward(self, probs: Tensor) -> Tensor:
        """Calibrate probabilities: (batch, classes) -> (batch, classes), or (batch,) -> (batch,)."""
        p = probs.to(torch.float64)
        if probs.ndim == 1:
            p = torch.stack((1 - p, p), dim=1)
        q = self.map(p.clamp(min=TINY).log()).softmax(1)
        return (q[:, 1] if probs.ndim == 1 else q).to(probs.dtype)
