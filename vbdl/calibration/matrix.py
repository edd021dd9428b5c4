"""Matrix scaling: an affine map of the logits with ODIR regularization.

Guo, Pleiss, Sun, Weinberger, On Calibration of Modern Neural Networks, 2017, https://arxiv.org/abs/1706.04599
"""

from torch import Tensor

from vbdl.calibration._affine import Affine
from vbdl.calibration._fit import check_logits_and_labels


class MatrixScaling(Affine):
    """The map z -> W z + b, W (classes, classes), of each sample's logits. odir: see Affine.

    A constant added to all logits of a row changes the result.

    >>> _ = torch.manual_seed(0)
    >>> logits = 3 * torch.randn(500, 3)  # too large by a factor of two
    >>> y = torch.distributions.Categorical(logits=logits / 2).sample()
    >>> method = vbdl.calibration.MatrixScaling().fit(logits, y)
    >>> method(logits).shape
    torch.Size([500, 3])
    """

    acts_on = "logits"

    def fit(self, logits: Tensor, y: Tensor) -> "MatrixScaling":
        """Fit; return self. logits: (batch, classes) or (samples, batch, classes);  y: (batch,), with every class."""
        self.fit_logits(*check_logits_and_labels(logits, y))
        return self

    def forward(self, logits: Tensor) -> Tensor:
        """Map logits: (..., classes) -> (..., classes)."""
        return self.map(logits)
