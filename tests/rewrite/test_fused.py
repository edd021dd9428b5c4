"""The kernels in the engine's graph, forced on a CPU, where operators run their references: the same draws."""

import importlib

import pytest
import torch
from torch import nn

import vbdl
from vbdl.compiling.rewrite import fused, networks

X = torch.randn(70, 6, generator=torch.Generator().manual_seed(0))


def network(kind):
    torch.manual_seed(1)
    if kind == "tokens":  # one draw of the weights for every token of a row
        return nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Linear(3, 8), nn.ReLU(), nn.Flatten(), nn.Linear(16, 4))
    if kind == "convolution":
        return nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 4))
    if kind == "no bias":
        return nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 4, bias=False))
    if kind == "straight":
        return nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


def predictor(kind, parameters=None, **settings):
    q = vbdl.MeanField(network(kind), n_data=100, initial_std=0.3, parameters=parameters)
    return vbdl.Predictor(q, vbdl.Categorical(), n_samples=6, compile=False, **settings)


@pytest.fixture
def forced(monkeypatch):
    """Rewrites as on an accelerator; the choice is the argument's."""

    def force(fastest):
        monkeypatch.setattr(fused, "DEVICES", ("cpu",))
        monkeypatch.setattr(fused, "_is_fastest", lambda *arguments: fastest)
        monkeypatch.setattr(networks.regime, "of_network", lambda *arguments, **options: {"layers": 1.0})

    return force


@pytest.mark.parametrize(
    "kind, chunk",
    [("plain", None), ("plain", 4), ("tokens", None), ("no bias", None), ("straight", None), ("convolution", None)],
)
@pytest.mark.parametrize("fastest", [True, False])
def test_the_same_draws(kind, fastest, chunk, forced):
    expected = predictor(kind, joint=True, chunk_size=chunk)(X, samples=True)
    forced(fastest)
    rewritten = predictor(kind, joint=True, chunk_size=chunk)
    found = rewritten(X, samples=True)
    torch.testing.assert_close(found.samples, expected.samples, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.probs, expected.probs, rtol=1e-5, atol=1e-6)
    said = rewritten.explain()
    layers = {"plain": 3, "convolution": 1}.get(kind, 2)
    assert (f"{layers} linear layers draw their weights inside the product" in said) == fastest
    # what is left: the convolution and its bias, or with nothing fused every parameter
    left = {"convolution": 2}.get(kind, 0) if fastest else {"plain": 6, "no bias": 2}.get(kind, 4)
    assert ("in one pass (sample_weights)" in said) == (left > 0)
    assert left == 0 or f"{left} parameters are drawn in one pass" in said


@pytest.mark.parametrize("kind", ["plain", "straight"])
def test_drawn_outputs_in_one_kernel(kind, forced):
    expected = predictor(kind)(X, samples=True)
    forced(False)
    rewritten = predictor(kind)
    torch.testing.assert_close(rewritten(X, samples=True).samples, expected.samples, rtol=1e-5, atol=1e-5)
    assert "draw their outputs do so in one kernel" in rewritten.explain()


def test_a_bias_that_is_not_drawn(forced, monkeypatch):
    names = ("0.weight", "2.weight", "4.weight")
    expected = predictor("plain", parameters=names, joint=True)(X)
    forced(True)
    rewritten = predictor("plain", parameters=names, joint=True)
    torch.testing.assert_close(rewritten(X).probs, expected.probs, rtol=1e-5, atol=1e-6)
    assert "3 linear layers draw their weights" in rewritten.explain()
    rewritten = predictor("plain", parameters=names)  # and where outputs are drawn
    monkeypatch.setattr(fused, "DEVICES", ("none",))
    expected = predictor("plain", parameters=names)(X)
    monkeypatch.setattr(fused, "DEVICES", ("cpu",))
    torch.testing.assert_close(rewritten(X).probs, expected.probs, rtol=1e-5, atol=1e-6)
    assert "3 layers that draw their outputs do so in one kernel" in rewritten.explain()


