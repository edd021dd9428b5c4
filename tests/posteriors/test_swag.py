"""SWAG: the moments of the weights that training passes through, draws of them, and batch statistics of each draw."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset
from vbdl_kernels import make_key

import vbdl
from vbdl.posteriors.swag import SWAG

ROWS, FEATURES, CLASSES = 60, 4, 3


def network(norm: bool = False, outputs: int = CLASSES, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    middle = [nn.BatchNorm1d(8)] if norm else []
    return nn.Sequential(nn.Linear(FEATURES, 8), *middle, nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, outputs))


@pytest.fixture(scope="module")
def data():
    x = torch.randn(ROWS, FEATURES, generator=torch.Generator().manual_seed(0))
    return x, x[:, :CLASSES].argmax(1)


class Recording(SWAG):
    """Keeps the weights after every epoch."""

    def after_epoch(self, epoch):
        weights = {n: p.detach().clone() for n, p in self.module.inner.named_parameters()}
        self.trajectory = [*getattr(self, "trajectory", []), weights]
        super().after_epoch(epoch)


def fitted(q, data, **options):
    likelihood = vbdl.Categorical()
    settings = {"epochs": 8, "batch_size": 20, "lr": 1e-2, "compile": False}
    return q, likelihood, vbdl.fit(q, data, likelihood, **{**settings, **options})


def predictor(q, likelihood, **settings):
    return vbdl.Predictor(q, likelihood, compile=False, **settings)


def assert_equal_states(a, b):
    for name, t in a.state_dict().items():
        assert torch.equal(t, b.state_dict()[name]), name


# -- the moments


@pytest.mark.parametrize("rank", [3, 20])  # fewer and more columns than collected weights
def test_the_moments_are_those_of_the_trajectory(rank, data):
    """Float32 rounding of 6e-8, times at most 6 weights, relative to deviations of the order of the weights."""
    q, _, _ = fitted(Recording(network(), rank, collect_from=2), data)
    assert int(q.module.collected) == int(q.module.finished) == 6
    (factor,) = q.module.factors
    for name, p in q.module.inner.named_parameters():
        weights = np.stack([w[name].double().numpy() for w in q.trajectory[2:]])
        np.testing.assert_allclose(p.detach(), weights.mean(0), rtol=0, atol=1e-6)
        np.testing.assert_allclose(factor.std(name), weights.std(0), rtol=1e-4, atol=1e-6)
        running = np.cumsum(weights, 0) / np.arange(1, 7).reshape(-1, *[1] * p.ndim)
        columns = (weights - running)[-rank:]
        d = factor.deviations(name).double().numpy() / math.sqrt(rank - 1)
        expected = columns / math.sqrt(len(columns) - 1)
        # columns come in any order: compare D D^T
        one, other = (np.einsum("ka,kb->ab", *[c.reshape(len(c), -1)] * 2) for c in (d, expected))
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4 * np.abs(other).max())


def test_draws_have_the_covariance_of_the_moments(data):
    """All of C, over 20,000 draws: 5 standard errors of a covariance."""
    q, _, _ = fitted(SWAG(network(), rank=3, collect_from=2), data)
    (factor,) = q.module.factors
    std = torch.cat([factor.std(n).flatten() for n in factor.names]).double()
    d = torch.cat([factor.deviations(n).flatten(1) for n in factor.names], 1).double()
    expected = torch.diag(std.square()) / 2 + d.mT @ d / (2 * 2)
    draws = 20_000
    keys = make_key(0, range(draws))

    def one(key):
        found = factor.deviation(key, 0)
        return torch.cat([found[n].flatten() for n in factor.names])

    deviations = torch.func.vmap(one)(keys).double()
    found = deviations.mT @ deviations / draws
    error = (expected.diagonal().outer(expected.diagonal()) + expected.square()).sqrt() / math.sqrt(draws)
    assert bool(((found - expected).abs() <= 5 * error + 1e-12).all())


def test_a_further_fit_starts_at_the_mean_and_collects_on(data):
    q, likelihood, _ = fitted(Recording(network(), rank=20), data)
    first = {n: p.detach().clone() for n, p in q.module.inner.named_parameters()}
    vbdl.fit(q, data, likelihood, epochs=4, batch_size=20, lr=1e-2, compile=False)
    assert int(q.module.finished) == 12
    (factor,) = q.module.factors
    for name, p in q.module.inner.named_parameters():
        weights = torch.stack([w[name].double() for w in q.trajectory])
        torch.testing.assert_close(p.double(), weights.mean(0), rtol=0, atol=1e-6)
        torch.testing.assert_close(factor.std(name).double(), weights.std(0, correction=0), rtol=1e-4, atol=1e-6)
        assert float((q.trajectory[8][name] - first[name]).abs().max()) < 0.1  # three steps of Adam at 0.01


def test_draws_are_networks_at_drawn_weights(data):
    q, likelihood, _ = fitted(SWAG(network(), rank=3), data)
    kept = predictor(q, likelihood, n_samples=5, joint=True)(data[0], samples=True).samples
    net = network().eval()
    (factor,) = q.module.factors
    for number in range(5):
        deviation = factor.deviation(make_key(0, [number])[0], 0)
        weights = {n: p.detach() + deviation[n] for n, p in q.module.inner.named_parameters()}
        torch.testing.assert_close(kept[number], functional_call(net, weights, (data[0],)), rtol=0, atol=1e-5)


# -- batch statistics


@pytest.mark.parametrize("ensemble", [False, True])
def test_batch_statistics_of_a_draw_are_those_of_a_plain_pass(ensemble, data):
    """Of `update_bn` over the same batches, for every draw: up to float32 rounding."""
    make = lambda seed: SWAG(network(norm=True, seed=seed), rank=3, n_draws=4)
    q = vbdl.DeepEnsemble([make(s) for s in range(2)]) if ensemble else make(0)
    loader = DataLoader(TensorDataset(*data), batch_size=20)
    q, likelihood, _ = fitted(q, loader)
    draws = q.n_draws
    assert draws == (8 if ensemble else 4)
    kept = predictor(q, likelihood)(data[0], samples=True).samples
    assert len(kept) == draws
    for number in range(draws):
        member, own = (number % 2, number // 2) if ensemble else (0, number)
        alone = make(member)
        alone.module.load_state_dict(q.member(member) if ensemble else q.module.state_dict(), strict=False)  # no key
        deviation = alone.module.factors[0].deviation(make_key(0, [own])[0], 0)
        net = network(norm=True).apply(_without_dropout).train()
        with torch.no_grad():
            for name, p in net.named_parameters():
                p.copy_(alone.module.mean(name) + deviation[name])
        torch.optim.swa_utils.update_bn(loader, net)
        statistics = [alone.module.statistics_0[own], alone.module.statistics_1[own]]
        torch.testing.assert_close(statistics, [net[1].running_mean, net[1].running_var], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(kept[number], net.eval()(data[0]), rtol=0, atol=1e-5)


def _without_dropout(m: nn.Module) -> None:
    if isinstance(m, nn.Dropout):
        m.p = 0.0


def test_draws_with_statistics_are_limited_and_ignore_the_seed(data):
    q, likelihood, _ = fitted(SWAG(network(norm=True), rank=3, n_draws=4), data)
    predict = predictor(q, likelihood)
    assert predict.n_samples == 4 and "draw their outputs" not in predict.explain(data[0])
    assert torch.equal(predict(data[0]).probs, predictor(q, likelihood, seed=5)(data[0]).probs)
    with pytest.raises(ValueError, match="only 4 different draws"):
        predictor(q, likelihood, n_samples=5)


# -- training


class Watched(torch.optim.SGD):
    rates: list = []

    def step(self, closure=None):
        Watched.rates.append(self.param_groups[0]["lr"])
        return super().step(closure)


def rates_of(q, data, epochs):
    Watched.rates = []
    fitted(q, data, epochs=epochs, batch_size=ROWS, optimizer=lambda ps: Watched(ps, lr=0.1))
    return Watched.rates


def test_the_learning_rate_falls_to_that_of_collecting(data):
    rates = rates_of(SWAG(network(), 3, collect_from=10, swa_lr=0.02), data, 13)
    assert rates[:6] == [0.1] * 6 and rates[9:] == pytest.approx([0.02] * 4)
    assert rates[7] == pytest.approx(0.1 - 0.08 * 0.5)  # half way between 5 and 9
    assert rates_of(SWAG(network(), 3), data, 3) == [0.1] * 3


def test_cycles_collect_at_their_ends(data):
    q = Recording(network(), 3, collect_from=1, cycle=3)
    rates = rates_of(q, data, 8)
    assert rates == pytest.approx([0.1, 0.1, 0.067, 0.034, 0.1, 0.067, 0.034, 0.1])
    assert int(q.module.finished) == 2
    expected = (q.trajectory[3]["0.weight"] + q.trajectory[6]["0.weight"]) / 2
    torch.testing.assert_close(q.module.inner[0].weight.detach(), expected, rtol=0, atol=1e-6)


def test_early_stopping_ends_before_collecting(data):
    """It goes back to the best epoch, and collects from there as many epochs as were asked for."""
    q, likelihood, history = fitted(
        Recording(network(), 20, collect_from=40), data, epochs=44, lr=0.1, validation=0.3, patience=2
    )
    best = history.best_epoch[0]
    assert best + 3 < 40, "the example does not stop early"
    assert history.epochs == best + 3 + 4 == len(history.validation_nll) and int(q.module.finished) == 4
    # one epoch from the best one is nearer to it than to the last one before
    distance = lambda a, b: sum(float((a[n] - b[n]).square().sum()) for n in a)
    first = q.trajectory[best + 3]
    assert distance(first, q.trajectory[best]) < distance(first, q.trajectory[best + 2])


@pytest.mark.parametrize("options", [{}, {"validation": 0.3, "patience": 2, "lr": 0.1}])
@pytest.mark.parametrize("ensemble", [False, True])
def test_a_resumed_training_is_an_uninterrupted_one(options, ensemble, data, tmp_path):
    make = lambda: SWAG(network(norm=True), rank=2, collect_from=12 if options else 2, n_draws=3)
    wrap = (lambda: vbdl.DeepEnsemble(make(), 2)) if ensemble else make
    epochs = 16 if options else 8
    whole, _, history = fitted(wrap(), data, epochs=epochs, **options)
    interrupted = wrap()
    after_epoch, calls = type(interrupted).after_epoch, []

    def stop(epoch):
        after_epoch(interrupted, epoch)
        calls.append(epoch)
        if len(calls) == history.epochs - 2:
            raise KeyboardInterrupt

    object.__setattr__(interrupted, "after_epoch", stop)
    checkpoint = {"checkpoint": tmp_path / "checkpoint", "checkpoint_every": 1}
    with pytest.raises(KeyboardInterrupt):
        fitted(interrupted, data, epochs=epochs, **options, **checkpoint)
    resumed, _, second = fitted(wrap(), data, epochs=epochs, **options, **checkpoint)
    assert second.epochs == history.epochs
    assert_equal_states(whole, resumed)


def test_multi_swag_is_swag_of_each_member(data):
    """Trained together as alone, up to the rounding of stacked products, which 24 steps of Adam enlarge."""
    nets = [network(seed=s) for s in range(2)]
    q, likelihood, _ = fitted(vbdl.DeepEnsemble([SWAG(net, rank=3, seed=0) for net in nets]), data)
    assert q.n_draws is None
    alone = [fitted(SWAG(net, rank=3, seed=s), data, seed=s)[0] for s, net in enumerate(nets)]
    for member, own in enumerate(alone):
        for name, t in own.module.state_dict().items():
            torch.testing.assert_close(q.member(member)[name], t, rtol=1e-3, atol=1e-4, msg=name)
    p = predictor(q, likelihood, n_samples=64)(data[0])
    single = [predictor(own, vbdl.Categorical(), n_samples=512)(data[0]).probs for own in alone]
    assert float((p.probs - torch.stack(single).mean(0)).abs().max()) < 5 * float(p.standard_error.max())
    assert p.n_samples == 64


def test_it_is_refused_before_anything_is_collected(data):
    q = SWAG(network(), 3)
    with pytest.raises(ValueError, match="has not collected any weights: train with vbdl.fit"):
        predictor(q, vbdl.Categorical())

    class Interrupted(SWAG):
        def after_epoch(self, epoch):
            super().after_epoch(epoch)
            if epoch == 3:
                raise KeyboardInterrupt

    q = Interrupted(network(), 3)
    with pytest.raises(KeyboardInterrupt):
        fitted(q, data)
    with pytest.raises(ValueError, match="was interrupted"):
        predictor(q, vbdl.Categorical())
    with pytest.raises(ValueError, match="has not collected any"):
        predictor(vbdl.DeepEnsemble(SWAG(network(), 3), 2), vbdl.Categorical())


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ({"collect_from": -1}, {}, "collect_from must be"),
        ({"collect_from": 1.5}, {}, "collect_from must be"),
        ({"swa_lr": 0.0}, {}, "swa_lr must be"),
        ({"cycle": 0}, {}, "cycle must be"),
        ({"n_draws": 0}, {}, "n_draws must be"),
        ({"rank": 1}, {}, "rank of at least 2"),
        ({"collect_from": 7}, {}, "epochs=8 with collect_from=7 .* collects 1: train for at least 9 epochs"),
        ({"collect_from": 0.9, "cycle": 5}, {}, "train for at least 10 epochs"),
        ({"cycle": 2}, {"schedule": "cosine"}, "sets the learning rate of every step itself"),
        ({}, {"validation": 0.2, "patience": 2}, "leave patience= out"),
    ],
)
def test_arguments_that_cannot_work_are_refused(arguments, options, message, data):
    with pytest.raises(ValueError, match=message):
        fitted(SWAG(network(), **arguments), data, **options)


def test_frozen_layers_and_statistics_stay(data):
    net = network(norm=True).eval()
    net[0].requires_grad_(False)
    net[1].requires_grad_(False)
    q, likelihood, _ = fitted(SWAG(net, 3), data)
    assert q.n_draws is None and q.module.statistics == () and "0.weight" not in q.module.chosen
    assert torch.equal(q.module.inner[1].running_mean, net[1].running_mean)
    assert bool((predictor(q, likelihood, n_samples=8)(data[0]).epistemic > 0).all())


@pytest.mark.parametrize("ensemble", [False, True])
def test_a_saved_predictor_predicts_the_same(ensemble, data, tmp_path):
    make = lambda: SWAG(network(norm=True), rank=3, n_draws=3)
    q, likelihood, _ = fitted(vbdl.DeepEnsemble(make(), 2) if ensemble else make(), data)
    predict = predictor(q, likelihood)
    predict.save(tmp_path / "model", example=data[0])
    loaded = vbdl.load(tmp_path / "model")
    assert torch.equal(loaded(data[0]).probs, predict(data[0]).probs) and loaded.n_samples == predict.n_samples


def test_batch_statistics_of_a_loader_follow_from_the_seed():
    x, y = torch.randn(60, 4), torch.arange(60) % 3
    ends = []
    for others in (1, 2):
        torch.manual_seed(0)
        q = SWAG(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)))
        torch.manual_seed(others)
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 16, shuffle=True)
        q, likelihood, _ = fitted(q, loader, epochs=3)
        ends.append(predictor(q, likelihood, n_samples=6)(x, samples=True).samples)
    assert torch.equal(*ends)
