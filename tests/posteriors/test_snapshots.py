"""Snapshot ensembles: the weights at the ends of the cycles, at the learning rates of the paper."""

import math

import pytest
import torch
from torch import nn

import vbdl

ROWS, FEATURES, CLASSES = 60, 4, 3


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, CLASSES))


@pytest.fixture(scope="module")
def data():
    x = torch.randn(ROWS, FEATURES, generator=torch.Generator().manual_seed(0))
    return x, x[:, :CLASSES].argmax(1)


class Recording(vbdl.Snapshots):
    """Keeps the state after every epoch."""

    def after_epoch(self, epoch):
        self.trajectory = [
            *getattr(self, "trajectory", []),
            {n: t.clone() for n, t in self.module.state_dict().items()},
        ]
        super().after_epoch(epoch)


def fitted(kind=Recording, n_members=3, **options):
    q, likelihood = kind(network(), n_members, seed=1), vbdl.Categorical()
    settings = {"epochs": 6, "batch_size": 20, "lr": 1e-2, "compile": False}
    history = vbdl.fit(q, options.pop("data"), likelihood, **{**settings, **options})
    return q, likelihood, history


@pytest.mark.parametrize("epochs, ends", [(6, (1, 3, 5)), (8, (2, 4, 7)), (3, (0, 1, 2))])
def test_snapshots_are_the_weights_at_the_ends_of_cycles(epochs, ends, data):
    q, likelihood, history = fitted(epochs=epochs, data=data)
    assert history.epochs == epochs and int(q.taken) == 3
    draws = q.draws(torch.arange(3), 0)
    for member, epoch in enumerate(ends):
        for name, t in q.trajectory[epoch].items():
            assert torch.equal(draws[name][member], t), name
    nets = [network().eval() for _ in range(3)]
    for net, epoch in zip(nets, ends, strict=True):
        net.load_state_dict(q.trajectory[epoch])
    p = vbdl.Predictor(q, likelihood, compile=False)(data[0])
    expected = torch.stack([net(data[0]).softmax(-1) for net in nets]).mean(0)
    torch.testing.assert_close(p.probs, expected, rtol=0, atol=1e-6)
    assert p.n_samples == 3 and bool((p.epistemic > 0).all())


def test_the_learning_rate_is_that_of_the_paper(data):
    """alpha(t) = alpha_0 / 2 (cos(pi mod(t - 1, T / M) / (T / M)) + 1) at each of T steps (equation 2)."""
    rates = []

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    fitted(data=data, optimizer=lambda ps: Watched(ps, lr=0.1))
    total, cycle = 18, 6  # three batches in each of six epochs, three cycles
    expected = [0.05 * (math.cos(math.pi * (t % cycle) / cycle) + 1) for t in range(total)]
    assert rates == pytest.approx(expected)


def test_a_schedule_of_ones_own(data):
    rates = []

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    q = vbdl.Snapshots(network(), 2, schedule=lambda t: 1 - t)
    vbdl.fit(q, data, vbdl.Categorical(), epochs=4, batch_size=ROWS, optimizer=lambda ps: Watched(ps, lr=0.1))
    assert rates == pytest.approx([0.1, 0.05, 0.1, 0.05])


def test_a_resumed_training_is_an_uninterrupted_one(data, tmp_path):
    whole, likelihood, _ = fitted(data=data)

    class Interrupted(vbdl.Snapshots):
        def after_epoch(self, epoch):
            super().after_epoch(epoch)
            if epoch == 4:
                raise KeyboardInterrupt

    options = {"data": data, "checkpoint": tmp_path / "checkpoint", "checkpoint_every": 1}
    with pytest.raises(KeyboardInterrupt):
        fitted(Interrupted, **options)
    resumed, _, history = fitted(vbdl.Snapshots, **options)
    assert history.epochs == 6
    for name, t in whole.state_dict().items():
        assert torch.equal(t, resumed.state_dict()[name]), name


def test_it_is_refused_before_all_snapshots_are_taken(data):
    q = vbdl.Snapshots(network(), 3)
    with pytest.raises(ValueError, match="0 of 3 snapshots are taken: train with vbdl.fit"):
        vbdl.Predictor(q, vbdl.Categorical(), compile=False)(data[0])
    with pytest.raises(ValueError, match="0 of 3 snapshots"):  # rows that cannot be trained on leave it as it was
        with pytest.raises(ValueError):
            vbdl.fit(q, (data[0][:, :2], data[1]), vbdl.Categorical())
        vbdl.Predictor(q, vbdl.Categorical(), compile=False)(data[0])


def test_options_that_contradict_the_cycles_are_refused(data):
    for options, message in (
        ({"epochs": 2}, "3 snapshots need at least 3 epochs"),
        ({"schedule": "cosine"}, "Recording sets the learning rate of every step itself: leave schedule= out"),
        ({"validation": 0.2, "patience": 3}, "leave patience= out"),
    ):
        with pytest.raises(ValueError, match=message):
            fitted(data=data, **options)
    with pytest.raises(ValueError, match="n_members must be"):
        vbdl.Snapshots(network(), 0)
    with pytest.raises(TypeError, match="schedule must be a function"):
        vbdl.Snapshots(network(), 2, schedule="cosine")
    with pytest.raises(ValueError, match="every parameter of the network is frozen"):
        vbdl.Snapshots(network().requires_grad_(False), 2)


def test_validation_records_the_network_in_training_and_restores_no_epoch(data):
    q, likelihood, history = fitted(data=data, validation=0.2, batch_size=48)
    assert len(history.validation_nll) == 6 and history.best_epoch == [-1]
    assert all(torch.equal(q.module.state_dict()[n], t) for n, t in q.trajectory[-1].items())


def test_frozen_layers_are_held_once(data):
    net = network()
    net[0].requires_grad_(False)
    q = vbdl.Snapshots(net, 2)
    vbdl.fit(q, data, vbdl.Categorical(), epochs=2, compile=False)
    assert "0.weight" not in q.draws(torch.arange(2), 0) and "4.weight" in q.draws(torch.arange(2), 0)
    assert torch.equal(q.module[0].weight, net[0].weight)


def test_a_saved_ensemble_predicts_the_same(data, tmp_path):
    q, likelihood, _ = fitted(vbdl.Snapshots, data=data)
    predict = vbdl.Predictor(q, likelihood, compile=False)
    predict.save(tmp_path / "model", example=data[0])
    loaded = vbdl.load(tmp_path / "model")
    assert torch.equal(loaded(data[0]).probs, predict(data[0]).probs) and loaded.n_samples == 3
