"""Dirichlet calibration: an affine map of the log-probabilities.

Kull, Perello-Nieto, Kängsepp, Silva Filho, Song, Flach, Beyond temperature scaling: Obtaining
well-calibrated multiclass probabilities with Dirichlet calibration, 2019,
https://arxiv.org/abs/1910.12656
"""

import torch
from torch import Tensor, nn

from vbdl.calibration._fit import TINY, minimize, require_all_classes
from vbdl.metrics._checks import check_probs_and_labels


class Dirichlet(nn.Module):
    """softmax(W log p + b), W (classes, classes); acts on the mean probability.

    odir: weight of the mean squared off-diagonal entry of W and of the mean squared entry of b.
    Probabilities below the smallest normal float32 count as that.
    """

    acts_on = "probs"
    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, odir: float = 1e-2):
        super().__init__()
        if not odir >= 0:
            raise ValueError(f"odir must not be negative, and is {odir}")
        self.odir = odir
        self.register_buffer("weight", None)
        self.register_buffer("bias", None)

    def extra_repr(self) -> str:
        return f"odir={self.odir}"

    def fit(self, probs: Tensor, y: Tensor) -> "Dirichlet":
        """probs: (batch, classes), or (batch,) of class 1;  y: (batch,).  Every class needs a
        row."""
        probs, y = check_probs_and_labels(probs, y)
        classes = probs.shape[1]
        require_all_classes(y, classes, "Dirichlet")
        log_p = probs.clamp(min=TINY).log()
        off_diagonal = 1 - torch.eye(classes, dtype=torch.float64, device=log_p.device)

        def loss(v: Tensor) -> Tensor:
            weight, bias = v[: classes**2].reshape(classes, classes), v[classes**2 :]
            nll = torch.nn.functional.cross_entropy(log_p @ weight.T + bias, y)
            pairs = ((weight * off_diagonal) ** 2).sum() / (classes * (classes - 1))
            return nll + self.odir * (pairs + (bias**2).mean())

        eye = torch.eye(classes, dtype=torch.float64, device=log_p.device)
        best = minimize(loss, torch.cat((eye.reshape(-1), eye.new_zeros(classes))))
        self.weight = best[: classes**2].reshape(classes, classes)
        self.bias = best[classes**2 :]
        return self

    def forward(self, probs: Tensor) -> Tensor:
        """(batch, classes) -> (batch, classes), or (batch,) -> (batch,)"""
        if self.weight is None or self.bias is None:
            raise RuntimeError("Dirichlet has not been fitted: call fit first")
        p = probs.to(torch.float64)
        if probs.ndim == 1:
            p = torch.stack((1 - p, p), dim=1)
        q = (p.clamp(min=TINY).log() @ self.weight.to(p.dtype).T + self.bias.to(p.dtype)).softmax(1)
        return (q[:, 1] if probs.ndim == 1 else q).to(probs.dtype)
