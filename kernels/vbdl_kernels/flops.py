"""The flops (multiplications and additions) of the operators; importing this registers them with torch's counter."""

from math import prod

import torch
from torch.utils.flop_counter import register_flop_formula

_ops = torch.ops.vbdl


def _linear(x, weight, *rest, out_shape, **options) -> int:
    """The flops of one product for every sample.  x (..., in), weight (out, in)  ->  (samples, batch, out)"""
    return 2 * prod(out_shape) * weight[-1]


def _moments(x, weight, *rest, out_shape, **options) -> int:
    """The flops of the two products for mean and variance; an input that all draws share is counted once."""
    return 4 * prod(x) * weight[0]


def _network(x, weights, *rest, out_shape, **options) -> int:
    """The flops of all layers, for every sample; weights[l]: (..., out, in)."""
    return 2 * out_shape[0] * out_shape[1] * sum(w[-2] * w[-1] for w in weights)


def _input_gradient(gradient, mean, *rest, **options) -> int:
    return 2 * prod(gradient) * mean[1]


def _parameter_gradient(gradient, x, *rest, **options) -> int:
    return 2 * prod(gradient) * x[-1]


register_flop_formula([_ops.sampled_linear, _ops.masked_linear])(_linear)
register_flop_formula(_ops.local_reparameterized_linear)(_moments)
register_flop_formula([_ops.ensemble_mlp, _ops.bayesian_mlp])(_network)
register_flop_formula(_ops.sampled_linear_input)(_input_gradient)
register_flop_formula(_ops.sampled_linear_parameters)(_parameter_gradient)
