"""A linear layer that draws its weights inside the matrix product, without a tensor of samples x out x in.

    y[s, b, o] = sum_i x[s, b, i] (mean[o, i] + std[o, i] noise[s, o, i]) + bias[s, o]

Weight uncertainty after Blundell, Cornebise, Kavukcuoglu and Wierstra, *Weight Uncertainty in Neural Networks*, ICML
2015 (https://arxiv.org/abs/1505.05424). The noise is a function of its index (`philox.py`), so gradients compute it
again instead of storing it. On the CPU and without triton the reference below runs, which does store the weights.
"""

import torch
from torch import Tensor

from vbdl_kernels import dispatch, philox
from vbdl_kernels.philox import BIAS, WEIGHT
from vbdl_kernels.sample_weights import check_parameters, reference_sample_weights


def wide_of(dtype: torch.dtype) -> torch.dtype:
    """The dtype to sum in: float64 for float64, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def reference_sampled_linear(
    x: Tensor,
    mean: Tensor,
    std: Tensor,
    bias_mean: Tensor | None,
    bias_std: Tensor | None,
    key: Tensor,
    layer: int,
    precision: str = "",
    bias_layer: int | None = None,
) -> Tensor:
    """The specification of `sampled_linear`: weights are rounded to the parameters' dtype, sums are in `wide_of`."""
    wide = wide_of(x.dtype)
    weights = reference_sample_weights(mean, std, key, layer, WEIGHT)
    y = x.to(wide) @ weights.to(wide).mT
    if bias_mean is not None:
        if bias_std is not None:
            bias_mean = reference_sample_weights(
                bias_mean, bias_std, key, layer if bias_layer is None else bias_layer, BIAS
            )[:, None]
        y = y + bias_mean.to(wide)
    return y.to(x.dtype)


def _reference_input(gradient, mean, std, key, layer, precision):
    wide = wide_of(gradient.dtype)
    weights = reference_sample_weights(mean, std, key, layer, WEIGHT)
    return (gradient.to(wide) @ weights.to(wide)).to(gradient.dtype)


def _reference_parameters(gradient, x, key, layer, precision):
    wide = wide_of(gradient.dtype)
    product = gradient.to(wide).mT @ x.to(wide)
    noise = philox.normal(key, layer, WEIGHT, gradient.shape[-1], x.shape[-1]).to(wide)
    return product.sum(0).to(gradient.dtype), (product * noise).sum(0).to(gradient.dtype)  # one rounding, at the end


def _parameters_shape(gradient, x, key, layer, precision):
    shape = (gradient.shape[-1], x.shape[-1])
    return gradient.new_empty(shape), gradient.new_empty(shape)


dispatch.define(
    "sampled_linear",
    "(Tensor x, Tensor mean, Tensor std, Tensor? bias_mean, Tensor? bias_std, Tensor key, int layer, str precision,"
    " int bias_layer) -> Tensor",
    reference_sampled_linear,
    lambda x, mean, std, bias_mean, bias_std, key, *_: x.new_empty((key.shape[0], x.shape[-2], mean.shape[0])),
)
dispatch.define(
    "sampled_linear_input",
    "(Tensor gradient, Tensor mean, Tensor std, Tensor key, int layer, str precision) -> Tensor",
    _reference_input,
    lambda gradient, mean, std, key, layer, precision: gradient.new_empty((*gradient.shape[:2], mean.shape[1])),
)
dispatch.define(
    "sampled_linear_parameters",
    "(Tensor gradient, Tensor x, Tensor key, int layer, str precision) -> (Tensor, Tensor)",
    _reference_parameters,
    _parameters_shape,
)
dispatch.kernels_in("sampled_linear_kernel", "sampled_linear")
dispatch.kernels_in("sampled_linear_gradient_kernel", "sampled_linear_input", "sampled_linear_parameters")


def map_linear(call, info, in_dims, x, mean, std, bias_mean, bias_std, key, *rest):
    """The vmap rule of a linear operator: one call for the whole mapped axis, unless parameters have it."""
    if any(dim is not None for dim in in_dims[1:5]):  # parameters per ensemble member
        return dispatch.one_by_one(call, info, in_dims, x, mean, std, bias_mean, bias_std, key, *rest)
    whole = lambda x, key: call(x, mean, std, bias_mean, bias_std, key, *rest)
    return dispatch.map_draws(whole, info.batch_size, x, in_dims[0], key, in_dims[5])