def test_half_precision_is_that_of_the_dtype(forced):
    expected = predictor("plain", joint=True)(X)
    forced(True)
    rewritten = predictor("plain", joint=True, autocast=torch.bfloat16)
    # three layers of bfloat16: weights, products and activations rounded to 2**-9 each
    torch.testing.assert_close(rewritten(X).probs, expected.probs, rtol=0, atol=0.02)
    assert "3 linear layers draw their weights" in rewritten.explain()


def test_ensembles_of_mean_field_networks_keep_their_own_draws(forced):
    make = lambda: vbdl.DeepEnsemble([vbdl.MeanField(network("plain"), n_data=100) for _ in range(2)])
    q = make()
    expected = vbdl.Predictor(q, vbdl.Categorical(), n_samples=6, compile=False)(X)
    forced(True)
    found = vbdl.Predictor(q, vbdl.Categorical(), n_samples=6, compile=False)(X)
    torch.testing.assert_close(found.probs, expected.probs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "kind, best",
    [("relu", "whole"), *((k, "whole drawn") for k in ("relu", "tanh", "silu", "mixed", "wide", "plain ending"))],
)
def test_small_networks_in_one_kernel(kind, best):
    """Ensembles with their weights, mean-field networks with weights kept or drawn there; what is no such chain not."""
    act = {"tanh": nn.Tanh, "silu": nn.SiLU}.get(kind, nn.ReLU)
    other = nn.Tanh if kind == "mixed" else act

    def make(seed):
        torch.manual_seed(seed)
        width = 130 if kind == "wide" else 9
        layers = [nn.Linear(6, 20), act(), nn.Linear(20, width), other(), nn.Linear(width, 4)]
        return nn.Sequential(*layers, *([nn.Softplus()] if kind == "plain ending" else []))

    field = vbdl.MeanField(make(0), n_data=100, initial_std=0.3)
    ensemble = vbdl.DeepEnsemble([make(s) for s in range(5)])
    for q, name in ((field, "bayesian_mlp" if best == "whole drawn" else "ensemble_mlp"), (ensemble, "ensemble_mlp")):
        settings = dict(n_samples=5, compile=False, joint=True, chunk_size=3)
        expected = vbdl.Predictor(q, vbdl.Categorical(), **settings)(X, samples=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fused, "DEVICES", ("cpu",))
            patch.setattr(fused, "_is_fastest", lambda *arguments: False)

            def times(*arguments, drawn=False, **options):
                return {"layers": 1.0, best if drawn else "whole": 0.5}

            patch.setattr(networks.regime, "of_network", times)
            rewritten = vbdl.Predictor(q, vbdl.Categorical(), **settings)
            found = rewritten(X, samples=True)
        torch.testing.assert_close(found.samples, expected.samples, rtol=1e-5, atol=1e-5)
        # of the mixed one the first two layers are a chain, of the wide one none is
        assert (f"({name})" in rewritten.explain()) == (kind != "wide")


def test_a_network_that_no_kernel_takes_stays_in_layers_whatever_the_budget(forced, monkeypatch):
    forced(True)
    never = {"layers": 1.0, "whole": float("inf"), "whole drawn": float("inf")}
    monkeypatch.setattr(networks.regime, "of_network", lambda *arguments, **options: never)
    said = predictor("plain", joint=True, memory_budget=2**12).explain(X[:1])
    assert "bayesian_mlp" not in said and "sampled_linear" in said


def test_a_network_stays_in_layers_where_that_is_faster(forced):
    q = vbdl.DeepEnsemble([network("plain") for _ in range(3)])
    expected = vbdl.Predictor(q, vbdl.Categorical(), compile=False)(X)
    forced(False)
    rewritten = vbdl.Predictor(q, vbdl.Categorical(), compile=False)
    assert torch.equal(rewritten(X).probs, expected.probs)
    assert "mlp" not in rewritten.explain()


