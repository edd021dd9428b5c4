"""The correlated noise of factors as single operators, which rewrites and moment rules recognize in a traced graph.

Under `vmap`, products of shared and stacked matrices are traced in many forms; these stay one operation until all
rewrites are done, and are then lowered to plain operations (`LOWERED`). All tensors may have leading axes of draws or
members, which are broadcast. The noise is a pure function of the key, and the operators have no derivative.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from vbdl_kernels import normal
from vbdl_kernels.philox import BIAS, WEIGHT


def kronecker_reference(output_vectors: Tensor, input_vectors: Tensor, std: Tensor, key: Tensor, layer: int) -> Tensor:
    """`kronecker_noise` in plain operations."""
    outputs, inputs = std.shape[-2:]
    noise = normal(key, layer, WEIGHT, outputs, inputs).to(std.dtype)
    return output_vectors @ (std * noise) @ input_vectors.mT


def dense_reference(vectors: Tensor, std: Tensor, key: Tensor, layer: int) -> Tensor:
    """`dense_noise` in plain operations."""
    noise = normal(key, layer, BIAS, 1, std.shape[-1]).to(std.dtype)  # (..., 1, n)
    return ((std.unsqueeze(-2) * noise) @ vectors.mT).squeeze(-2)


def low_rank_reference(deviations: Tensor, key: Tensor, layer: int) -> Tensor:
    """`low_rank_noise` in plain operations."""
    coefficients = normal(key, layer, BIAS, 1, deviations.shape[-2]).to(deviations.dtype)  # (..., 1, rank)
    return (coefficients @ deviations).squeeze(-2)


@torch.library.custom_op("vbdl::kronecker_noise", mutates_args=())
def kronecker_noise(output_vectors: Tensor, input_vectors: Tensor, std: Tensor, key: Tensor, layer: int) -> Tensor:
    """Draw U_G (std * E) U_A^T, (..., outputs, inputs), with E of independent standard normals.

    output_vectors: U_G, (..., outputs, outputs). input_vectors: U_A, (..., inputs, inputs).
    std: (..., outputs, inputs). key: (..., 2) int64.
    """
    return kronecker_reference(output_vectors, input_vectors, std, key, layer)


@torch.library.custom_op("vbdl::dense_noise", mutates_args=())
def dense_noise(vectors: Tensor, std: Tensor, key: Tensor, layer: int) -> Tensor:
    """Draw V (std * e), (..., n), with e of n independent standard normals.

    vectors: V, (..., n, n). std: (..., n). key: (..., 2) int64.
    """
    return dense_reference(vectors, std, key, layer)


@torch.library.custom_op("vbdl::low_rank_noise", mutates_args=())
def low_rank_noise(deviations: Tensor, key: Tensor, layer: int) -> Tensor:
    """Draw sum_k D_k e_k, (..., n), with e of `rank` independent standard normals.

    deviations: D, (..., rank, n). key: (..., 2) int64.
    """
    return low_rank_reference(deviations, key, layer)


_AXES = {"kronecker_noise": (2, 2, 2, 1), "dense_noise": (2, 1, 1), "low_rank_noise": (2, 1)}  # of one draw's tensors


def _lead(tensors: Sequence[Tensor], axes: Sequence[int]) -> torch.Size:
    """The axes of draws and members that these tensors have together."""
    return torch.broadcast_shapes(*[t.shape[: t.ndim - n] for t, n in zip(tensors, axes, strict=True)])


@kronecker_noise.register_fake
def _(output_vectors, input_vectors, std, key, layer):
    lead = _lead((output_vectors, input_vectors, std, key), _AXES["kronecker_noise"])
    return std.new_empty((*lead, *std.shape[-2:]))


@dense_noise.register_fake
def _(vectors, std, key, layer):
    return std.new_empty((*_lead((vectors, std, key), _AXES["dense_noise"]), std.shape[-1]))


@low_rank_noise.register_fake
def _(deviations, key, layer):
    return deviations.new_empty((*_lead((deviations, key), _AXES["low_rank_noise"]), deviations.shape[-1]))


def _mapped(operator: Callable[..., Tensor], axes: tuple[int, ...]) -> Callable[..., tuple[Tensor, int]]:
    """The vmap rule of an operator: one call, in which the mapped axis is the first of the leading axes.

    axes: the number of axes of each tensor argument for one draw.
    """

    def rule(info: object, in_dims: tuple[int | None, ...], *arguments) -> tuple[Tensor, int]:
        tensors, layer, lead = arguments[:-1], arguments[-1], 0
        for t, n, d in zip(tensors, axes, in_dims, strict=False):
            lead = max(lead, t.ndim - n - (d is not None))
        first = []
        for t, n, d in zip(tensors, axes, in_dims, strict=False):
            if d is not None:  # the axes of earlier maps that this tensor lacks come after the new one
                t = t.movedim(d, 0)
                t = t.reshape(t.shape[0], *[1] * (lead - (t.ndim - n - 1)), *t.shape[1:])
            first.append(t)
        return operator(*first, layer), 0

    return rule


for _operator in (kronecker_noise, dense_noise, low_rank_noise):
    _operator.register_vmap(_mapped(_operator, _AXES[_operator._name]))

KRONECKER = torch.ops.vbdl.kronecker_noise.default
DENSE = torch.ops.vbdl.dense_noise.default
LOW_RANK = torch.ops.vbdl.low_rank_noise.default
LOWERED = {KRONECKER: kronecker_reference, DENSE: dense_reference, LOW_RANK: low_rank_reference}
