"""The KL term in nats, and weights drawn for any module without replacing a layer."""

import math

import pytest
import scipy.integrate
import scipy.stats
import torch
from torch import nn
from torch.distributions import Normal as TorchNormal
from torch.distributions import kl_divergence
from torch.func import functional_call
from vbdl_kernels import make_key

from vbdl.likelihoods.gaussian import Gaussian
from vbdl.nn.objective import Objective
from vbdl.nn.priors import Normal, ScaleMixture
from vbdl.posteriors.mean_field import MeanField


def expected_kl(q, prior_std=1.0):
    """Summed over weights, by torch, in float64."""
    return sum(
        kl_divergence(TorchNormal(mean.double(), log_std.double().exp()), TorchNormal(0.0, prior_std)).sum()
        for _, mean, log_std in q.module.normals()
    )


@pytest.mark.parametrize("prior_std", [0.1, 1.0, 7.0])
@pytest.mark.parametrize("initial_std", [1e-6, 0.05, 3.0])
def test_kl_is_torchs_own(prior_std, initial_std):
    q = MeanField(nn.Sequential(nn.Linear(3, 11), nn.Linear(11, 5)), 101, prior=prior_std, initial_std=initial_std)
    # a float32 sum of 104 terms, and log(prior_std) in float32
    torch.testing.assert_close(q.kl().double(), expected_kl(q, prior_std).detach(), rtol=1e-5, atol=1e-3)


def test_kl_of_the_prior_is_zero():
    q = MeanField(nn.Linear(3, 5), 101, prior=0.5, initial_std=0.5)
    with torch.no_grad():
        q.module.inner.weight.zero_()
        q.module.inner.bias.zero_()
    assert float(q.kl().detach()) == pytest.approx(0.0, abs=1e-5)


def test_kl_adds_over_layers_and_grows_with_the_number_of_weights():
    one, two = nn.Linear(3, 5), nn.Linear(5, 7)
    kl = lambda net: float(MeanField(net, 101).kl().detach())
    assert kl(nn.Sequential(one, two)) == pytest.approx(kl(one) + kl(two), rel=1e-6)
    sizes = [kl(nn.Sequential(*[nn.Linear(n, n, bias=False)])) for n in (5, 10)]
    assert sizes[1] / sizes[0] == pytest.approx(4, rel=0.05)  # means of order 1/sqrt(n) add little to log(1 / 0.05)


def test_kl_of_a_recurrent_network_does_not_grow_with_the_sequence():
    q = MeanField(nn.LSTM(3, 5), 101)
    before = float(q.kl().detach())
    for length in (2, 13):
        q.module(torch.randn(length, 7, 3))
        assert float(q.kl().detach()) == before


@pytest.mark.parametrize("log_std", [120.0, -120.0])
@pytest.mark.parametrize("prior", [1.0, 1e-10, 1e10, ScaleMixture()])
def test_extreme_log_std_stays_finite(log_std, prior):
    q = MeanField(nn.Linear(3, 5), 101, prior=prior)
    with torch.no_grad():
        for p in q.module.log_std.parameters():
            p.fill_(log_std)
    loss = q.loss(torch.randn(7, 3), torch.randn(7, 5), Gaussian(5, std=1e3))
    if prior != 1e-10:  # exp(2 (30 + 23)) is past float32: infinite, and right to be
        assert bool(loss.isfinite())
        loss.backward()
        assert all(bool(p.grad.isfinite().all()) for p in q.parameters() if p.grad is not None)


def test_loss_is_the_nll_plus_kl_over_n_data():
    net, x, y = nn.Linear(3, 5), torch.randn(7, 3), torch.randn(7, 5)
    likelihood = Gaussian(5, std=0.3)
    loss = {}
    for n_data in (10, 1000):
        for weight in (0.0, 0.5, 1.0):
            q = MeanField(net, n_data)
            q.kl_weight = weight
            loss[n_data, weight] = float(q.loss(x, y, likelihood).detach())
    kl = float(MeanField(net, 10).kl().detach())
    for n_data in (10, 1000):
        for weight in (0.5, 1.0):
            assert loss[n_data, weight] - loss[n_data, 0.0] == pytest.approx(weight * kl / n_data, abs=1e-3)