@pytest.mark.parametrize("bias", [True, False])
def test_masks_of_the_data_are_made_in_the_product(bias, forced, monkeypatch):
    torch.manual_seed(0)
    layers = [nn.Dropout(0.3), nn.Linear(6, 20, bias=bias), nn.ReLU(), nn.Dropout(0.2), nn.Linear(20, 4)]
    q = vbdl.MCDropout(nn.Sequential(*layers))
    expected = vbdl.Predictor(q, vbdl.Categorical(), n_samples=6, compile=False)(X, samples=True)
    forced(False)
    monkeypatch.setattr(importlib.import_module("vbdl.compiling.rewrite"), "compact", lambda *arguments: [])
    for times, count in (({"masked": 1, "activations": 2}, 1), ({"masked": 2, "activations": 1}, 0)):
        monkeypatch.setattr(fused.regime, "of_masks", lambda *a, t=times, **k: t)
        rewritten = vbdl.Predictor(q, vbdl.Categorical(), n_samples=6, compile=False)
        found = rewritten(X, samples=True)
        torch.testing.assert_close(found.samples, expected.samples, rtol=1e-5, atol=1e-5)
        assert ("1 linear layers make the masks" in rewritten.explain()) == bool(count)  # the other has one a draw


@pytest.mark.parametrize(
    "kernel", ["sampled_linear", "local_reparameterized_linear", "masks", "ensemble_mlp", "bayesian_mlp"]
)
def test_gradients_by_the_inputs_pass_through_kernels(kernel, forced, monkeypatch):
    """The bare operators in a graph have no derivative, and say so in a warning only, which is an error here."""

    def made():
        q = vbdl.MeanField(network("plain"), n_data=100, initial_std=0.3)
        if kernel == "masks":
            q = vbdl.MCDropout(nn.Sequential(nn.Dropout(0.3), nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 4)))
        joint = kernel != "local_reparameterized_linear"
        return vbdl.Predictor(q, vbdl.Categorical(), n_samples=6, compile=False, joint=joint)

    gradient = lambda predict, x: torch.autograd.grad(predict(x).total.sum(), x)[0]
    x = X.clone().requires_grad_()
    expected = gradient(made(), x)
    forced(kernel == "sampled_linear")
    statistics = importlib.import_module("vbdl.likelihoods.categorical")
    monkeypatch.setattr(statistics, "_in_one_pass", lambda parameters: parameters.ndim == 3)
    monkeypatch.setattr(importlib.import_module("vbdl.compiling.rewrite"), "compact", lambda *arguments: [])
    monkeypatch.setattr(fused.regime, "of_masks", lambda *arguments, **options: {"masked": 1, "activations": 2})
    whole = {"ensemble_mlp": "whole", "bayesian_mlp": "whole drawn"}.get(kernel, "layers")
    monkeypatch.setattr(networks.regime, "of_network", lambda *arguments, **options: {whole: 1.0})
    predict = made()
    torch.testing.assert_close(gradient(predict, x), expected, rtol=1e-4, atol=1e-6)
    assert kernel in predict.explain()


def test_nothing_changes_without_an_accelerator():
    assert "sampled_linear" not in (p := predictor("plain", joint=True)).explain(X)
    assert p.device.type == "cpu"


def test_the_choice_is_the_models(monkeypatch):
    """Kept weights where they fit and are fast; the fused kernel where they do not fit, at small batches."""
    large = dict(inputs=4096, outputs=4096, size=2, shared=False)
    assert not fused._is_fastest(32, 16, budget=2**33, **large)
    assert fused._is_fastest(32, 16, budget=2**20, **large)


@pytest.mark.parametrize("chunk", [None, 4])
def test_statistics_in_one_pass(chunk, monkeypatch):
    """The kernel's operator in place of the sums, whole and in chunks that merge; a logit of minus infinity in it."""
    expected = predictor("plain", chunk_size=chunk)(X)
    module = importlib.import_module("vbdl.likelihoods.categorical")
    monkeypatch.setattr(module, "_in_one_pass", lambda parameters: parameters.ndim == 3)
    found = predictor("plain", chunk_size=chunk)(X)
    for name in ("probs", "total", "aleatoric", "epistemic", "standard_error"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-6)
    logits = torch.randn(5, 3, 4)
    logits[0, 0, 0] = -torch.inf
    sums = vbdl.Categorical().summarize(logits)
    monkeypatch.undo()
    for name, value in vbdl.Categorical().summarize(logits).items():
        torch.testing.assert_close(sums[name], value, rtol=1e-5, atol=1e-6)
