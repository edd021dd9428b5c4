"""The two linear operators whose gradients are plain torch: local reparameterization and dropout."""

import importlib

import pytest
import torch
from vbdl_kernels import keep_mask, local_reparameterized_linear, make_key, masked_linear, normal, sampled_linear
from vbdl_kernels.philox import ACTIVATION

LAYER = 7
SHAPES = [(1, 1, 1, 1), (5, 3, 5, 7), (4, 16, 128, 64), (3, 17, 130, 65), (2, 70, 33, 129), (5, 0, 4, 4), (2, 3, 0, 4)]
reference = {
    name: getattr(importlib.import_module(f"vbdl_kernels.{name}"), f"reference_{name}")
    for name in ("local_reparameterized_linear", "masked_linear")
}


def problem(samples, batch, n_in, n_out, dtype=torch.float64, shared=False):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    x = draw(*(() if shared else (samples,)), batch, n_in)
    key = make_key(2**50, torch.randint(0, 2**32, (samples,), generator=generator))
    return x, draw(n_out, n_in), draw(n_out, n_in).abs(), draw(n_out), draw(n_out).abs(), key


def variants(x, mean, std, bias_mean, bias_std, key):
    """name -> (function of (x, key, *parameters), parameters)."""
    return {
        "local": (
            lambda x, key, mean, std, a, b: local_reparameterized_linear(x, mean, std, key, LAYER, a, b),
            (mean, std, bias_mean, bias_std),
        ),
        "input": (lambda x, key, w, b: masked_linear(x, w, key, LAYER, 0.3, b), (mean, bias_mean)),
        "output": (lambda x, key, w, b: masked_linear(x, w, key, LAYER, 0.3, b, side="output"), (mean, bias_mean)),
    }


NAMES = ["local", "input", "output"]


def test_local_reparameterization_has_the_moments_of_sampled_weights():
    x, mean, std, bias_mean, bias_std, key = problem(3, 2, 40, 5, shared=True)
    y = local_reparameterized_linear(x, mean, std, key, LAYER, bias_mean, bias_std)
    noise = normal(key, LAYER, ACTIVATION, 1, 5).double()
    m = x @ mean.T + bias_mean
    v = x**2 @ (std**2).T + bias_std**2
    torch.testing.assert_close(y, m + v.sqrt() * noise)

    many = make_key(1, range(4_000))
    drawn = sampled_linear(x.float(), mean.float(), std.float(), many, LAYER, bias_mean.float(), bias_std.float())
    z = (drawn.double().mean(0) - m) / (v / 4_000).sqrt()
    assert z.abs().max() < 4.5
    assert ((drawn.double().var(0) / v - 1).abs().max()) < 4.5 * (2 / 4_000) ** 0.5


