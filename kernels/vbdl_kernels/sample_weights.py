"""Draws of weights that are stored: mean + std * noise, for convolutions, large batches and other operations.

They are identical to those of `sampled_linear` bit for bit on one device. The gradient computes the noise again, so
only the weights are stored.
"""

import torch
from torch import Tensor

from vbdl_kernels import dispatch, philox
from vbdl_kernels.philox import WEIGHT


def rows_columns(shape: torch.Size) -> tuple[int, int]:
    """The rows and columns of a parameter's noise.

    (out, in) for a weight, (out, in * height * width) for a convolution's, (1, n) for a vector.
    """
    rows = shape[0] if len(shape) > 1 else 1
    return rows, shape.numel() // rows if rows else 0


def reference_noise(mean: Tensor, key: Tensor, layer: int, stream: int) -> Tensor:
    """The noise of a parameter, rounded to its dtype.  mean: (*shape);  key: (..., 2)  ->  (..., *shape)"""
    noise = philox.normal(key, layer, stream, *rows_columns(mean.shape))
    return noise.reshape(*key.shape[:-1], *mean.shape).to(mean.dtype)


def reference_sample_weights(mean: Tensor, std: Tensor, key: Tensor, layer: int, stream: int) -> Tensor:
    """The specification of `sample_weights`: noise is rounded to the parameters' dtype, the sum is rounded once."""
    noise = reference_noise(mean, key, layer, stream)
    wide = torch.float64 if mean.dtype == torch.float64 else torch.float32
    return (mean.to(wide) + std.to(wide) * noise.to(wide)).to(mean.dtype)


def _reference_gradient(gradient: Tensor, key: Tensor, layer: int, stream: int) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if gradient.dtype == torch.float64 else torch.float32
    noise = philox.normal(key, layer, stream, *rows_columns(gradient.shape[1:])).reshape(gradient.shape)
    gradient = gradient.to(wide)
    return gradient.sum(0), (gradient * noise.to(wide)).sum(0)


def _gradient_shape(gradient, key, layer, stream):
    wide = torch.float64 if gradient.dtype == torch.float64 else torch.float32
    return gradient.new_empty(gradient.shape[1:], dtype=wide), gradient.new_empty(gradient.shape[1:], dtype=wide)


dispatch.define(
    "sample_weights",
    "(Tensor mean, Tensor std, Tensor key, int layer, int stream) -> Tensor",
    reference_sample_weights,
    lambda mean, std, key, layer, stream: mean.new_empty((len(key), *mean.shape)),
)
dispatch.define(
    "sample_weights_gradient",
    "(Tensor gradient, Tensor key, int layer, int stream) -> (Tensor, Tensor)",
    _reference_gradient,
    _gradient_shape,
)
dispatch.kernels_in("sample_weights_kernel", "sample_weights", "sample_weights_gradient")


def _mapped(call, info, in_dims, mean, std, key, layer, stream):
    if in_dims[0] is not None or in_dims[1] is not None:  # parameters per ensemble member
        return dispatch.one_by_one(call, info, in_dims, mean, std, key, layer, stream)
    key = key.movedim(in_dims[2], 0)
    return call(mean, std, key.flatten(0, 1), layer, stream).unflatten(0, key.shape[:2]), 0


dispatch.batching("sample_weights", _mapped)


class _SampleWeights(torch.autograd.Function):
    @staticmethod
    def forward(mean, std, key, layer, stream):
        return torch.ops.vbdl.sample_weights(mean, std, key, layer, stream)

    @staticmethod
    def setup_context(ctx, inputs, output):
        mean, _, key, ctx.layer, ctx.stream = inputs
        ctx.dtype = mean.dtype
        ctx.save_for_backward(key)

    @staticmethod
    def backward(ctx, gradient):
        (key,) = ctx.saved_tensors
        d_mean, d_std = _SampleWeightsGradient.apply(gradient, key, ctx.layer, ctx.stream)
        return d_mean.to(ctx.dtype), d_std.to(ctx.dtype), None, None, None

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return _mapped(_SampleWeights.apply, info, in_dims, *arguments)


class _SampleWeightsGradient(torch.autograd.Function):
    """The gradient as a differentiable function, so that second derivatives are right and not silently zero."""

    @staticmethod
    def forward(gradient, key, layer, stream):
        return torch.ops.vbdl.sample_weights_gradient(gradient, key, layer, stream)

    @staticmethod
    def setup_context(ctx, inputs, output):
        gradient, key, ctx.layer, ctx.stream = inputs
        ctx.dtype = gradient.dtype
        ctx.save_for_backward(key)

    @staticmethod
    def backward(ctx, d_mean, d_std):
        # the gradient is linear, and its transpose is the sampling itself: d_mean + noise * d_std
        (key,) = ctx.saved_tensors
        return _SampleWeights.apply(d_mean, d_std, key, ctx.layer, ctx.stream).to(ctx.dtype), None, None, None

    @staticmethod
    def vmap(info, in_dims, gradient, key, layer, stream):
        return dispatch.one_by_one(_SampleWeightsGradient.apply, info, in_dims, gradient, key, layer, stream)


@dispatch.kept_whole("sample_weights")
def _sample_weights(*arguments):
    return dispatch.call_of(_SampleWeights, "sample_weights", *arguments)(*arguments)


def sample_weights(mean: Tensor, std: Tensor, key: Tensor, layer: int, stream: int = WEIGHT) -> Tensor:
    """Draw a parameter: mean + std * noise.

    mean, std: (*shape), one dtype;  key: (samples, 2) int64  ->  (samples, *shape);  key: (2,)  ->  (*shape)
    layer, stream: the numbers of the noise, see `philox.py`.

    Differentiable with respect to mean and std, to any order. Works under `vmap`, `torch.compile(fullgraph=True)`,
    `torch.func` and export. Raises ValueError if mean and std do not match, and for a key of another dtype or shape.
    """
    check_parameters(mean, std, key, layer)
    if key.ndim == 1:
        return _sample_weights(mean, std, key[None], layer, stream).squeeze(0)
    return _sample_weights(mean, std, key, layer, stream)


def check_parameters(mean: Tensor, std: Tensor, key: Tensor, layer: int) -> None:
    """Raise ValueError if mean and std do not match, or for a key or a layer number that is not valid."""
    if mean.shape != std.shape or mean.dtype != std.dtype:
        raise ValueError(
            f"mean and std differ: {tuple(mean.shape)} {mean.dtype} and {tuple(std.shape)} {std.dtype}; they need one "
            f"shape and dtype"
        )
    if mean.numel() >= 2**31:
        raise ValueError(f"{mean.numel()} weights in one parameter: kernels index up to 2**31")
    if not mean.is_floating_point():
        raise ValueError(f"parameters must be floating-point tensors, got {mean.dtype}")
    if key.dtype != torch.int64 or key.ndim not in (1, 2) or key.shape[-1] != 2:
        raise ValueError(f"key must be int64 of shape (2,) or (samples, 2), got {key.dtype} {tuple(key.shape)}")
    if not 0 <= layer < 2**28:
        raise ValueError(f"layer {layer} out of range: use a number from 0 to 2**28 - 1")
