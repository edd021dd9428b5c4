"""Prediction by MC dropout: dropout is on, and whatever else a module does in training is off."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vbdl
from vbdl.posteriors.ensemble import DeepEnsemble
from vbdl.posteriors.mc_dropout import MCDropout

P = 0.25


class Gate(nn.Module):
    def forward(self, x):
        return x * (x.sigmoid() if self.training else (x > 0).to(x.dtype))


class Noise(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x) if self.training else x


class Running(nn.Module):
    """Statistics of its own, written to or assigned."""

    def __init__(self, assigned):
        super().__init__()
        self.assigned = assigned
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x):
        if not self.training:
            return x - self.mean
        now = x.mean(0).detach()
        if self.assigned:
            self.mean = 0.9 * self.mean + 0.1 * now
        else:
            self.mean.mul_(0.9).add_(0.1 * now)
        return x - now


class DropPath(nn.Module):
    def forward(self, x):
        if not self.training:
            return x
        return x * x.new_empty((x.shape[0], 1)).bernoulli_(0.5) / 0.5


class DropAndMore(nn.Module):
    """One module that drops units and has an auxiliary head in training."""

    def __init__(self, guarded):
        super().__init__()
        self.guarded, self.aux = guarded, nn.Linear(6, 6)

    def forward(self, x):
        if self.guarded:
            if self.training:
                x = F.dropout(x, P)
        else:
            x = F.dropout(x, P, self.training)
        return x + self.aux(x) if self.training else x


class Attention(nn.Module):
    def forward(self, x):
        q = x.view(-1, 1, 3, 2)
        return F.scaled_dot_product_attention(q, q, q, dropout_p=P if self.training else 0.0).flatten(1)


class Nested(nn.Module):
    def forward(self, x):
        if self.training:
            rate = P if self.training else 0.0
            return F.dropout(x, rate, self.training)
        return x


def hooked(hook):
    layer = nn.ReLU()
    layer.register_forward_hook(hook)
    return layer


# what else is in the network -> whether it drops units itself
BESIDE = {
    "gate": (Gate, False),
    "noise": (Noise, False),
    "statistics written to": (lambda: Running(False), False),
    "statistics assigned": (lambda: Running(True), False),
    "drop path": (DropPath, False),
    "dropout and an auxiliary head": (lambda: DropAndMore(False), True),
    "guarded dropout and an auxiliary head": (lambda: DropAndMore(True), True),
    "attention": (Attention, True),
    "nested": (Nested, True),
    "a hook": (lambda: hooked(lambda m, i, o: F.dropout(o, P, m.training)), True),
    "a hook in training": (lambda: hooked(lambda m, i, o: o * 3 if m.training else o), False),
    "a guarded hook": (lambda: hooked(lambda m, i, o: F.dropout(o, P) if m.training else o), True),
}


def network(name):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 6), BESIDE[name][0](), nn.Dropout(P), nn.Linear(6, 2)).eval()


@pytest.mark.parametrize("name", BESIDE)
def test_only_dropout_is_on(name):
    net, x = network(name), torch.randn(5, 6)
    q = MCDropout(net).eval()
    q.prepare(x)
    assert sum(site.p > 0 for site in q.module.sites) == 1 + BESIDE[name][1]
    silent = MCDropout(net, p=1e-9).eval()
    found = vbdl.Predictor(silent, vbdl.Categorical(), n_samples=3, compile=False)(x, samples=True)
    torch.testing.assert_close(found.samples[0], net(x).detach(), rtol=0, atol=1e-5)
    drawn = vbdl.Predictor(q, vbdl.Categorical(), n_samples=16, compile=False)(x, samples=True).samples
    assert len(drawn.unique(dim=0)) > 4


@pytest.mark.parametrize("name", BESIDE)
def test_members_with_dropout_answer_alike(name):
    net, x = network(name), torch.randn(5, 6)
    one = vbdl.Predictor(MCDropout(net), vbdl.Categorical(), n_samples=4, compile=False)(x, samples=True)
    of_two = DeepEnsemble([MCDropout(net), MCDropout(net)])
    both = vbdl.Predictor(of_two, vbdl.Categorical(), n_samples=4, compile=False)(x, samples=True)
    torch.testing.assert_close(both.samples, one.samples, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", BESIDE)
def test_a_training_and_a_state_are_left_as_they_were(name):
    net = network(name)
    classes = [type(m) for m in net.modules()]
    q = MCDropout(net)
    state = {n: t.clone() for n, t in q.state_dict().items()}
    q.eval().prepare(torch.randn(5, 6))
    assert [type(m) for m in q.module.inner.modules()] == classes
    assert all(torch.equal(t, state[n]) for n, t in q.state_dict().items())
    assert not any(key.startswith("_reads") for m in q.modules() for key in vars(m))


def test_one_question_with_two_meanings_is_refused():
    class Both(nn.Module):
        def forward(self, x):
            return F.dropout(x, P) * 3 if self.training else x

    net = nn.Sequential(nn.Linear(6, 6), Both(), nn.Linear(6, 2))
    with pytest.raises(ValueError, match="Both.forward.*reads self.training once"):
        MCDropout(net).eval().prepare(torch.randn(5, 6))
    kept = MCDropout(nn.Sequential(*net, nn.Dropout(P)), deterministic=[Both]).eval()
    kept.prepare(torch.randn(5, 6))
    assert [site.path for site in kept.module.sites] == ["3"]


def test_what_is_off_is_said():
    report = str(vbdl.inspect(network("noise"), torch.randn(5, 6)))
    assert "Noise.forward" in report and "off in prediction" in report
