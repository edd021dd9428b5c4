"""Matrix scaling: an affine map of the logits, held back by ODIR.

Guo, Pleiss, Sun, Weinberger, On Calibration of Modern Neural Networks, 2017,
https://arxiv.org/abs/1706.04599
Kull, Perello-Nieto, Kängsepp, Silva Filho, Song, Flach, Beyond temperature scaling: Obtaining
well-calibrated multiclass probabilities with Dirichlet calibration, 2019,
https://arxiv.org/abs/1910.12656 (off-diagonal and intercept regularisation)
"""

import math

import torch
from torch import Tensor, nn

from vbdl.calibration._fit import check_logits_and_labels, minimize, require_all_classes


class MatrixScaling(nn.Module):
    """softmax(W z + b), W (classes, classes); acts on each sample's logits.

    odir: weight of the mean squared off-diagonal entry of W and of the mean squared entry of b in
    the
    loss (nats a row). Without it (0) the classes² parameters overfit unless rows are many times
    more.
    Not blind to a constant added to all logits of a row.
    """

    acts_on = "logits"
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

    def fit(self, logits: Tensor, y: Tensor) -> "MatrixScaling":
        """logits: (batch, classes) or (samples, batch, classes);  y: (batch,).  Every class needs a
        row."""
        logits, y = check_logits_and_labels(logits, y)
        samples, _, classes = logits.shape
        require_all_classes(y, classes, "MatrixScaling")
        rows = torch.arange(y.numel(), device=y.device)
        off_diagonal = 1 - torch.eye(classes, dtype=torch.float64, device=logits.device)
        pairs = classes * (classes - 1)

        def loss(v: Tensor) -> Tensor:
            weight, bias = v[: classes**2].reshape(classes, classes), v[classes**2 :]
            log_probs = (logits @ weight.T + bias).log_softmax(-1)[:, rows, y]
            nll = -(log_probs.logsumexp(0) - math.log(samples)).mean()
            penalty = ((weight * off_diagonal) ** 2).sum() / pairs + (bias**2).mean()
            return nll + self.odir * penalty

        eye = torch.eye(classes, dtype=torch.float64, device=logits.device)
        best = minimize(loss, torch.cat((eye.reshape(-1), eye.new_zeros(classes))))
        self.weight = best[: classes**2].reshape(classes, classes)
        self.bias = best[classes**2 :]
        return self

    def forward(self, logits: Tensor) -> Tensor:
        """(..., classes) -> (..., classes) logits"""
        if self.weight is None or self.bias is None:
            raise RuntimeError("MatrixScaling has not been fitted: call fit first")
        return logits @ self.weight.to(logits.dtype).T + self.bias.to(logits.dtype)
