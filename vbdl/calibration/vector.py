"""Vector scaling: a factor and an offset for each class's logit.

Guo, Pleiss, Sun, Weinberger, On Calibration of Modern Neural Networks, 2017, https://arxiv.org/abs/1706.04599
"""

import math

import torch
from torch import Tensor

from vbdl.calibration._fit import check_logits_and_labels, minimize, require_all_classes
from vbdl.types import Calibrator


class VectorScaling(Calibrator):
    """The map z -> w ∘ z + b, w and b (classes,), of each sample's logits.

    Unlike a temperature it can change the most probable class, and a constant added to all logits of a row changes the
    result, so fit it to logits of the same network.

    >>> _ = torch.manual_seed(0)
    >>> logits = 3 * torch.randn(500, 3)  # too large by a factor of two
    >>> y = torch.distributions.Categorical(logits=logits / 2).sample()
    >>> method = vbdl.calibration.VectorScaling().fit(logits, y)
    >>> method(logits).shape
    torch.Size([500, 3])
    """

    acts_on = "logits"
    weight: Tensor | None
    bias: Tensor | None

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", None)
        self.register_buffer("bias", None)

    def fit(self, logits: Tensor, y: Tensor) -> "VectorScaling":
        """Fit; return self. logits: (batch, classes) or (samples, batch, classes);  y: (batch,), with every class."""
        logits, y = check_logits_and_labels(logits, y)
        samples, _, classes = logits.shape
        require_all_classes(y, classes, "VectorScaling")
        rows = torch.arange(y.numel(), device=y.device)

        def loss(v: Tensor) -> Tensor:
            log_probs = (logits * v[:classes] + v[classes:]).log_softmax(-1)[:, rows, y]
            return -(log_probs.logsumexp(0) - math.log(samples)).mean()

        start = torch.zeros(2 * classes, dtype=torch.float64, device=logits.device)
        start[:classes] = 1
        best = minimize(loss, start)
        self.weight, self.bias = best[:classes], best[classes:]
        return self

    def forward(self, logits: Tensor) -> Tensor:
        """Map logits: (..., classes) -> (..., classes)."""
        if self.weight is None or self.bias is None:
            raise RuntimeError("VectorScaling has not been fitted: call fit first")
        return logits * self.weight.to(logits.dtype) + self.bias.to(logits.dtype)