def test_several_draws_a_step_are_averaged():
    """The mean of the losses of draws 0, 1, 2; the next step uses others."""
    net, x, y = nn.Linear(3, 5), torch.randn(7, 3), torch.randn(7, 5)
    three, one = MeanField(net, 101, initial_std=0.5, n_samples=3), MeanField(net, 101, initial_std=0.5)
    alone = [float(one.loss(x, y, Gaussian(5)).detach()) for _ in range(6)]
    assert float(three.loss(x, y, Gaussian(5)).detach()) == pytest.approx(sum(alone[:3]) / 3, rel=1e-5)
    assert float(three.loss(x, y, Gaussian(5)).detach()) == pytest.approx(sum(alone[3:]) / 3, rel=1e-5)
    assert len(set(alone)) == 6


def test_scale_mixture_estimate_is_unbiased():
    """Against numerical integration of q (log q - log p)."""
    mean, std, prior = 0.3, 0.2, ScaleMixture(pi=0.3, wide=1.5, narrow=0.1)
    net = nn.Linear(1, 1, bias=False)
    nn.init.constant_(net.weight, mean)
    q = MeanField(net, 101, prior=prior, initial_std=std)
    log_p = lambda w: math.log(0.3 * scipy.stats.norm.pdf(w, 0, 1.5) + 0.7 * scipy.stats.norm.pdf(w, 0, 0.1))
    density = scipy.stats.norm(mean, std)
    exact = scipy.integrate.quad(lambda w: density.pdf(w) * (density.logpdf(w) - log_p(w)), -2, 3, epsabs=1e-10)[0]
    with torch.no_grad():
        found = torch.stack([q.module.kl(make_key(5, [s])[0]) for s in range(4000)]).double()
    assert float(found.mean()) == pytest.approx(exact, abs=4 * float(found.std()) / math.sqrt(4000))


def test_a_mixture_of_equal_parts_is_a_normal():
    """log q - log p at the same draw, for a mixture that is one normal."""
    mixture = MeanField(nn.Linear(3, 5), 101, prior=ScaleMixture(0.5, 0.7, 0.7))
    key = make_key(0, [3])[0]
    mixture.module.key.copy_(key)
    drawn = mixture.module.weights()
    expected = sum(
        (TorchNormal(m, s.exp()).log_prob(drawn[n]) - TorchNormal(0.0, 0.7).log_prob(drawn[n])).sum()
        for n, m, s in mixture.module.normals()
    )
    torch.testing.assert_close(mixture.kl(), expected, rtol=1e-5, atol=1e-3)


