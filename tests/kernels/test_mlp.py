import importlib

import pytest
import torch
from vbdl_kernels import bayesian_mlp, ensemble_mlp, make_key, sampled_linear

module = importlib.import_module("vbdl_kernels.mlp")
LAYERS = [4, 9, 2**28 - 1]
BIAS_LAYERS = [5, 9, 2**28 - 2]


def problem(widths, stacked=3, batch=5, dtype=torch.float32, shared=True):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    x = draw(*(() if shared else (stacked,)), batch, widths[0])
    pairs = list(zip(widths, widths[1:], strict=False))
    means = [draw(o, i) / i**0.5 for i, o in pairs]
    stds = [0.3 * draw(o, i).abs() for i, o in pairs]
    bias_means, bias_stds = [draw(o) for _, o in pairs], [0.1 * draw(o).abs() for _, o in pairs]
    weights = [draw(stacked, o, i) / i**0.5 for i, o in pairs]
    biases = [draw(stacked, o) for _, o in pairs]
    key = make_key(5, torch.randint(0, 2**32, (stacked,), generator=generator))
    return x, (weights, biases), (means, stds, bias_means, bias_stds, key, LAYERS[: len(pairs)])


@pytest.mark.parametrize("activation", ["relu", "tanh", "silu"])
@pytest.mark.parametrize("shared", [True, False])
def test_members_one_by_one(activation, shared):
    x, (weights, biases), _ = problem([6, 20, 33, 4], shared=shared, dtype=torch.float64)
    y = ensemble_mlp(x, weights, biases, activation)
    for m in range(3):
        h = x if shared else x[m]
        for i in range(3):
            h = torch.nn.functional.linear(h, weights[i][m], biases[i][m])
            h = module.ACTIVATIONS[activation](h) if i < 2 else h
        torch.testing.assert_close(y[m], h)


def test_draws_are_those_of_the_layers():
    x, _, parameters = problem([6, 20, 33, 4])
    *groups, key, layers = parameters
    y = bayesian_mlp(x, *groups, key, layers)
    h = x
    for i, (mean, std, bias_mean, bias_std) in enumerate(zip(*groups, strict=True)):
        h = sampled_linear(h, mean, std, key, layers[i], bias_mean, bias_std)
        h = h.relu() if i < 2 else h
    assert torch.equal(y, h)
    h = x
    for i, (mean, std, bias_mean, bias_std) in enumerate(zip(*groups, strict=True)):
        h = sampled_linear(h, mean, std, key, layers[i], bias_mean, bias_std, bias_layer=BIAS_LAYERS[i])
        h = h.relu() if i < 2 else h
    assert torch.equal(bayesian_mlp(x, *groups, key, layers, bias_layers=BIAS_LAYERS), h)


def test_gradients_contracts_and_compile():
    x, (weights, biases), parameters = problem([3, 5, 2], dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, weights[0], biases[1])]
    f = lambda x, w, b: ensemble_mlp(x, [w, weights[1]], [biases[0], b], "tanh")
    assert torch.autograd.gradcheck(f, leaves)
    x, (weights, biases), parameters = problem([3, 5, 2])
    torch.library.opcheck(torch.ops.vbdl.ensemble_mlp.default, (x, weights, biases, "relu"))
    torch.library.opcheck(torch.ops.vbdl.bayesian_mlp.default, (x, *parameters, BIAS_LAYERS[:2], "relu"))
    compiled = torch.compile(bayesian_mlp, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, *parameters), bayesian_mlp(x, *parameters))


def test_what_does_not_fit_is_refused():
    x, (weights, biases), parameters = problem([3, 5, 2])
    *groups, key, layers = parameters
    with pytest.raises(ValueError, match="follow each other"):
        ensemble_mlp(x, weights[::-1], biases[::-1])
    with pytest.raises(ValueError, match="activation"):
        ensemble_mlp(x, weights, biases, "gelu")
    with pytest.raises(ValueError, match="128"):
        ensemble_mlp(torch.ones(2, 129), [torch.ones(1, 2, 129)], [torch.ones(1, 2)])
    with pytest.raises(ValueError, match="biases"):
        ensemble_mlp(x, weights, biases[:1])
    with pytest.raises(ValueError, match="layer number"):
        bayesian_mlp(x, *groups, key, layers[:1])
    with pytest.raises(ValueError, match="layer number"):
        bayesian_mlp(x, *groups, key, layers, bias_layers=layers[:1])
    with pytest.raises(ValueError, match="dtype"):
        bayesian_mlp(x.double(), *groups, key, layers)


CASES = [
    ([1, 1], torch.float32, True, "relu"),
    ([6, 20, 33, 4], torch.float32, True, "tanh"),
    ([6, 20, 33, 4], torch.float32, False, "silu"),
    ([70, 128, 97, 65], torch.float32, True, "relu"),
    ([33, 64, 10], torch.float16, False, "relu"),
    ([33, 64, 10], torch.bfloat16, True, "relu"),
]


@pytest.mark.interpreter
@pytest.mark.parametrize("widths, dtype, shared, activation", CASES)
def test_kernels_match_the_reference(widths, dtype, shared, activation, poisoned):
    for batch in (5, 0) if max(widths) > 64 else (5, 70, 0):
        x, stored, drawn = problem(widths, batch=batch, dtype=dtype, shared=shared)
        for name, parameters in (("ensemble_mlp", stored), ("bayesian_mlp", (*drawn, BIAS_LAYERS[: len(widths) - 1]))):
            found = getattr(torch.ops.vbdl, name)(x, *parameters, activation)
            expected = getattr(module, f"reference_{name}")(x, *parameters, activation)
            assert found.shape == expected.shape and not found.isnan().any()
            # a float32 sum a layer; in half precision a rounding or two of every layer's units and weights, which
            # the interpreter cuts instead of rounding to bfloat16
            bound = 20 * torch.finfo(dtype).eps * len(widths)
            if batch:
                scale = float(expected.double().abs().max())
                assert float((found.double() - expected.double()).abs().max()) <= bound * scale
