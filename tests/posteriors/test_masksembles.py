"""Masksembles: fixed masks whose overlap follows `scale`, on any network; dropped units are left out of predictions."""

import copy
import itertools
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import vbdl
from vbdl.compiling.graph import BODY, PREFIX
from vbdl.posteriors.masksembles import Masksembles, draw_masks, kept_units

sys.path.insert(0, str(Path(__file__).parent))
from scaled_networks import CLASSES, NETWORKS, made, predictor, state_of_member  # noqa: E402

MEMBERS = 3
each_network = pytest.mark.parametrize("name", NETWORKS)


def mlp(width: int = 64) -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))


def data(rows: int = 60):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 4, generator=generator)
    return x, (x.prod(1) > 0).long()


# -- masks


@pytest.mark.parametrize("scale", [1.0, 1.1, 1.5, 2.0, 3.0, 6.0, 40.0])
@pytest.mark.parametrize("n_members", [1, 2, 3, 4, 8, 20])
def test_masks_of_any_width(n_members, scale):
    """Exactly `kept_units` ones a member, every unit used; overlap falls with scale."""
    for width in (1, 2, 3, 5, 9, 10, 17, 64, 101, 515):
        masks = draw_masks(width, n_members, scale, torch.Generator().manual_seed(0))
        kept = kept_units(width, n_members, scale)
        assert masks.shape == (n_members, width) and set(masks.unique().tolist()) <= {0.0, 1.0}
        assert masks.sum(1).tolist() == [kept] * n_members and bool(masks.any(0).all())
        assert width <= kept * n_members and (scale > 1 or kept == width)


def test_the_number_of_kept_units():
    assert kept_units(60, 4, 2.0) == 32  # 60 / (2 (1 - 1 / 16)) = 32
    assert kept_units(100, 4, 1.5) == 67  # 100 / (1.5 (1 - 1 / 81)) = 67.5
    assert kept_units(100, 4, 1000.0) == 25  # a partition
    assert [kept_units(w, 4, 1.0) for w in (1, 7, 64)] == [1, 7, 64]


@pytest.mark.parametrize("n_members, scale", [(2, 1.5), (4, 2.0), (4, 4.0), (8, 3.0)])
def test_two_members_share_one_part_in_scale_of_their_units(n_members, scale):
    """Also where masks had to be repaired; and every unit is as likely to be kept as any other."""
    width, shares, used = 101, [], torch.zeros(101)
    kept = kept_units(width, n_members, scale)
    for seed in range(40):
        masks = draw_masks(width, n_members, scale, torch.Generator().manual_seed(seed))
        used += masks.sum(0)
        shares += [float((a * b).sum()) / kept for a, b in itertools.combinations(masks, 2)]
    mean = sum(shares) / len(shares)
    # positions are whole numbers: kept * scale of them, of which `width` are used, up to one unit in `width`
    assert mean == pytest.approx(1 / scale, abs=0.02)
    expected = n_members * kept * 40 / width
    assert float((used - expected).abs().max()) < 5.5 * (expected * (1 - kept / width)) ** 0.5


def test_masks_follow_the_seed_and_the_layer():
    q, same, other = (Masksembles(mlp(), MEMBERS, seed=s) for s in (0, 0, 1))
    assert torch.equal(q.masks("2"), same.masks("2")) and not torch.equal(q.masks("2"), other.masks("2"))
    assert not torch.equal(q.masks("2"), q.masks("4"))
    with pytest.raises(ValueError, match=r"no inputs of '0' are masked; those of \['2', '4'\] are"):
        q.masks("0")


# -- what a member is


@each_network
def test_a_member_is_the_network_without_its_dropped_units(name):
    network, x = made(name)
    q = Masksembles(network, MEMBERS, 1.5)
    samples = predictor(q)(x, samples=True).samples
    entries = {**q.shared(), **q.stacked()}
    for index, sample in enumerate(samples):
        plain = copy.deepcopy(network).eval()
        expected = functional_call(plain, state_of_member(q, network, entries, index), (x,)).detach()
        torch.testing.assert_close(sample, expected, rtol=1e-4, atol=1e-5)
        plain.load_state_dict(q.member(index), strict=False)
        torch.testing.assert_close(plain(x).detach(), expected, rtol=1e-4, atol=1e-5)


@each_network
def test_scale_1_is_the_network(name):
    network, x = made(name)
    samples = predictor(Masksembles(network, MEMBERS, 1.0))(x, samples=True).samples
    for sample in samples:
        torch.testing.assert_close(sample, network.eval()(x).detach(), rtol=1e-5, atol=1e-6)


@each_network
def test_stacked_losses_and_gradients_are_those_of_a_loop(name):
    network, x = made(name)
    network.double()
    x = x.double() if x.is_floating_point() else x
    y = torch.randint(CLASSES, (len(x),))
    q, likelihood = Masksembles(network, MEMBERS, 1.5).train(), vbdl.Categorical()
    q.before_training(x, y, likelihood)
    losses = q.losses(x, y, likelihood)
    losses.sum().backward()
    entries = {n: t.detach().clone().requires_grad_(t.requires_grad) for n, t in {**q.shared(), **q.stacked()}.items()}
    plain, total = copy.deepcopy(network).train(), 0.0
    for index in range(MEMBERS):
        state = {n: t.clone() if not t.requires_grad else t for n, t in entries.items()}
        loss = F.cross_entropy(functional_call(plain, state_of_member(q, network, state, index), (x,)), y)
        torch.testing.assert_close(losses[index].detach(), loss.detach(), rtol=1e-9, atol=1e-12)
        total = total + loss
    total.backward()
    for n, t in q.shared().items():
        if t.requires_grad:
            expected = torch.zeros_like(t) if entries[n].grad is None else entries[n].grad
            found = torch.zeros_like(t) if t.grad is None else t.grad
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-10, msg=lambda m, n=n: f"{n}: {m}")


