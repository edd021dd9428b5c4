"""Bayesian layers of networks built by hand."""

import pytest
import torch
from torch import nn

import vbdl

LAYERS = {
    "linear": (lambda: vbdl.BayesianLinear(3, 5), (7, 3), nn.functional.linear),
    "conv1d": (lambda: vbdl.BayesianConv1d(3, 5, 2, padding=1), (7, 3, 11), None),
    "conv2d": (lambda: vbdl.BayesianConv2d(2, 4, 3, groups=2, padding_mode="circular", padding=1), (7, 2, 5, 5), None),
    "conv3d": (lambda: vbdl.BayesianConv3d(2, 3, 2, stride=2), (7, 2, 4, 4, 4), None),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_the_plain_layer_with_drawn_weights(name):
    make, shape, _ = LAYERS[name]
    layer, x = make(), torch.randn(shape)
    layer.draw(3, seed=5)
    weights = layer.weights()
    plain = torch.func.functional_call(layer.inner, weights, (x,))
    assert torch.equal(layer(x), plain)
    first = layer(x)
    layer.draw(4, seed=5)
    assert not torch.equal(layer(x), first)
    layer.draw(3, seed=5)
    assert torch.equal(layer(x), first)


def test_kl_is_that_of_torch_and_adds_over_layers():
    layers = [vbdl.BayesianLinear(3, 5, prior=0.3), vbdl.BayesianConv2d(2, 4, 3, prior=2.0)]
    expected = 0.0
    for layer, prior in zip(layers, (0.3, 2.0), strict=True):
        for _, mean, log_std in layer.normals():
            q, p = torch.distributions.Normal(mean, log_std.exp()), torch.distributions.Normal(0.0, prior)
            expected += torch.distributions.kl_divergence(q, p).sum()
    q = vbdl.MeanField(nn.ModuleList(layers), n_data=10)
    torch.testing.assert_close(q.kl(), expected, rtol=1e-5, atol=0.0)


def test_a_network_of_them_is_a_mean_field_posterior():
    net = nn.Sequential(vbdl.BayesianLinear(3, 7), nn.Tanh(), nn.Linear(7, 2), vbdl.BayesianLinear(2, 2))
    x = torch.randn(11, 3)
    q = vbdl.MeanField(net, n_data=11)
    predict = vbdl.Predictor(q, vbdl.Gaussian(2, std=0.1), 5, seed=2, compile=False, joint=True)
    found = predict(x, samples=True).samples[..., 0]
    for s in range(5):
        for path in (0, 3):
            q.module.inner[path].draw(s, seed=2)
        torch.testing.assert_close(found[s], q.module.inner(x), rtol=1e-5, atol=1e-6)
    layers = q.module.inner[0], q.module.inner[3]
    assert layers[1].first_layer == 2  # their noise is of different layer numbers, or they would move together


def test_it_trains_and_stacks():
    net = nn.Sequential(vbdl.BayesianLinear(3, 7), nn.Tanh(), vbdl.BayesianLinear(7, 1))
    x = torch.randn(64, 3)
    y = x.sum(1).sin()
    q, likelihood = vbdl.DeepEnsemble(vbdl.MeanField(net, 64), 2), vbdl.Gaussian()
    history = vbdl.fit(q, (x, y), likelihood, epochs=60, lr=1e-2, compile=False)
    assert all(b < a for a, b in zip(history.train_loss[0], history.train_loss[-1], strict=True))
    p = vbdl.Predictor(q, likelihood, 8, compile=False)(x)
    assert bool((p.epistemic > 0).all())


def test_options_of_mean_field_that_belong_in_the_layers_are_refused():
    with pytest.raises(ValueError, match="in those layers"):
        vbdl.MeanField(nn.Sequential(vbdl.BayesianLinear(3, 1)), 10, prior=0.5)
    with pytest.raises(ValueError, match="initial_std"):
        vbdl.BayesianLinear(3, 1, initial_std=0.0)
