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

from vbdl.calling.autograd import holds_tangent


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


def kronecker_noise(output_vectors: Tensor, input_vectors: Tensor, std: Tensor, key: Tensor, layer: int) -> Tensor:
    """Draw U_G (std * E) U_A^T, (..., outputs, inputs), with E of independent standard normals.

    output_vectors: U_G, (..., outputs, outputs). input_vectors: U_A, (..., inputs, inputs).
    std: (..., outputs, inputs). key: (..., 2) int64. Raises NotImplementedError in forward-mode products.
    """
    _check_certain(output_vectors, input_vectors, std)
    return torch.ops.vbdl.kronecker_noise(output_vectors, input_vectors, std, key, layer)


def dense_noise(vectors: Tensor, std: Tensor, key: Tensor, layer: int) -> Tensor:
    """Draw V (std * e), (..., n), with e of n independent standard normals.

    vectors: V, (..., n, n). std: (..., n). key: (..., 2) int64. Raises NotImplementedError in forward-mode products.
    """
    _check_certain(vectors, std)
    return torch.ops.vbdl.dense_noise(vectors, std, key, layer)


def low_rank_noise(deviations: Tensor, key: Tensor, layer: int) -> Tensor:
    """Draw sum_k D_k e_k, (..., n), with e of `rank` independent standard normals.

    deviations: D, (..., rank, n). key: (..., 2) int64. Raises NotImplementedError in forward-mode products.
    """
    _check_certain(deviations)
    return torch.ops.vbdl.low_rank_noise(deviations, key, layer)


def _check_certain(*tensors: Tensor) -> None:
    """Raise NotImplementedError for a tensor with a tangent, which torch's operators lose without a word."""
    if any(map(holds_tangent, tensors)):
        raise NotImplementedError(
            "the factors of a Gaussian posterior have no forward-mode derivative: differentiate the network, not its "
            "posterior's covariance"
        )


_AXES = {"kronecker_noise": (2, 2, 2, 1), "dense_noise": (2, 1, 1), "low_rank_noise": (2, 1)}  # of one draw's tensors


def _lead(tensors: Sequence[Tensor], axes: Sequence[int]) -> torch.Size:
    """The axes of draws and members that these tensors have together."""
    return torch.broadcast_shapes(*[t.shape[: t.ndim - n] for t, n in zip(tensors, axes, strict=True)])


def _shape_of_kronecker(output_vectors, input_vectors, std, key, layer):
    lead = _lead((output_vectors, input_vectors, std, key), _AXES["kronecker_noise"])
    return std.new_empty((*lead, *std.shape[-2:]))


def _shape_of_dense(vectors, std, key, layer):
    return std.new_empty((*_lead((vectors, std, key), _AXES["dense_noise"]), std.shape[-1]))


def _shape_of_low_rank(deviations, key, layer):
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


def _register(reference: Callable[..., Tensor], shape: Callable[..., Tensor], name: str) -> None:
    operator = torch.library.custom_op(f"vbdl::{name}", reference, mutates_args=())
    operator.register_fake(shape)
    operator.register_vmap(_mapped(operator, _AXES[name]))


_register(kronecker_reference, _shape_of_kronecker, "kronecker_noise")
_register(dense_reference, _shape_of_dense, "dense_noise")
_register(low_rank_reference, _shape_of_low_rank, "low_rank_noise")
KRONECKER = torch.ops.vbdl.kronecker_noise.default
DENSE = torch.ops.vbdl.dense_noise.default
LOW_RANK = torch.ops.vbdl.low_rank_noise.default
LOWERED = {KRONECKER: kronecker_reference, DENSE: dense_reference, LOW_RANK: low_rank_reference}