def test_the_first_layer_is_not_masked_unless_it_is_chosen_or_alone():
    assert [layer.path for layer in Masksembles(mlp(), MEMBERS).scaled.values()] == ["2", "4"]
    assert [layer.path for layer in Masksembles(mlp(), MEMBERS, layers=["0"]).scaled.values()] == ["0"]
    assert [layer.path for layer in Masksembles(nn.Linear(4, 2), MEMBERS).scaled.values()] == [""]
    frozen = mlp()
    frozen[0].requires_grad_(False)
    assert [layer.path for layer in Masksembles(frozen, MEMBERS).scaled.values()] == ["2", "4"]


def test_rescaled_masks_keep_the_mean():
    q = Masksembles(mlp(), 4, 2.0, rescale=True)
    assert q.stacked()["r.2/weight"].unique().tolist() == pytest.approx([0.0, 64 / kept_units(64, 4, 2.0)])
    assert q.masks("2").dtype == torch.bool


# -- what is held and trained


def test_masks_are_saved_and_not_trained(tmp_path):
    network, (x, y) = mlp(128), data()
    q = Masksembles(network, MEMBERS)
    masks, before = q.stacked()["r.2/weight"].clone(), network[2].weight.clone()
    assert not list(q.stacked_parameters.parameters())
    history = vbdl.fit(
        q, (x, y), vbdl.Categorical(), epochs=3, batch_size=20, validation=0.3, weight_decay=1.0, compile=False
    )
    assert all(len(set(epoch)) == 1 for epoch in history.validation_nll), "members stop by their mixture"
    assert torch.equal(q.stacked()["r.2/weight"], masks) and torch.equal(network[2].weight, before)
    assert not torch.equal(q.shared()["inner.2.weight"], before)
    predict = predictor(q)
    predict.save(tmp_path / "model.vbdl")
    loaded = vbdl.load(tmp_path / "model.vbdl", compile=False)
    assert torch.equal(loaded(x).probs, predict(x).probs)
    assert torch.equal(loaded.posterior.masks("2"), q.masks("2"))
    size = sum(t.numel() * t.element_size() for t in q.state_dict().values())
    assert size < 1.2 * sum(t.numel() * t.element_size() for t in network.state_dict().values())


def test_training_reaches_every_weight_of_some_member():
    x, y = data()
    q = Masksembles(mlp(), MEMBERS, 3.0).train()
    q.losses(x, y, vbdl.Categorical()).sum().backward()
    weight, masks = q.shared()["inner.2.weight"], q.masks("2")
    for member in range(MEMBERS):
        q.zero_grad()
        q.losses(x, y, vbdl.Categorical())[member].backward()
        columns = q.shared()["inner.2.weight"].grad.abs().sum(0) > 0
        assert not bool((columns & ~masks[member]).any()), "a dropped unit has a gradient"
    assert bool(masks.any(0).all()) and weight.shape == (64, 64)


def test_members_have_their_own_running_statistics():
    network, x = made("conv2d")
    q = Masksembles(network, MEMBERS, layers=["0"])
    history = vbdl.fit(q, (x, torch.randint(CLASSES, (8,))), vbdl.Categorical(), epochs=2, compile=False)
    means = q.stacked()["inner.1.running_mean"]
    assert history.one_by_one == "" and means.shape == (MEMBERS, 6) and "inner.1.weight" in q.shared()


def test_a_resumed_training_has_the_bits_of_an_uninterrupted_one(tmp_path):
    x, y = data()
    states = []
    for parts in ([6], [3, 6]):
        for epochs in parts:
            q = Masksembles(mlp(), MEMBERS)
            vbdl.fit(
                q, (x, y), vbdl.Categorical(), epochs=epochs, batch_size=20, validation=0.2, patience=50,
                checkpoint=tmp_path / str(len(parts)), compile=False,
            )  # fmt: skip
        states.append(q.state_dict())
    for name, t in states[0].items():
        assert torch.equal(t, states[1][name]), name


# -- how it predicts


def test_dropped_units_are_left_out():
    """The members become smaller networks, with the numbers of the masked one, and `explain` says so."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(32, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    q, x = Masksembles(network, 4, 3.0), torch.randn(64, 32)
    predict, masked = predictor(q), predictor(q, memory_budget=3 * 2**19)
    assert "every draw is a smaller network" in predict.explain(x)
    assert "every draw is a smaller network" not in masked.explain(x)
    torch.testing.assert_close(predict(x).probs, masked(x).probs, rtol=0, atol=1e-6)
    (execution,) = predict.executions.drawing(next(iter(predict.tiles_of(predict.check(x)))))
    kept = -(-kept_units(512, 4, 3.0) // 16) * 16  # rounded up to a multiple of 16
    regions = execution.traced.probe()[0].regions  # of all four members
    assert regions[PREFIX].flops() == 2 * 64 * 32 * 512  # the first layer, which has no mask, once for all members
    assert regions[BODY].flops() == 4 * 2 * 64 * (kept * kept + kept * 10)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"n_members": 0}, "n_members must be at least 1"),
        ({"scale": 0.5}, "scale must be at least 1, got 0.5"),
        ({"layers": ["body"]}, "there is no module 'body'"),
        ({"layers": [nn.ReLU]}, "layers=ReLU names no linear or convolutional layer"),
    ],
)
def test_arguments_that_cannot_be(arguments, words):
    with pytest.raises(ValueError, match=words):
        Masksembles(mlp(), **arguments)
