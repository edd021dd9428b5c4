"""Temperature scaling: all logits are divided by one number.

Guo, Pleiss, Sun, Weinberger, On Calibration of Modern Neural Networks, 2017, https://arxiv.org/abs/1706.04599
Rahaman, Thiery, Uncertainty Quantification and Deep Ensembles, 2021, https://arxiv.org/abs/2007.08792 (before or after
averaging an ensemble)
"""

import math
import warnings

import torch
from torch import Tensor

from vbdl.calibration._fit import TINY, check_logits_and_labels, minimize
from vbdl.metrics._checks import check_probs_and_labels
from vbdl.types import Calibrator

_LOG_LIMIT = math.log(1000.0)


class Temperature(Calibrator):
    """The map z -> z / T of logits; T is fitted in [1e-3, 1e3], as log T in float64.

    acts_on: "logits", z -> z / T for each sample, fitted to the samples' mean probability, which predictors return; or
        "probs", p -> softmax(log p / T) for the mean probability.

    The most probable class never changes with "probs" or a single sample. With "logits" and several samples it may
    change if they disagree, because the mean of sharpened samples is not the sharpened mean.

    >>> _ = torch.manual_seed(0)
    >>> logits = 3 * torch.randn(500, 3)  # too large by a factor of two
    >>> y = torch.distributions.Categorical(logits=logits / 2).sample()
    >>> method = vbdl.Temperature().fit(logits, y)
    >>> round(method.temperature, 1)
    2.1
    >>> method(logits).shape
    torch.Size([500, 3])
    """

    acts_on = "logits"
    one_logit = True
    log_temperature: Tensor

    def __init__(self, acts_on: str = "logits"):
        super().__init__()
        if acts_on not in ("logits", "probs"):
            raise ValueError(f"acts_on must be 'logits' or 'probs', not {acts_on!r}")
        self.acts_on = acts_on
        self.register_buffer("log_temperature", torch.zeros((), dtype=torch.float64))

    @property
    def temperature(self) -> float:
        return math.exp(float(self.log_temperature))

    def extra_repr(self) -> str:
        return f"temperature={self.temperature:.6g}, acts_on={self.acts_on!r}"

    def fit(self, outputs: Tensor, y: Tensor) -> "Temperature":
        """Minimize the negative log-likelihood; return self.

        outputs: for "logits" (batch, classes) or (samples, batch, classes); for "probs" (batch, classes), or (batch,)
            of class 1.
        y: (batch,); classes may be missing.

        If all rows are predicted correctly, or none better than by chance, no T is best: it ends at a limit, with a
        warning.
        """
        if self.acts_on == "probs":
            probs, y = check_probs_and_labels(outputs, y)
            logits = probs.clamp(min=TINY).log().unsqueeze(0)
        else:
            logits, y = check_logits_and_labels(outputs, y)
        # shifting a row's logits changes no probability, and prevents overflow in the division
        logits = logits - logits.amax(dim=-1, keepdim=True)
        rows = torch.arange(y.numel(), device=y.device)

        def loss(log_temperature: Tensor) -> Tensor:
            log_probs = (logits * torch.exp(-log_temperature)).log_softmax(-1)[:, rows, y]
            return -(log_probs.logsumexp(0) - math.log(logits.shape[0])).mean()

        # the loss of a mixture can have several local minima: start at the best point of a coarse grid
        starts = torch.linspace(-3, 3, 25, dtype=torch.float64, device=logits.device)
        with torch.no_grad():
            start = starts[int(torch.stack([loss(s) for s in starts]).argmin())]
        best = minimize(lambda v: loss(v[0]), start.reshape(1), [(-_LOG_LIMIT, _LOG_LIMIT)])[0]
        # near a limit the loss is flat, so the search may stop before it
        for limit, reason in (
            (-_LOG_LIMIT, "all these rows are predicted correctly; calibrate on more rows"),
            (
                _LOG_LIMIT,
                "these rows are predicted no better than by chance, and every probability becomes about 1/classes; "
                "check that y belongs to these rows, or calibrate on more rows",
            ),
        ):
            if loss(at := best.new_tensor(limit)) <= loss(best):
                best = at
                warnings.warn(f"the temperature ended at its limit {math.exp(limit):.3g}: {reason}", stacklevel=2)
        self.log_temperature = best.to(self.log_temperature.device)
        return self

    def forward(self, outputs: Tensor) -> Tensor:
        """Calibrate logits of any shape, or probs (batch, classes) or (batch,), depending on acts_on."""
        scale = torch.exp(-self.log_temperature)
        if self.acts_on == "logits":
            return outputs * scale.to(outputs.dtype)
        p = outputs.to(torch.float64)
        if outputs.ndim == 1:
            z = p.clamp(min=TINY).log() - (1 - p).clamp(min=TINY).log()
            return torch.sigmoid(z * scale).to(outputs.dtype)
        return (p.clamp(min=TINY).log() * scale).softmax(-1).to(outputs.dtype)