@pytest.mark.parametrize("p", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("shared", [True, False])
def test_masked_linear_is_dropout_and_linear(shared, p):
    x, weight, _, bias, _, key = problem(3, 4, 150, 6, shared=shared)
    scale = 0.0 if p == 1 else 1 / (1 - p)
    keep_in, keep_out = keep_mask(key, LAYER, 1, 150, p) * scale, keep_mask(key, LAYER, 1, 6, p) * scale
    y = masked_linear(x, weight, key, LAYER, p, bias)
    torch.testing.assert_close(y, torch.nn.functional.linear(x * keep_in, weight, bias))
    y = masked_linear(x, weight, key, LAYER, p, bias, side="output")
    torch.testing.assert_close(y, (torch.nn.functional.linear(x, weight, bias) * keep_out).expand(3, 4, 6))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shared", [True, False])
def test_derivatives_of_first_and_second_order(name, shared):
    given = problem(2, 3, 4, 3, shared=shared)
    run, parameters = variants(*given)[name]
    inputs = [t.clone().requires_grad_() for t in (given[0], *parameters)]
    f = lambda x, *parameters: run(x, given[-1], *parameters)
    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


def test_an_output_without_variance_has_a_finite_gradient():
    x, mean, std, *_, key = problem(2, 3, 4, 3)
    std = torch.zeros_like(std).requires_grad_()
    local_reparameterized_linear(x, mean, std, key, LAYER).sum().backward()
    assert torch.isfinite(std.grad).all()


@pytest.mark.parametrize("name", NAMES)
def test_vmap_func_compile_and_export(name):
    given = problem(4, 3, 5, 6, torch.float32)
    x, key = given[0], given[-1]
    run, parameters = variants(*given)[name]
    f = lambda x, key: run(x, key, *parameters)
    mapped = torch.vmap(f)
    expected = f(x, key)
    torch.testing.assert_close(mapped(x, key), expected)
    torch.testing.assert_close(torch.vmap(f, in_dims=(None, 0))(x[0], key), f(x[0], key))
    torch.testing.assert_close(torch.vmap(f, in_dims=(0, None))(x, key[0]), torch.stack([f(a, key[0]) for a in x]))
    torch.testing.assert_close(torch.vmap(f, in_dims=(None, 0))(x, key), torch.stack([f(x, k) for k in key]))
    members = torch.vmap(run)(x, key, *(torch.stack([i * t for i in range(1, 5)]) for t in parameters))
    torch.testing.assert_close(
        members, torch.stack([run(x[i], key[i], *((i + 1) * t for t in parameters)) for i in range(4)])
    )

    loss = lambda w, x, key: torch.vmap(lambda x, key: run(x, key, w, *parameters[1:]))(x, key).square().sum()
    grads = torch.func.grad(loss, (0, 1))(parameters[0], x, key)
    leaves = [t.clone().requires_grad_() for t in (parameters[0], x)]
    direct = torch.autograd.grad(run(leaves[1], key, leaves[0], *parameters[1:]).square().sum(), leaves)
    torch.testing.assert_close(grads, direct)
    each = torch.vmap(torch.func.grad(lambda w, x, key: run(x, key, w, *parameters[1:]).square().sum()), (None, 0, 0))
    torch.testing.assert_close(each(parameters[0], x, key).sum(0), direct[0])

    torch._dynamo.reset()
    compiled = torch.compile(torch.func.grad(loss, (0, 1)), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(parameters[0], x, key), grads)

    class Layer(torch.nn.Module):
        def forward(self, x, key):
            return mapped(x, key)

    torch.testing.assert_close(torch.export.export(Layer(), (x, key)).module()(x, key), expected)


def test_operator_contracts():
    x, mean, std, bias_mean, bias_std, key = problem(3, 4, 5, 6, torch.float32)
    ops = torch.ops.vbdl
    given = (x, mean, std, bias_mean, bias_std, key, LAYER, "")
    torch.library.opcheck(ops.local_reparameterized_linear.default, given)
    for side in ("input", "output"):
        torch.library.opcheck(ops.masked_linear.default, (x[0], mean, bias_mean, key, LAYER, 0.3, side, ""))


@pytest.mark.parametrize("changed", [dict(p=1.5), dict(p=-0.1), dict(side="both"), dict(layer=-1), dict(precision="x")])
def test_what_does_not_fit_is_refused(changed):
    x, weight, *_, key = problem(3, 4, 5, 6)
    with pytest.raises(ValueError):
        masked_linear(**(dict(x=x, weight=weight, key=key, layer=LAYER, p=0.5) | changed))


# ---- the kernels, in the interpreter ---------------------------------------------------------------------------


CASES = [(shape, torch.float32) for shape in SHAPES] + [(SHAPES[1], torch.bfloat16), (SHAPES[3], torch.float16)]


def compare(found, expected, length, dtype):
    """float32 sums: a rounding a term at worst; half precision: a rounding of each factor and of the result."""
    assert found.shape == expected.shape and found.dtype == expected.dtype and not found.isnan().any()
    if expected.numel():
        # the interpreter cuts to bfloat16 where hardware rounds
        roundings = 2 * length if dtype == torch.float32 else 8
        bound = roundings * torch.finfo(dtype).eps * (float(expected.double().abs().max()) or 1.0)
        assert float((found.double() - expected.double()).abs().max()) <= bound


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "shape, dtype, shared",
    # SHAPES[3] in float16; an input that all samples share is read with a stride of zero, at all alike
    [(*c, False) if c not in CASES[3:4] else pytest.param(*c, False, marks=pytest.mark.slow) for c in CASES]
    + [(*c, True) if c in CASES[1::6] else pytest.param(*c, True, marks=pytest.mark.slow) for c in CASES],
)
def test_kernels_match_the_reference(shape, dtype, shared, poisoned):
    x, mean, std, bias_mean, bias_std, key = problem(*shape, dtype, shared)
    small = max(shape) < 10
    for biases in ((bias_mean, bias_std), (None, None), (bias_mean, None))[: 3 if small else 1]:
        given = (x, mean, std, *biases, key, LAYER, "ieee")
        expected = reference["local_reparameterized_linear"](*given)
        compare(torch.ops.vbdl.local_reparameterized_linear(*given), expected, shape[2] + 4, dtype)
    for side, p, bias in (("input", 0.3, bias_mean), ("output", 0.9, None), ("output", 1.0, bias_mean)):
        given = (x, mean, bias, key, LAYER, p, side, "ieee")
        compare(torch.ops.vbdl.masked_linear(*given), reference["masked_linear"](*given), shape[2] + 4, dtype)
