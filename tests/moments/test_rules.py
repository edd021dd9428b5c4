"""Each rule against the distribution it stands for, computed by a fine quantile grid or by sampling."""

import functools

import pytest
import torch
import torch.nn.functional as F

from vbdl.engine.moments import interpret  # noqa: F401  (enters the rules)
from vbdl.engine.moments.activation import maximum
from vbdl.engine.moments.pooling import adaptive_average
from vbdl.engine.moments.value import RULES, Moments

GRID = torch.special.ndtri((torch.arange(200_000).double() + 0.5) / 200_000)  # quantiles of the standard normal
CLOSED, QUADRATURE = 2e-4, 2e-2  # of the input's std and variance; the grid itself is right to 1e-4

FUNCTIONS = {
    "relu": (F.relu, CLOSED),
    "leaky_relu": (F.leaky_relu, CLOSED),
    "sigmoid": (torch.sigmoid, CLOSED),
    "tanh": (torch.tanh, 2e-3),  # below a variance of 1e-3 to first order
    "abs": (torch.abs, CLOSED),
    "gelu": (F.gelu, QUADRATURE),
    "silu": (F.silu, QUADRATURE),
    "elu": (F.elu, QUADRATURE),
    "softplus": (F.softplus, QUADRATURE),
    "mish": (F.mish, QUADRATURE),
    "hardswish": (F.hardswish, QUADRATURE),
}


def inputs():
    mean, var = torch.meshgrid(
        torch.linspace(-5, 5, 11).double(), torch.tensor([1e-8, 1e-3, 0.3, 1.0, 4.0, 25.0]).double(), indexing="ij"
    )
    return mean.reshape(-1), var.reshape(-1)