MODULES = {
    "Linear": (nn.Linear(3, 5), (7, 3)),
    "Conv1d": (nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular"), (7, 2, 5)),
    "Conv2d": (nn.Conv2d(4, 6, 3, groups=2, stride=2), (7, 4, 5, 11)),
    "Conv3d": (nn.Conv3d(2, 3, 2, dilation=2), (7, 2, 5, 5, 5)),
    "ConvTranspose1d": (nn.ConvTranspose1d(2, 3, 3), (7, 2, 5)),
    "ConvTranspose2d": (nn.ConvTranspose2d(2, 3, 3, output_padding=1, stride=2), (7, 2, 5, 5)),
    "ConvTranspose3d": (nn.ConvTranspose3d(2, 3, 2), (7, 2, 3, 3, 3)),
    "Embedding": (nn.Embedding(11, 5, padding_idx=0), None),
    "LayerNorm": (nn.LayerNorm(5), (7, 5)),
    "BatchNorm": (nn.BatchNorm1d(5), (7, 5)),
    "GRU": (nn.GRU(3, 5, num_layers=2, bidirectional=True, batch_first=True), (7, 11, 3)),
    "LSTM": (nn.LSTM(3, 5, batch_first=True), (7, 11, 3)),
    "TransformerEncoderLayer": (nn.TransformerEncoderLayer(6, 2, 11, batch_first=True), (7, 5, 6)),
}


@pytest.mark.parametrize("name", MODULES)
def test_any_module_is_itself_at_the_drawn_weights(name):
    module, shape = MODULES[name]
    x = torch.randint(11, (7, 3)) if shape is None else torch.randn(shape)
    q = MeanField(module, 101, initial_std=0.1).eval()
    first = lambda out: out[0] if isinstance(out, tuple) else out
    outputs = []
    with torch.no_grad():
        for s in range(3):
            q.module.key.copy_(make_key(0, [s])[0])
            outputs.append(first(q.module(x)))
            expected = first(functional_call(module.eval(), q.module.weights(), (x,)))
            assert torch.equal(outputs[-1], expected)
    assert not torch.equal(outputs[0], outputs[1])
    assert set(q.module.chosen) == {n for n, _ in module.named_parameters()}


def test_tied_weights_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.a(x) - self.b(x)

    q = MeanField(Tied(), 101, initial_std=1.0)
    assert q.module.chosen == ("a.weight",)
    assert float(q.module(torch.randn(7, 5)).detach().abs().max()) == 0.0


def test_parameters_are_chosen_by_name_or_type():
    net = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Sequential(nn.Linear(5, 7)))
    chosen = lambda *which: MeanField(net, 101, parameters=which).module.chosen
    assert chosen("2") == ("2.0.weight", "2.0.bias")
    assert chosen("0.bias") == ("0.bias",)
    assert chosen(nn.LayerNorm, "2.0.bias") == ("1.weight", "1.bias", "2.0.bias")
    with pytest.raises(ValueError, match="no trainable parameter belongs to 'head'.*0.weight"):
        chosen("head")
    frozen = nn.Sequential(nn.Linear(3, 5).requires_grad_(False), nn.Linear(5, 7))
    assert MeanField(frozen, 101).module.chosen == ("1.weight", "1.bias")
    with pytest.raises(ValueError, match="no trainable"):
        MeanField(nn.Linear(3, 5).requires_grad_(False), 101)


def test_priors_are_given_by_layer_and_saved():
    net = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 7))
    q = MeanField(net, 101, prior={"": 2.0, "1": Normal(0.1), "1.bias": ScaleMixture(0.3, 2.0, 0.2)})
    saved = [q.state_dict()[f"module.prior_{i}"].tolist() for i in range(4)]
    assert saved == [[2.0], [2.0], pytest.approx([0.1]), pytest.approx([0.3, 2.0, 0.2])]
    other = MeanField(net, 101, prior={"": 1.0, "1": Normal(1.0), "1.bias": ScaleMixture()})
    other.load_state_dict(q.state_dict())
    assert float(other.kl().detach()) == float(q.kl().detach())
    with pytest.raises(ValueError, match="prior of 'head' matches no"):
        MeanField(net, 101, prior={"head": 1.0})


def test_the_gradient_of_the_elbo_is_that_of_finite_differences():
    q = MeanField(
        nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)), 101, initial_std=0.3, n_samples=2
    ).double()
    x, y, likelihood = torch.randn(5, 2).double(), torch.randn(5, 1).double(), Gaussian(1, std=0.5).double()
    objective = Objective(q.module, likelihood, 2)
    names = [n for n, _ in objective.named_parameters()]
    values = tuple(p.detach().clone().requires_grad_() for p in objective.parameters())

    def loss(*values):
        return functional_call(objective, dict(zip(names, values, strict=True)), (x, y))

    assert torch.autograd.gradcheck(loss, values, atol=1e-6)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(n_data=0), "n_data"),
        (dict(n_data=5, initial_std=0.0), "initial_std"),
        (dict(n_data=5, initial_std=float("nan")), "initial_std"),
        (dict(n_data=5, n_samples=0), "n_samples"),
        (dict(n_data=5, prior=-1.0), "prior std"),
        (dict(n_data=5, prior=float("inf")), "prior std"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MeanField(nn.Linear(3, 5), **settings)
    with pytest.raises(ValueError, match="0 < pi < 1"):
        ScaleMixture(pi=1.0)
