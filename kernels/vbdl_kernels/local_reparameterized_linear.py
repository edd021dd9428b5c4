"""The local reparameterization: draws the outputs of a linear layer instead of its weights.

    y[s, b, o] = m[b, o] + sqrt(v[b, o]) noise[s, o],   m = x mean^T + bias_mean,   v = x^2 (std^2)^T + bias_std^2

Kingma, Salimans and Welling, *Variational Dropout and the Local Reparameterization Trick*, NeurIPS 2015
(https://arxiv.org/abs/1506.02557). For a single example, and weights that act on it once, this is exactly the
distribution of the layer with drawn weights. The batch shares the noise of a draw, so a draw is a function of x; but
the joint distribution over examples is not that of drawn weights.
"""

import torch
from torch import Tensor

from vbdl_kernels import dispatch, philox
from vbdl_kernels.philox import ACTIVATION
from vbdl_kernels.sample_weights import check_parameters
from vbdl_kernels.sampled_linear import check_linear, map_linear, wide_of


def _moments(x, mean, std, bias_mean, bias_std):
    m, v = x @ mean.mT, x.square() @ std.square().mT
    if bias_mean is not None:
        m = m + bias_mean
    if bias_std is not None:
        v = v + bias_std.square()
    return m, v


def reference_local_reparameterized_linear(
    x: Tensor,
    mean: Tensor,
    std: Tensor,
    bias_mean: Tensor | None,
    bias_std: Tensor | None,
    key: Tensor,
    layer: int,
    precision: str = "",
) -> Tensor:
    """The specification of `local_reparameterized_linear`, with moments and noise in `wide_of` the dtype."""
    wide = wide_of(x.dtype)
    m, v = _moments(*(None if t is None else t.to(wide) for t in (x, mean, std, bias_mean, bias_std)))
    noise = philox.normal(key, layer, ACTIVATION, 1, mean.shape[0]).to(wide)  # (samples, 1, out)
    return (m + v.sqrt() * noise).to(x.dtype)


dispatch.define(
    "local_reparameterized_linear",
    "(Tensor x, Tensor mean, Tensor std, Tensor? bias_mean, Tensor? bias_std, Tensor key, int layer, str precision)"
    " -> Tensor",
    reference_local_reparameterized_linear,
    lambda x, mean, std, bias_mean, bias_std, key, layer, precision: x.new_empty(
        (key.shape[0], x.shape[-2], mean.shape[0])
    ),
)
dispatch.kernels_in("local_reparameterized_linear_kernel", "local_reparameterized_linear")
dispatch.batching("local_reparameterized_linear", map_linear)


class _LocalReparameterizedLinear(torch.autograd.Function):
    @staticmethod
    def forward(x, mean, std, bias_mean, bias_std, key, layer, precision):
        return torch.ops.vbdl.local_reparameterized_linear(x, mean, std, bias_mean, bias_std, key, layer, precision)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.layer, _ = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, gradient):
        """Compute the gradient in plain torch, so that second derivatives are right too.

        It sums over the draws first, then makes four products of the layer's size: no tensor of samples x out x in.
        """
        *tensors, key = ctx.saved_tensors
        wide = wide_of(gradient.dtype)
        x, mean, std, bias_mean, bias_std = (None if t is None else t.to(wide) for t in tensors)
        noise = philox.normal(key, ctx.layer, ACTIVATION, 1, mean.shape[0]).to(wide)
        _, v = _moments(x, mean, std, None, bias_std)
        gradient = gradient.to(wide)
        d_m, d_root = gradient, gradient * noise
        if x.ndim == 2:
            d_m, d_root = d_m.sum(0), d_root.sum(0)
        positive = v > 0  # an output of variance 0 gets the gradient 0, not an infinite one
        d_v = torch.where(positive, d_root * 0.5 * torch.where(positive, v, 1.0).rsqrt(), 0.0)
        d_x = d_m @ mean + 2 * x * (d_v @ std.square())
        flat = lambda t: t.flatten(0, -2)
        d_mean = flat(d_m).mT @ flat(x)
        d_std = 2 * std * (flat(d_v).mT @ flat(x).square())
        d_bias_mean = None if bias_mean is None else flat(d_m).sum(0)
        d_bias_std = None if bias_std is None else 2 * bias_std * flat(d_v).sum(0)
        grads = (d_x, d_mean, d_std, d_bias_mean, d_bias_std)
        cast = (None if g is None else g.to(t.dtype) for g, t in zip(grads, tensors, strict=True))
        return (*cast, None, None, None)

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return map_linear(_LocalReparameterizedLinear.apply, info, in_dims, *arguments)


@dispatch.kept_whole("local_reparameterized_linear")
def _local_reparameterized_linear(*arguments):
    return dispatch.call_of(_LocalReparameterizedLinear, "local_reparameterized_linear", *arguments)(*arguments)


def local_reparameterized_linear(
    x: Tensor,
    mean: Tensor,
    std: Tensor,
    key: Tensor,
    layer: int,
    bias_mean: Tensor | None = None,
    bias_std: Tensor | None = None,
    precision: str = "",
) -> Tensor:
    """Draw the outputs of a linear layer with normally distributed weights, without drawing the weights.

    x: (batch, in) shared or (samples, batch, in);  mean, std: (out, in);  bias_mean, bias_std: (out,) or None
    key: (samples, 2) int64  ->  (samples, batch, out);  one draw: x (..., in), key (2,)  ->  (..., out)

    dtypes, precision, transforms and errors are as in `sampled_linear`. If x is shared, the two products are computed
    once for all draws.
    """
    x, mean, std, bias_mean, bias_std = dispatch.autocast(x, mean, std, bias_mean, bias_std)
    check_parameters(mean, std, key, layer)
    check_linear(x, mean, bias_mean, bias_std, key)
    if precision not in ("", "ieee", "tf32"):
        raise ValueError(f'precision must be "ieee", "tf32" or "", got {precision!r}')
    if key.ndim == 1:
        flat = x.reshape(-1, x.shape[-1])
        y = _local_reparameterized_linear(flat, mean, std, bias_mean, bias_std, key[None], layer, precision)
        return y.reshape(*x.shape[:-1], mean.shape[0])
    return _local_reparameterized_linear(x, mean, std, bias_mean, bias_std, key, layer, precision)
