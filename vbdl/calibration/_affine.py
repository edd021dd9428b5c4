"""The affine map of logits shared by matrix scaling and Dirichlet calibration, with ODIR regularization.

Kull, Perello-Nieto, Kängsepp, Silva Filho, Song, Flach, Beyond temperature scaling: Obtaining well-calibrated
multiclass probabilities with Dirichlet calibration, 2019, https://arxiv.org/abs/1910.12656 (off-diagonal and intercept
regularization)
"""

import math

import torch
from torch import Tensor

from vbdl.calibration._fit import minimize, require_all_classes
from vbdl.types import Calibrator


class Affine(Calibrator):
    """An affine map of logits, z -> W z + b, W (classes, classes), b (classes,).

    odir: weight, in a loss in nats per row, of the mean squared off-diagonal entry of W and the mean squared entry of
        b. With odir=0 the classes² parameters overfit unless there are many more rows.
    """

    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, odir: float = 1e-2):
        super().__init__()
        if not odir >= 0:
            raise ValueError(f"odir must not be negative, but is {odir}")
        self.odir = odir
        self.register_buffer("weight", None)
        self.register_buffer("bias", None)

    def extra_repr(self) -> str:
        return f"odir={self.odir}"

    def fit_logits(self, logits: Tensor, y: Tensor) -> None:
        """Minimize the NLL of the samples' mean probability. logits: (samples, batch, classes) float64;  y: (batch,)"""
        samples, _, classes = logits.shape
        require_all_classes(y, classes, type(self).__name__)
        rows = torch.arange(y.numel(), device=y.device)
        eye = torch.eye(classes, dtype=torch.float64, device=logits.device)

        def loss(v: Tensor) -> Tensor:
            weight, bias = v[: classes**2].reshape(classes, classes), v[classes**2 :]
            log_probs = (logits @ weight.T + bias).log_softmax(-1)[:, rows, y]
            nll = -(log_probs.logsumexp(0) - math.log(samples)).mean()
            off_diagonal = ((weight * (1 - eye)) ** 2).sum() / (classes * (classes - 1))
            return nll + self.odir * (off_diagonal + (bias**2).mean())

        best = minimize(loss, torch.cat((eye.reshape(-1), eye.new_zeros(classes))))
        self.weight, self.bias = best[: classes**2].reshape(classes, classes), best[classes**2 :]

    def map(self, logits: Tensor) -> Tensor:
        """Map logits: (..., classes) -> (..., classes)."""
        if self.weight is None or self.bias is None:
            raise RuntimeError(f"{type(self).__name__} has not been fitted: call fit first")
        return logits @ self.weight.to(logits.dtype).T + self.bias.to(logits.dtype)
