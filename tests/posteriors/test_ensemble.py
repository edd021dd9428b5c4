"""Deep ensembles: fresh members, given members, stacked parameters and buffers."""

import copy
import pickle

import pytest
import torch
from torch import nn

from vbdl.compiling.graph import BODY, PREFIX
from vbdl.engine.predictor import Predictor
from vbdl.likelihoods.categorical import Categorical
from vbdl.likelihoods.gaussian import Gaussian
from vbdl.posteriors.ensemble import DeepEnsemble
from vbdl.posteriors.mc_dropout import MCDropout
from vbdl.posteriors.mean_field import MeanField
from vbdl.training.fit import fit

ROUNDING = {"rtol": 0.0, "atol": 1e-5}  # float32 sums of a few dozen terms of order 1


def network(outputs=5):
    return nn.Sequential(nn.Linear(3, 11), nn.BatchNorm1d(11), nn.ReLU(), nn.Linear(11, outputs))


def trained_looking(net):
    net[1].running_mean.normal_()
    net[1].running_var.uniform_(0.5, 2)
    return net.eval()


def predict(q, likelihood=None, **settings):
    return Predictor(q, likelihood or Categorical(), compile=False, **settings)


def test_fresh_members_are_reproducible_distinct_and_their_own():
    net = network()
    generator = torch.get_rng_state()
    one = DeepEnsemble(net, 3, seed=7)
    assert torch.equal(torch.get_rng_state(), generator), "torch's generator was drawn from"
    torch.manual_seed(99)
    two = DeepEnsemble(net, 5, seed=7)
    for name, t in one.stacked().items():
        assert torch.equal(t, two.stacked()[name][:3]), name
    weights = one.stacked()["0.weight"]
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], net[0].weight)
    other = DeepEnsemble(net, 3, seed=8).stacked()["0.weight"]
    assert torch.equal(other[0], weights[1]), "member m is initialized under seed + m"


def test_a_module_without_its_own_initialization_is_refused_or_given_one():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return x * self.scale

    with pytest.raises(ValueError, match="module '1'.*Scaled.*initialize="):
        DeepEnsemble(nn.Sequential(nn.Linear(3, 3), Scaled()), 3)
    q = DeepEnsemble(Scaled(), 3, initialize=lambda m: nn.init.normal_(m.scale))
    assert len(torch.unique(q.stacked()["scale"])) == 9


def test_what_is_frozen_is_the_same_in_every_member():
    class Backbone(nn.Sequential):
        def reset_parameters(self):  # reaches into a layer that is frozen
            self[3].reset_parameters()

    net = Backbone(*trained_looking(network()))
    for layer in (net[1], net[3]):
        layer.requires_grad_(False)
    q = DeepEnsemble(net, 3)
    for name in ("1.weight", "1.running_mean", "1.running_var", "3.weight", "3.bias"):
        assert all(torch.equal(q.member(m)[name], net.state_dict()[name]) for m in range(3)), name
    assert set(q.shared()) == {n for n in net.state_dict() if n[0] in "13"}
    assert len(torch.unique(q.stacked()["0.weight"])) == 3 * 33
    with pytest.raises(ValueError, match="every parameter is frozen"):
        DeepEnsemble(network().requires_grad_(False), 3)


def test_trained_members_predict_as_they_do_themselves():
    members, x = [trained_looking(network()) for _ in range(3)], torch.randn(7, 3)
    p = predict(DeepEnsemble(members))(x, samples=True)
    with torch.no_grad():
        expected = torch.stack([m(x) for m in members])
    torch.testing.assert_close(p.samples, expected, **ROUNDING)
    torch.testing.assert_close(p.probs, expected.softmax(-1).mean(0), **ROUNDING)


def test_buffers_are_stacked():
    members = [trained_looking(network()) for _ in range(3)]
    state = DeepEnsemble(members).stacked()
    assert torch.equal(state["1.running_mean"], torch.stack([m[1].running_mean for m in members]))
    assert state["1.num_batches_tracked"].shape == (3,)


def test_a_single_member_is_the_network():
    net, x = trained_looking(network()), torch.randn(7, 3)
    p = predict(DeepEnsemble([net]))(x)
    torch.testing.assert_close(p.probs, net(x).softmax(-1).detach(), **ROUNDING)
    assert float(p.epistemic.max()) < 1e-6


