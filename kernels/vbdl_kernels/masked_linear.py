"""Dropout and the linear layer next to it in one matrix product, which computes the mask from its counters.

    input:   y[s, b, o] = sum_i weight[o, i] x[s, b, i] keep[s, i] / (1 - p) + bias[o]
    output:  y[s, b, o] = (sum_i weight[o, i] x[s, b, i] + bias[o]) keep[s, o] / (1 - p)

Monte Carlo dropout after Gal and Ghahramani, *Dropout as a Bayesian Approximation*, ICML 2016
(https://arxiv.org/abs/1506.02142), with one mask for each draw: the whole batch sees the same network.
"""

import torch
from torch import Tensor

from vbdl_kernels import dispatch, philox
from vbdl_kernels.sampled_linear import check_linear, wide_of


def _scaled_mask(key: Tensor, layer: int, columns: int, p: float, dtype: torch.dtype) -> Tensor:
    """The dropout mask divided by 1 - p, (samples, 1, columns): 1 / (1 - p) for kept units, 0 for dropped ones."""
    keep = philox.keep_mask(key, layer, 1, columns, p)
    return keep.to(dtype) * (1 / (1 - p) if p < 1 else 0.0)


def reference_masked_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, key: Tensor, layer: int, p: float, side: str, precision: str = ""
) -> Tensor:
    """The specification of `masked_linear`, with sums in `wide_of` the dtype."""
    wide = wide_of(x.dtype)
    n_out, n_in = weight.shape
    mask = _scaled_mask(key, layer, n_in if side == "input" else n_out, p, wide)
    x = x.to(wide) * mask if side == "input" else x.to(wide)
    y = x @ weight.to(wide).mT
    if bias is not None:
        y = y + bias.to(wide)
    return (y * mask if side == "output" else y).to(weight.dtype)


dispatch.define(
    "masked_linear",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor key, int layer, float p, str side, str precision) -> Tensor",
    reference_masked_linear,
    lambda x, weight, bias, key, layer, p, side, precision: x.new_empty((key.shape[0], x.shape[-2], weight.shape[0])),
)
dispatch.kernels_in("masked_linear_kernel", "masked_linear")


def _mapped(call, info, in_dims, x, weight, bias, key, layer, p, side, precision):
    """The vmap rule of `masked_linear`: one call for the whole mapped axis, unless parameters have it."""
    rest = (layer, p, side, precision)
    if in_dims[1] is not None or in_dims[2] is not None:  # weights per ensemble member
        return dispatch.one_by_one(call, info, in_dims, x, weight, bias, key, *rest)
    whole = lambda x, key: call(x, weight, bias, key, *rest)
    return dispatch.map_draws(whole, info.batch_size, x, in_dims[0], key, in_dims[3])


dispatch.batching("masked_linear", _mapped)


class _MaskedLinear(torch.autograd.Function):
    @staticmethod
    def forward(x, weight, bias, key, layer, p, side, precision):
        return torch.ops.vbdl.masked_linear(x, weight, bias, key, layer, p, side, precision)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, key, ctx.layer, ctx.p, ctx.side, _ = inputs
        ctx.bias = bias is not None
        ctx.save_for_backward(x, weight, key)

    @staticmethod
    def backward(ctx, gradient):
        """Compute the gradient in plain torch, differentiable to any order; its largest mask is samples x units."""
        x, weight, key = ctx.saved_tensors
        wide = wide_of(gradient.dtype)
        n_out, n_in = weight.shape
        mask = _scaled_mask(key, ctx.layer, n_in if ctx.side == "input" else n_out, ctx.p, wide)
        gradient, wide_x = gradient.to(wide), x.to(wide)
        if ctx.side == "output":
            gradient = gradient * mask
            if x.ndim == 2:  # all draws share one product, whose gradient is the sum over draws
                gradient = gradient.sum(0)
            d_x = gradient @ weight.to(wide)
        else:
            d_x = (gradient @ weight.to(wide)) * mask
            wide_x = wide_x * mask
            if x.ndim == 2:
                d_x = d_x.sum(0)
        d_weight = gradient.flatten(0, -2).mT @ wide_x.flatten(0, -2)
        d_bias = gradient.flatten(0, -2).sum(0).to(weight.dtype) if ctx.bias else None
        return d_x.to(x.dtype), d_weight.to(weight.dtype), d_bias, None, None, None, None, None

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return _mapped(_MaskedLinear.apply, info, in_dims, *arguments)


@dispatch.kept_whole("masked_linear")
def _masked_linear(*arguments):
    return dispatch.call_of(_MaskedLinear, "masked_linear", *arguments)(*arguments)


def masked_linear(
    x: Tensor,
    weight: Tensor,
    key: Tensor,
    layer: int,
    p: float,
    bias: Tensor | None = None,
    side: str = "input",
    precision: str = "",
) -> Tensor:
    """Apply a linear layer with dropout of rate p on its input or its output, with one mask for each draw.

    x: (batch, in) shared or (samples, batch, in);  weight: (out, in);  bias: (out,) or None
    key: (samples, 2) int64  ->  (samples, batch, out);  one draw: x (..., in), key (2,)  ->  (..., out)

    side: "input" or "output". The mask is `philox.keep_mask(key, layer, 1, units, p)`. Dropout after a ReLU equals
    dropout before it, because max(c x, 0) = c max(x, 0) for c >= 0, so it may be moved to the output of the layer
    before. dtypes, precision, transforms and errors are as in `sampled_linear`.
    """
    x, weight, bias = dispatch.autocast(x, weight, bias)
    if key.dtype != torch.int64 or key.ndim not in (1, 2) or key.shape[-1] != 2:
        raise ValueError(f"key must be int64 of shape (2,) or (samples, 2), got {key.dtype} {tuple(key.shape)}")
    check_linear(x, weight, bias, None, key)
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"the dropout rate is a probability from 0 to 1, got {p}")
    if side not in ("input", "output"):
        raise ValueError(f'side must be "input" or "output", got {side!r}')
    if precision not in ("", "ieee", "tf32"):
        raise ValueError(f'precision must be "ieee", "tf32" or "", got {precision!r}')
    if not 0 <= layer < 2**28:
        raise ValueError(f"layer {layer} out of range: use a number from 0 to 2**28 - 1")
    if key.ndim == 1:
        y = _masked_linear(x.reshape(-1, x.shape[-1]), weight, bias, key[None], layer, p, side, precision)
        return y.reshape(*x.shape[:-1], weight.shape[0])
    return _masked_linear(x, weight, bias, key, layer, p, side, precision)
