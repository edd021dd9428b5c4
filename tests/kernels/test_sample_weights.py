import importlib

import pytest
import torch
from scipy import stats
from vbdl_kernels import make_key, normal, sample_weights
from vbdl_kernels.philox import BIAS, WEIGHT

operator = importlib.import_module("vbdl_kernels.sample_weights")
LAYER = 5
SHAPES = [(1,), (7,), (300,), (3, 5), (8, 128), (9, 130), (70, 33), (4, 3, 3, 3), (16, 257), (2, 0), (0, 3)]
CASES = [(shape, torch.float32) for shape in SHAPES] + [((9, 130), torch.bfloat16), ((9, 130), torch.float16)]


def problem(shape, samples=5, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    std = torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)
    return mean, std, make_key(-(2**50), torch.randint(0, 2**32, (samples,), generator=generator))


@pytest.mark.parametrize("shape, rows, columns", [((7,), 1, 7), ((9, 130), 9, 130), ((4, 3, 2, 5), 4, 30)])
def test_is_mean_plus_std_times_the_noise_of_the_flat_parameter(shape, rows, columns):
    mean, std, key = problem(shape)
    weights = sample_weights(mean, std, key, LAYER, BIAS)
    expected = mean + std * normal(key, LAYER, BIAS, rows, columns).reshape(5, *shape)
    torch.testing.assert_close(weights, expected)
    assert torch.equal(sample_weights(mean, std, key[2], LAYER, BIAS), weights[2])


def test_half_precision_is_the_same_draw():
    mean, std, key = problem((64, 64))
    for dtype in (torch.bfloat16, torch.float16):
        narrow = sample_weights(mean.to(dtype), std.to(dtype), key, LAYER)
        # three roundings of values below 6: mean, std * noise, and the sum
        assert float((narrow.float() - sample_weights(mean, std, key, LAYER)).abs().max()) < 20 * torch.finfo(dtype).eps


def test_derivatives_of_first_and_second_order():
    mean, std, key = problem((3, 4), dtype=torch.float64)
    inputs = [mean.requires_grad_(), std.requires_grad_()]
    f = lambda mean, std: sample_weights(mean, std, key, LAYER).square()
    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


def test_operator_contracts():
    mean, std, key = problem((3, 4))
    torch.library.opcheck(torch.ops.vbdl.sample_weights.default, (mean, std, key, LAYER, WEIGHT))
    weights = torch.randn(5, 3, 4)
    torch.library.opcheck(torch.ops.vbdl.sample_weights_gradient.default, (weights, key, LAYER, WEIGHT))


def test_vmap_func_compile_and_export():
    mean, std, key = problem((3, 4))
    f = lambda mean, std, key: sample_weights(mean, std, key, LAYER)
    mapped = torch.vmap(f, in_dims=(None, None, 0))
    expected = f(mean, std, key)
    assert torch.equal(mapped(mean, std, key), expected)
    members = torch.vmap(f)(torch.stack((mean, -mean)), torch.stack((std, std)), torch.stack((key, key + 1)))
    torch.testing.assert_close(members, torch.stack((expected, f(-mean, std, key + 1))))

    loss = lambda mean, std, key: mapped(mean, std, key).square().sum()
    grads = torch.func.grad(loss, (0, 1))(mean, std, key)
    noise = normal(key, LAYER, WEIGHT, 3, 4)
    torch.testing.assert_close(grads, ((2 * expected).sum(0), (2 * expected * noise).sum(0)))
    each = torch.vmap(torch.func.grad(lambda m, s, k: f(m, s, k).square().sum(), (0, 1)), (None, None, 0))
    torch.testing.assert_close(each(mean, std, key), (2 * expected, 2 * expected * noise))

    torch._dynamo.reset()
    compiled = torch.compile(torch.func.grad(loss, (0, 1)), fullgraph=True)
    torch.testing.assert_close(compiled(mean, std, key), grads)

    class Layer(torch.nn.Module):
        def forward(self, key):
            return mapped(mean, std, key)

    assert torch.equal(torch.export.export(Layer(), (key,)).module()(key), expected)


def test_a_convolution_under_each_draw():
    """The convolution path: weights drawn here, the library's convolution grouped by draw."""
    mean, std, key = problem((4, 3, 3, 3))
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    weights = sample_weights(mean, std, key, LAYER)
    stacked = torch.vmap(torch.nn.functional.conv2d, in_dims=(None, 0))(x, weights)
    for s in range(5):
        torch.testing.assert_close(stacked[s], torch.nn.functional.conv2d(x, weights[s]))


@pytest.mark.parametrize("mean, std", [(torch.ones(3), torch.ones(4)), (torch.ones(3, dtype=torch.int64),) * 2])
def test_what_does_not_fit_is_refused(mean, std):
    with pytest.raises(ValueError):
        sample_weights(mean, std, make_key(0, [0]), LAYER)


# ---- the kernel, in the interpreter ---------------------------------------------------------------------------


@pytest.mark.interpreter
@pytest.mark.parametrize("shape, dtype", CASES)
def test_kernels_match_the_reference(shape, dtype, poisoned):
    mean, std, key = problem(shape, dtype=dtype)
    found = torch.ops.vbdl.sample_weights(mean, std, key, LAYER, WEIGHT)
    expected = operator.reference_sample_weights(mean, std, key, LAYER, WEIGHT)
    # one rounding each, two where the interpreter cuts to bfloat16; values below 8, noise to 2e-6
    tolerance = 8 * (2 if dtype == torch.bfloat16 else 1) * torch.finfo(dtype).eps
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    gradient = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = torch.ops.vbdl.sample_weights_gradient(gradient, key, LAYER, WEIGHT)
    for a, b in zip(found, operator._reference_gradient(gradient, key, LAYER, WEIGHT), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # five float32 products below 20


# half precision rounds the same normals: against the reference above
@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_the_kernel_draws_standard_normals(dtype):
    """The battery's moments on the kernel's own output, not on the reference."""
    shape = (64, 512)
    weights = sample_weights(torch.zeros(shape, dtype=dtype), torch.ones(shape, dtype=dtype), make_key(3, range(8)), 2)
    n = weights.double()
    count = n.numel()
    assert abs(n.mean()) * count**0.5 < 4.5
    assert abs(n.square().mean() - 1) * (count / 2) ** 0.5 < 4.5
    for axis in range(3):  # neighboring draws, rows, columns
        a, b = n.narrow(axis, 0, n.shape[axis] - 1), n.narrow(axis, 1, n.shape[axis] - 1)
        assert abs((a * b).mean()) * a.numel() ** 0.5 < 4.5
    if dtype == torch.float32:
        assert stats.kstest(n.flatten().numpy(), "norm").pvalue > 1e-4