def test_members_load_back():
    members = [trained_looking(network()) for _ in range(3)]
    q = DeepEnsemble([members[0], nn.Sequential(nn.Linear(3, 5)), members[1]])
    copy = network().eval()
    copy.load_state_dict(q.member(2))
    x = torch.randn(7, 3)
    assert torch.equal(copy(x), members[1](x))
    with pytest.raises(IndexError, match="member 3 of 3"):
        q.member(3)


def test_networks_of_different_architectures_are_one_ensemble():
    members = [trained_looking(network()), nn.Linear(3, 5), nn.Linear(3, 5), trained_looking(network())]
    x, q = torch.randn(7, 3), DeepEnsemble(members)
    assert [part.n_members for part in q.parts] == [1, 2, 1]
    p = predict(q)(x, samples=True)
    with torch.no_grad():
        expected = torch.stack([m(x) for m in members])
    torch.testing.assert_close(p.samples, expected, **ROUNDING)
    torch.testing.assert_close(p.probs, expected.softmax(-1).mean(0), **ROUNDING)
    few = predict(q, n_samples=2)(x)
    torch.testing.assert_close(few.probs, expected[:2].softmax(-1).mean(0), **ROUNDING)


def test_settings_that_no_tensor_shows_make_another_architecture():
    """Attention says nothing of its heads or its dropout; a custom module nothing at all."""
    members = [nn.TransformerEncoderLayer(6, heads, 11, batch_first=True).eval() for heads in (2, 3)]
    x = torch.randn(7, 5, 6)
    p = predict(DeepEnsemble(members))(x, samples=True)
    with torch.no_grad():
        torch.testing.assert_close(p.samples, torch.stack([m(x) for m in members]), **ROUNDING)


def test_members_with_different_outputs_are_refused():
    q = DeepEnsemble([nn.Linear(3, 5), nn.Linear(3, 1), nn.Linear(3, 5)])
    with pytest.raises(ValueError, match="members return different shapes"):
        predict(q)(torch.randn(7, 3))


@pytest.mark.parametrize(
    "wrap", [lambda n: MCDropout(nn.Sequential(n, nn.Dropout(0.3))), lambda n: MeanField(n, 101)], ids=["drop", "mean"]
)
def test_posteriors_of_different_architectures_are_refused(wrap):
    with pytest.raises(ValueError, match="different architectures"):
        DeepEnsemble([wrap(nn.Linear(3, 5)), wrap(nn.Linear(3, 5, bias=False))])


def test_members_dropped_at_other_rates_are_not_the_same():
    with pytest.raises(ValueError, match="different architectures"):
        DeepEnsemble([MCDropout(nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.3)), p=p) for p in (0.1, 0.5)])


def test_an_ensemble_needs_members():
    with pytest.raises(ValueError, match="empty list"):
        DeepEnsemble([])
    for n in (0, -1, None):
        with pytest.raises(ValueError, match="n_members of at least 1"):
            DeepEnsemble(network(), n)
    with pytest.raises(ValueError, match="n_members is 2 but 3"):
        DeepEnsemble([network() for _ in range(3)], 2)
    with pytest.raises(ValueError, match="members cannot differ"):
        DeepEnsemble(nn.ReLU(), 2)


def test_tied_weights_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.a(x) + self.b(x)

    members, x = [Tied() for _ in range(3)], torch.randn(7, 5)
    q = DeepEnsemble(members)
    assert list(q.stacked()) == ["a.weight"]
    p = predict(q)(x, samples=True)
    torch.testing.assert_close(p.samples, torch.stack([m(x) for m in members]).detach(), **ROUNDING)


@pytest.mark.parametrize("name", ["values", "keys", "pop", "steps", "module", "training_", "stacked"])
def test_a_parameter_or_buffer_may_have_any_name(name):
    class Named(nn.Module):
        def __init__(self, buffer):
            super().__init__()
            value = torch.randn(3)
            self.register_buffer(name, value) if buffer else self.register_parameter(name, nn.Parameter(value))
            self.linear = nn.Linear(3, 5)

        def forward(self, x):
            return self.linear(x * getattr(self, name))

    x = torch.randn(7, 3)
    for buffer in (True, False):
        members = [Named(buffer) for _ in range(3)]
        p = predict(DeepEnsemble(members))(x, samples=True)
        torch.testing.assert_close(p.samples, torch.stack([m(x) for m in members]).detach(), **ROUNDING)
        MeanField(members[0], 101).loss(x, torch.randn(7, 5), Gaussian(5)).backward()


