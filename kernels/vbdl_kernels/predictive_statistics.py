"""The statistics of class probabilities over draws, in one pass over the logits.

    mean = E p,   total = H[E p],   aleatoric = E H[p],   variance = E p^2 - (E p)^2;   epistemic = total - aleatoric

No tensor of probabilities, samples x batch x classes, is stored. The split of uncertainty is that of Depeweg,
Hernandez-Lobato, Doshi-Velez and Udluft, *Decomposition of Uncertainty in Bayesian Deep Learning*, ICML 2018
(https://arxiv.org/abs/1710.07283).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vbdl_kernels import dispatch


class PredictiveStatistics(NamedTuple):
    """The statistics of class probabilities over draws."""

    mean: Tensor  # (batch, classes): the predictive probabilities
    variance: Tensor  # (batch, classes): the variance of the probabilities over draws, divided by n and not n - 1
    total: Tensor  # (batch,) nats: the entropy of the mean
    aleatoric: Tensor  # (batch,) nats: the mean of the entropies


def reference_predictive_statistics(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The specification of `predictive_statistics`, in float32, or in float64 for float64 logits."""
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    probs = logits.to(wide).softmax(-1)
    mean = probs.mean(0)
    entropy = lambda p: torch.special.entr(p).sum(-1)
    return mean, probs.var(0, correction=0), entropy(mean), entropy(probs).mean(0)


def _shapes(logits):
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    new = lambda *shape: logits.new_empty(shape, dtype=wide)
    _, batch, classes = logits.shape
    return new(batch, classes), new(batch, classes), new(batch), new(batch)


dispatch.define(
    "predictive_statistics",
    "(Tensor logits) -> (Tensor, Tensor, Tensor, Tensor)",
    reference_predictive_statistics,
    _shapes,
)
dispatch.kernels_in("predictive_statistics_kernel", "predictive_statistics")


def _mapped(call, info, in_dims, logits):
    logits = logits.movedim(in_dims[0], 1)  # (samples, mapped, batch, classes)
    statistics = call(logits.flatten(1, 2))
    return tuple(t.unflatten(0, logits.shape[1:3]) for t in statistics), (0, 0, 0, 0)


dispatch.batching("predictive_statistics", _mapped)


@dispatch.kept_whole("predictive_statistics")
def _predictive_statistics(logits):
    if dispatch.wants_derivative(logits):
        return reference_predictive_statistics(logits)
    return torch.ops.vbdl.predictive_statistics(logits)


def predictive_statistics(logits: Tensor) -> PredictiveStatistics:
    """Compute mean, variance, total and aleatoric uncertainty of the class probabilities over draws.

    logits: (samples, batch, classes), samples at least 1  ->  fields of (batch, classes) and (batch,), float32

    Logits may be up to 1e38 or minus infinity; a row with a NaN, or with only minus infinity, gives NaN.
    Statistics of chunks of draws can be merged: means weighted by the numbers of draws, variances by Chan's formula,
    and the total from the merged mean. If a derivative is needed, plain torch runs instead of the kernel. Raises
    ValueError for other shapes or dtypes.
    """
    if logits.ndim != 3 or logits.shape[0] < 1 or not logits.is_floating_point():
        raise ValueError(
            f"logits must be float (samples >= 1, batch, classes), got {logits.dtype} {tuple(logits.shape)}"
        )
    return PredictiveStatistics(*_predictive_statistics(logits))
