"""Layers that behave differently in training for reasons other than dropout: normalization and randomized ReLU.

In prediction they run as in evaluation mode while dropout is on. Each function takes the masks of a draw and torch's
own function before that function's arguments.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from vbdl.nn.masks import Masks, described

NORMALIZATION_LAYERS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


def batch_norm(
    masks: Masks,
    func: Callable[..., Tensor],
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`F.batch_norm`, in prediction with running statistics: a batch's own would mix its rows."""
    if masks.per_row:
        if training and input.ndim > 1 and input.numel() == input.shape[1]:
            raise ValueError(
                f"batch normalization in {described(masks.place())} got one row to train on, but needs two: choose "
                f"a batch_size that does not leave one row for the last batch, or drop_last=True in a DataLoader"
            )
        return func(input, running_mean, running_var, weight, bias, training, momentum, eps)
    if running_mean is None:
        raise ValueError(
            f"batch normalization in {described(masks.place())} keeps no running statistics, so a row's "
            f"prediction would depend on its batch: train it with track_running_stats=True"
        )
    return func(input, running_mean, running_var, weight, bias, False, momentum, eps)


def rrelu(
    masks: Masks,
    func: Callable[..., Tensor],
    input: Tensor,
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    training: bool = False,
    inplace: bool = False,
) -> Tensor:
    """`F.rrelu`, in prediction with the mean slope, as in evaluation mode."""
    if training and masks.per_row:
        return func(input, lower, upper, True, False)
    return F.leaky_relu(input, (lower + upper) / 2)  # the evaluation of rrelu, without a random operation