def test_the_gradient_of_the_loss_is_each_members_own():
    """And batch normalization in training moves each member's own statistics."""
    members = [network() for _ in range(3)]
    q, x, y = DeepEnsemble(members), torch.randn(13, 3), torch.randint(5, (13,))
    q.train()
    q.loss(x, y, Categorical()).backward()
    for index, member in enumerate(members):
        member.train()
        nn.functional.cross_entropy(member(x), y).backward()
        for name, p in member.named_parameters():
            stacked = q.stacked()[name]
            torch.testing.assert_close(stacked.grad[index], p.grad, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(q.stacked()["1.running_mean"][index], member[1].running_mean, **ROUNDING)
        assert int(q.stacked()["1.num_batches_tracked"][index]) == 1


def test_buffers_that_no_state_dict_has_are_kept():
    """Position numbers and the like, registered with persistent=False, are needed where the base looks at a batch."""

    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.drop = nn.Embedding(7, 5), nn.Dropout(0.3)
            self.register_buffer("positions", torch.arange(7), persistent=False)

        def forward(self, x):
            return self.drop(self.embed(self.positions).sum(0) + 0 * x)

    members = [MCDropout(Positions()) for _ in range(3)]
    p = predict(DeepEnsemble(members), Gaussian(5), n_samples=11)(torch.randn(2, 5))
    assert bool((p.epistemic > 0).any())


def frozen_backbone() -> nn.Module:
    backbone = nn.Sequential(nn.Linear(8, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.Dropout(0.1))
    net = nn.Sequential(trained_looking(backbone).requires_grad_(False), nn.Linear(64, 2))
    return net


def test_a_frozen_backbone_is_held_once_and_computed_once():
    q = DeepEnsemble(frozen_backbone(), 10)
    held = sum(t.numel() for t in q.state_dict().values())
    one = sum(t.numel() for t in frozen_backbone().state_dict().values())
    assert held < 1.3 * one, (held, one)
    p, x = predict(q), torch.randn(6, 8)
    right = []
    for m in range(10):
        member = frozen_backbone().eval()
        member.load_state_dict(q.member(m))
        right.append(member(x))
    torch.testing.assert_close(p(x, samples=True).samples, torch.stack(right).detach(), **ROUNDING)
    (execution,) = p.executions.of(next(p.tiles_of(p.check(x))))
    regions = execution.chunking(10).cut.regions
    assert regions[PREFIX].flops() > 5 * regions[BODY].flops() / 10


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_is_held_once_follows_a_change_of_dtype_a_copy_and_a_pickle(dtype):
    q = DeepEnsemble(frozen_backbone(), 3).to(dtype)
    x = torch.randn(6, 8, dtype=dtype)
    right = predict(q)(x).mean
    assert right.dtype == dtype
    for other in (copy.deepcopy(q), pickle.loads(pickle.dumps(q))):
        with torch.no_grad():  # what the copy is called with is what it holds
            for t in other.shared().values():
                t.zero_()
        assert not torch.allclose(predict(other)(x).mean, right)
        torch.testing.assert_close(predict(q)(x).mean, right)


@pytest.mark.parametrize("compile", [False, True])
def test_training_leaves_a_frozen_backbone_as_it_is(compile, traced_only):
    net = frozen_backbone()
    before = {n: t.clone() for n, t in net.state_dict().items() if n.startswith("0.")}
    data = torch.randn(64, 8) * 3 + 1, torch.arange(64) % 2
    for q in (DeepEnsemble(net, 3), MCDropout(net), MeanField(net, 64), DeepEnsemble(MCDropout(net), 2)):
        fit(q, data, Categorical(), epochs=2, compile=compile, progress=False)
        state = q.member(1) if isinstance(q, DeepEnsemble) else q.module.state_dict()
        for name, t in before.items():
            assert torch.equal(state.get(name, state.get(f"inner.{name}")), t), (type(q).__name__, name)


def test_a_bias_before_batch_normalization_does_not_stop_mapping():
    """Its gradient is zero but for rounding, in which a loop and vmap may differ by all of it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3))
    q, rows = DeepEnsemble(net, 3), (torch.randn(16, 2, 5, 5), torch.randint(3, (16,)))
    history = fit(q, rows, Categorical(), epochs=1, compile=False)
    assert history.one_by_one == "" and q.one_by_one == ""


def test_an_ensemble_of_several_architectures_has_no_entries_of_members_itself():
    q = DeepEnsemble([nn.Linear(3, 2), nn.Sequential(nn.Linear(3, 2))])
    assert q.by_member == frozenset() and all(part.by_member for part in q.parts)
