"""Matrix scaling: an affine map of the logits, held back by ODIR.

Guo, Pleiss, Sun, Weinberger, On Calibration of Modern Neural Networks, 2017, https://arxiv.org/abs/1706.04599
"""

from torch import Tensor

from vbdl.calibration._affine import Affine
from vbdl.calibration._fit import check_logits_and_labels


class MatrixScaling(Affine):
    """softmax(W z + b), W (classes, classes); acts on each sample's logits. odir: see Affine.

    Not blind to a constant added to all logits of a row.
    """

    acts_on = "logits"

    def fit(self, logits: Tensor, y: Tensor) -> "MatrixScaling":
        """logits: (batch, classes) or (samples, batch, classes);  y: (batch,).  Every class needs a row."""
        self.fit_logits(*check_logits_and_labels(logits, y))
        return self

    def forward(self, logits: Tensor) -> Tensor:
        """(..., classes) -> (..., classes) logits"""
        return self.map(logits)