@functools.cache
def moments_on_the_grid(name):
    mean, var = inputs()
    y = FUNCTIONS[name][0](mean[:, None] + var.sqrt()[:, None] * GRID)
    return y.mean(1), y.var(1, correction=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_activation_has_the_moments_of_a_normal_put_through_it(name, dtype):
    tolerance = FUNCTIONS[name][1]
    mean, var = inputs()
    found = RULES[name](Moments(mean.to(dtype), var.to(dtype)))
    right_mean, right_var = moments_on_the_grid(name)
    # an error of a function of slope one is measured in the spread of what goes in, to rounding
    rounding = 1e-6 if dtype == torch.float32 else 0.0
    assert float(((found.mean - right_mean).abs() - rounding * (1 + mean.abs())).div(var.sqrt()).max()) < tolerance
    assert float((found.var - right_var).abs().div(var).max()) < tolerance
    assert bool((found.var >= 0).all())


def test_the_logistic_mixture_is_the_logistic_function():
    x = torch.linspace(-20, 20, 4001).double()
    found = RULES["sigmoid"](Moments(x, torch.zeros_like(x)))
    torch.testing.assert_close(found.mean, x.sigmoid(), rtol=0, atol=1e-7)
    assert float(found.var.max()) == 0.0


def test_a_certain_value_stays_certain():
    x = torch.linspace(-3, 3, 13)
    for name, (function, _) in FUNCTIONS.items():
        found = RULES[name](Moments(x, torch.zeros_like(x)))
        torch.testing.assert_close(found.mean, function(x), rtol=1e-5, atol=1e-6, msg=name)
        assert float(found.var.abs().max()) < 1e-9, name


def test_the_larger_of_two_is_clarks():
    ma, va = torch.tensor([0.0, 1.0, -3.0, 2.0]).double(), torch.tensor([1.0, 0.5, 2.0, 1e-6]).double()
    mb, vb = torch.tensor([0.0, 0.5, 1.0, -2.0]).double(), torch.tensor([1.0, 2.0, 0.1, 1e-6]).double()
    found = maximum(Moments(ma, va), Moments(mb, vb))
    points = torch.quasirandom.SobolEngine(2, scramble=True, seed=0).draw(2**18).double().clamp(1e-9, 1 - 1e-9)
    z = torch.special.ndtri(points)
    y = torch.maximum(ma + va.sqrt() * z[:, :1], mb + vb.sqrt() * z[:, 1:])
    torch.testing.assert_close(found.mean, y.mean(0), rtol=0, atol=1e-4)
    torch.testing.assert_close(found.var, y.var(0), rtol=1e-3, atol=1e-6)


def test_linear_layers_are_exact_for_independent_inputs_and_weights():
    x = Moments(torch.randn(3, 5).double(), torch.rand(3, 5).double())
    w = Moments(torch.randn(5, 2).double(), torch.rand(5, 2).double())
    b = Moments(torch.randn(2).double(), torch.rand(2).double())
    found = RULES["addmm"](b, x, w)
    mean = x.mean[:, :, None] * w.mean[None]
    second = (x.mean**2 + x.var)[:, :, None] * (w.mean**2 + w.var)[None]
    torch.testing.assert_close(found.mean, mean.sum(1) + b.mean)
    torch.testing.assert_close(found.var, (second - mean**2).sum(1) + b.var)


def test_a_convolution_is_its_matrix_product():
    x = Moments(torch.randn(2, 3, 7, 6).double(), torch.rand(2, 3, 7, 6).double())
    w = Moments(torch.randn(4, 3, 3, 3).double(), torch.rand(4, 3, 3, 3).double())
    settings = ([2, 1], [1, 1], [1, 1], False, [0, 0], 1)
    found = RULES["convolution"](x, w, None, *settings)
    unfold = lambda t: F.unfold(t, (3, 3), padding=1, stride=(2, 1)).transpose(1, 2)
    flat = lambda t: t.flatten(1).T
    by_product = RULES["matmul"](Moments(unfold(x.mean), unfold(x.var)), Moments(flat(w.mean), flat(w.var)))
    back = lambda t: t.transpose(1, 2).reshape(found.shape)
    torch.testing.assert_close(found.mean, back(by_product.mean))
    torch.testing.assert_close(found.var, back(by_product.var))


@pytest.mark.parametrize("settings", [([2, 2],), ([3, 2], [2, 1], [1, 0]), ([2, 2], [1, 1], [0, 0], [2, 2])])
def test_max_pooling_of_certain_values_is_max_pooling(settings):
    x = torch.randn(2, 3, 9, 8) - 4.0  # below the zeros of a padding, which take no part
    found, _ = RULES["max_pool2d_with_indices"](Moments(x, torch.zeros_like(x)), *settings)
    torch.testing.assert_close(found.mean, F.max_pool2d(x, *settings))
    assert float(found.var.max()) == 0.0


def test_max_pooling_has_the_moments_of_the_maximum():
    x = Moments(torch.randn(1, 1, 4, 4).double(), torch.rand(1, 1, 4, 4).double())
    found, _ = RULES["max_pool2d_with_indices"](x, [2, 2])
    y = F.max_pool2d((x.mean + x.var.sqrt() * torch.randn(100_000, 1, 4, 4).double()), 2)
    # four values, two at a time: each maximum is taken to be normal again, Clark's approximation
    assert float((found.mean - y.mean(0)).abs().max()) < 0.02
    assert float((found.var / y.var(0)).log().abs().max()) < 0.3


def test_averages_are_exact():
    x = Moments(torch.randn(2, 3, 6, 4).double(), torch.rand(2, 3, 6, 4).double())
    by_hand = Moments(F.avg_pool2d(x.mean, 2), F.avg_pool2d(x.var, 2) / 4)
    for found in (RULES["avg_pool2d"](x, [2, 2]), adaptive_average(x, [3, 2])):
        torch.testing.assert_close(found.mean, by_hand.mean)
        torch.testing.assert_close(found.var, by_hand.var)
    found = RULES["mean"](x, [-1, -2], True)
    torch.testing.assert_close(found.var, x.var.mean((2, 3), keepdim=True) / 24)


def test_normalization():
    x = Moments(torch.randn(4, 6, 3).double(), 0.01 * torch.rand(4, 6, 3).double())
    weight, bias, running = torch.randn(6).double(), torch.randn(6).double(), torch.rand(6).double()
    found = RULES["native_batch_norm"](x, weight, bias, running, running + 0.5, False, 0.1, 1e-5)[0]
    torch.testing.assert_close(found.mean, F.batch_norm(x.mean, running, running + 0.5, weight, bias))
    torch.testing.assert_close(found.var, x.var * (weight**2 / (running + 0.5 + 1e-5))[None, :, None])
    w, b = torch.randn(3).double(), torch.randn(3).double()
    found = RULES["native_layer_norm"](x, [3], w, b, 1e-5)[0]
    certain = RULES["native_layer_norm"](Moments(x.mean, torch.zeros_like(x.var)), [3], w, b, 1e-5)[0]
    torch.testing.assert_close(certain.mean, F.layer_norm(x.mean, [3], w, b))
    assert bool((found.var > 0).all())


def test_layer_norm_is_near_where_the_noise_is_small():
    x = Moments(3 * torch.randn(3, 64).double(), torch.full((3, 64), 0.05).double())
    found = RULES["native_layer_norm"](x, [64], None, None, 1e-5)[0]
    y = F.layer_norm(x.mean + x.var.sqrt() * torch.randn(40_000, 3, 64).double(), [64])
    assert float((found.mean - y.mean(0)).abs().max()) < 5e-3
    assert float((found.var / y.var(0) - 1).abs().mean()) < 0.1