dispatch.batching("sampled_linear", map_linear)


# The gradient of each of the three functions below is made of the other two, so derivatives of any order use kernels.


class _SampledLinear(torch.autograd.Function):
    @staticmethod
    def forward(*arguments):
        return torch.ops.vbdl.sampled_linear(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, mean, std, bias_mean, bias_std, key, ctx.layer, ctx.precision, ctx.bias_layer = inputs
        ctx.bias = (bias_mean is not None) + (bias_std is not None)
        ctx.save_for_backward(x, mean, std, key)

    @staticmethod
    def backward(ctx, gradient):
        x, mean, std, key = ctx.saved_tensors
        d_x = d_mean = d_std = d_bias_mean = d_bias_std = None
        if ctx.needs_input_grad[0]:
            d_x = _InputGradient.apply(gradient, mean, std, key, ctx.layer, ctx.precision)
            if x.ndim == 2:
                d_x = d_x.sum(0, dtype=wide_of(d_x.dtype)).to(x.dtype)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            d_mean, d_std = _ParameterGradient.apply(gradient, x, key, ctx.layer, ctx.precision)
        if ctx.bias:
            by_sample = gradient.sum(1, dtype=wide_of(gradient.dtype))  # (samples, out)
            d_bias_mean = by_sample.sum(0).to(mean.dtype)
            if ctx.bias == 2:
                noise = philox.normal(key, ctx.bias_layer, BIAS, 1, gradient.shape[-1]).squeeze(-2)
                d_bias_std = (by_sample * noise.to(by_sample.dtype)).sum(0).to(mean.dtype)
        return d_x, d_mean, d_std, d_bias_mean, d_bias_std, None, None, None, None

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return map_linear(_SampledLinear.apply, info, in_dims, *arguments)


class _InputGradient(torch.autograd.Function):
    @staticmethod
    def forward(gradient, mean, std, key, layer, precision):
        return torch.ops.vbdl.sampled_linear_input(gradient, mean, std, key, layer, precision)

    @staticmethod
    def setup_context(ctx, inputs, output):
        gradient, mean, std, key, ctx.layer, ctx.precision = inputs
        ctx.save_for_backward(gradient, mean, std, key)

    @staticmethod
    def backward(ctx, dd_x):
        gradient, mean, std, key = ctx.saved_tensors
        d_gradient = _SampledLinear.apply(dd_x, mean, std, None, None, key, ctx.layer, ctx.precision, 0)
        d_mean, d_std = _ParameterGradient.apply(gradient, dd_x, key, ctx.layer, ctx.precision)
        return d_gradient, d_mean, d_std, None, None, None

    @staticmethod
    def vmap(info, in_dims, gradient, mean, std, key, layer, precision):
        if in_dims[1] is not None or in_dims[2] is not None:
            arguments = (gradient, mean, std, key, layer, precision)
            return dispatch.one_by_one(_InputGradient.apply, info, in_dims, *arguments)
        if in_dims[3] is None:
            gradient = gradient.movedim(in_dims[0], 1)  # (samples, mapped, batch, out)
            d_x = _InputGradient.apply(gradient.flatten(1, 2), mean, std, key, layer, precision)
            return d_x.unflatten(1, gradient.shape[1:3]), 1
        gradient = dispatch.leading(gradient, in_dims[0], info.batch_size)
        key = key.movedim(in_dims[3], 0)
        d_x = _InputGradient.apply(gradient.flatten(0, 1), mean, std, key.flatten(0, 1), layer, precision)
        return d_x.unflatten(0, key.shape[:2]), 0


class _ParameterGradient(torch.autograd.Function):
    @staticmethod
    def forward(gradient, x, key, layer, precision):
        return torch.ops.vbdl.sampled_linear_parameters(gradient, x, key, layer, precision)

    @staticmethod
    def setup_context(ctx, inputs, output):
        gradient, x, key, ctx.layer, ctx.precision = inputs
        ctx.save_for_backward(gradient, x, key)

    @staticmethod
    def backward(ctx, dd_mean, dd_std):
        gradient, x, key = ctx.saved_tensors
        d_gradient = _SampledLinear.apply(x, dd_mean, dd_std, None, None, key, ctx.layer, ctx.precision, 0)
        d_x = _InputGradient.apply(gradient, dd_mean, dd_std, key, ctx.layer, ctx.precision)
        if x.ndim == 2:
            d_x = d_x.sum(0, dtype=wide_of(d_x.dtype)).to(x.dtype)
        return d_gradient, d_x, None, None, None

    @staticmethod
    def vmap(info, in_dims, gradient, x, key, layer, precision):
        return dispatch.one_by_one(_ParameterGradient.apply, info, in_dims, gradient, x, key, layer, precision)


@dispatch.kept_whole("sampled_linear")
def _sampled_linear(*arguments):
    return dispatch.call_of(_SampledLinear, "sampled_linear", *arguments)(*arguments)


def sampled_linear(
    x: Tensor,
    mean: Tensor,
    std: Tensor,
    key: Tensor,
    layer: int,
    bias_mean: Tensor | None = None,
    bias_std: Tensor | None = None,
    precision: str = "",
    bias_layer: int | None = None,
) -> Tensor:
    """Apply a linear layer with normally distributed weights, once with each draw of the weights.

    x: (batch, in) shared or (samples, batch, in);  mean, std: (out, in);  bias_mean, bias_std: (out,) or None
    key: (samples, 2) int64  ->  (samples, batch, out);  one draw: x (..., in), key (2,)  ->  (..., out)

    layer, bias_layer: the layer numbers of the weights' and of the bias's noise; bias_layer defaults to layer.
    bias_std: None for a bias that is not random.
    precision: the precision of float32 products, "ieee", "tf32", or "" for the setting of
        `torch.set_float32_matmul_precision`.

    All floating-point tensors must have one dtype (autocast casts them to its own); sums are float32 (float64 for
    float64). Differentiable to any order. Works under `vmap` (one call with all draws),
    `torch.compile(fullgraph=True)`, `torch.func` and export; forward-mode differentiation raises.
    Raises ValueError for shapes, dtypes or a key that do not fit.
    """
    x, mean, std, bias_mean, bias_std = dispatch.autocast(x, mean, std, bias_mean, bias_std)
    check_parameters(mean, std, key, layer)
    check_linear(x, mean, bias_mean, bias_std, key)
    if precision not in ("", "ieee", "tf32"):
        raise ValueError(f'precision must be "ieee", "tf32" or "", got {precision!r}')
    bias_layer = layer if bias_layer is None else bias_layer
    if not 0 <= bias_layer < 2**28:
        raise ValueError(f"layer {bias_layer} out of range: use a number from 0 to 2**28 - 1")
    if key.ndim == 1:
        flat = x.reshape(-1, x.shape[-1])
        y = _sampled_linear(flat, mean, std, bias_mean, bias_std, key[None], layer, precision, bias_layer)
        return y.reshape(*x.shape[:-1], mean.shape[0])
    return _sampled_linear(x, mean, std, bias_mean, bias_std, key, layer, precision, bias_layer)


def check_linear(x: Tensor, weight: Tensor, bias_mean: Tensor | None, bias_std: Tensor | None, key: Tensor) -> None:
    """Raise ValueError for shapes, dtypes or devices that do not fit: a kernel would read out of bounds."""
    if weight.ndim != 2 or x.ndim < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x {tuple(x.shape)} does not fit weights (out, in) {tuple(weight.shape)}")
    if weight.numel() >= 2**31:
        raise ValueError(f"{weight.numel()} weights in one layer: kernels index up to 2**31")
    if key.ndim == 2 and x.ndim not in (2, 3):
        raise ValueError(f"with several draws x must be (batch, in) or (samples, batch, in), got {tuple(x.shape)}")
    if key.ndim == 2 and x.ndim == 3 and x.shape[0] != key.shape[0]:
        raise ValueError(f"x has {x.shape[0]} samples and key {key.shape[0]}: both need the same number")
    if bias_std is not None and bias_mean is None:
        raise ValueError("bias_std without bias_mean: pass bias_mean too")
    for name, bias in (("bias_mean", bias_mean), ("bias_std", bias_std)):
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"{name} {tuple(bias.shape)} does not fit {weight.shape[0]} outputs")
    tensors = [t for t in (x, weight, bias_mean, bias_std) if t is not None]
    if len({t.dtype for t in tensors}) > 1 or len({t.device for t in (*tensors, key)}) > 1:
        kinds = [(str(t.dtype), str(t.device)) for t in (*tensors, key)]
        raise ValueError(f"all tensors must have one dtype and one device (key: int64), got {kinds}")
