"""Whole networks by moments: exact where it is, near sampling elsewhere, refused by name where it cannot be."""

import pytest
import torch
from torch import nn

import vbdl
from vbdl.calling.inputs import flatten
from vbdl.calling.stacking import call
from vbdl.engine.moments import MomentExecution
from vbdl.engine.predictor import Predictor
from vbdl.engine.settings import PredictorSettings
from vbdl.model import Model

SETTINGS = PredictorSettings(
    n_samples=32,
    seed=0,
    tiles=(64,),
    compile=False,
    memory_budget=2**30,
    chunk_size=None,
    autocast=None,
    joint=True,
    estimator="moments",
)


class Convolutional(nn.Module):
    """Everything a rule is written for, in one network."""

    def __init__(self):
        super().__init__()
        self.a, self.norm_a = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.b, self.norm_b = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.channels, self.units = nn.Dropout2d(0.1), nn.Dropout(0.2)
        self.norm, self.hidden, self.head = nn.LayerNorm(24), nn.Linear(24, 32), nn.Linear(32, 3)

    def forward(self, x):
        x = self.channels(self.norm_a(self.a(x)).relu())
        x = torch.max_pool2d((self.norm_b(self.b(x)) + x).relu(), 2)
        x = nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)
        x = self.units(torch.tanh(self.norm(x)))
        return self.head(self.units(nn.functional.gelu(self.hidden(x))))


def mlp(activation=nn.ReLU, outputs=3):
    return nn.Sequential(
        nn.Linear(5, 64), activation(), nn.Dropout(0.3), nn.Linear(64, 64), activation(), nn.Dropout(0.3),
        nn.Linear(64, outputs),
    )  # fmt: skip


def moments(q, x, likelihood=None):
    likelihood = likelihood or vbdl.Categorical()
    return MomentExecution(Model(q.eval(), likelihood.eval()), flatten(x), SETTINGS, 32).moments(flatten(x))


def drawn(q, x, n):
    """(samples, batch, outputs) of draws of a seed, 500 at a time."""
    q.prepare(x)
    found = []
    with torch.no_grad():
        for start in range(0, n, 500):
            state = q.draws(torch.arange(start, start + 500), 1)
            one = lambda s: call(q.module, s, x)
            found.append(torch.func.vmap(one)(state))
    return torch.cat(found)


@pytest.mark.parametrize("q", ["dropout", "mean-field"])
def test_a_linear_network_is_exact(q):
    """One random layer: means and variances are sums that can be written down."""
    x = torch.randn(7, 5)
    if q == "dropout":
        net = nn.Sequential(nn.Linear(5, 11), nn.Dropout(0.3), nn.Linear(11, 3))
        mean, var = moments(vbdl.MCDropout(net), x)
        hidden = net[0](x)
        expected = (hidden**2 @ (net[2].weight ** 2).T) * 0.3 / 0.7
        torch.testing.assert_close(mean, net[2](hidden).detach(), rtol=1e-5, atol=1e-5)
    else:
        net = nn.Linear(5, 3)
        mean, var = moments(vbdl.MeanField(net, n_data=10, initial_std=0.2), x)
        expected = 0.04 * ((x**2).sum(1, keepdim=True) + 1).expand(7, 3)
        torch.testing.assert_close(mean, net(x).detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(var, expected.detach(), rtol=1e-5, atol=1e-6)


def test_a_linear_network_agrees_with_sampling_to_the_error_of_sampling():
    q, x, n = (
        vbdl.MCDropout(nn.Sequential(nn.Linear(5, 40), nn.Dropout(0.3), nn.Linear(40, 3))).eval(),
        torch.randn(7, 5),
        20_000,
    )
    mean, var = moments(q, x)
    samples = drawn(q, x, n)
    z = (mean - samples.mean(0)) / (var / n).sqrt()
    assert float(z.abs().max()) < 4.5  # 21 of them
    assert float((var / samples.var(0) - 1).abs().max()) < 5 * (2 / n) ** 0.5


NETWORKS = {
    "dropout, relu": lambda: vbdl.MCDropout(mlp()),
    "dropout, tanh": lambda: vbdl.MCDropout(mlp(nn.Tanh)),
    "dropout, gelu": lambda: vbdl.MCDropout(mlp(nn.GELU)),
    "mean-field, relu": lambda: vbdl.MeanField(mlp(), n_data=10, initial_std=0.1),
    "mean-field, silu": lambda: vbdl.MeanField(mlp(nn.SiLU), n_data=10, initial_std=0.1),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_near_sampling(name):
    """Two random hidden layers: units of the second share those of the first, which is left out."""
    q, x = NETWORKS[name]().eval(), torch.randn(7, 5)
    mean, var = moments(q, x)
    samples = drawn(q, x, 4000)
    std = samples.std(0)
    assert float(((mean - samples.mean(0)) / std).abs().max()) < 0.1
    wrong = (var.sqrt() / std).log().abs()
    assert float(wrong.mean()) < 0.12 and float(wrong.max()) < 0.3


def test_a_convolutional_network_is_near_sampling():
    """Dropped channels, a branch that meets its trunk again, maxima: all taken to be independent."""
    q, x = vbdl.MCDropout(Convolutional()).eval(), torch.randn(3, 2, 8, 8)
    mean, var = moments(q, x)
    samples = drawn(q, x, 2000)
    off = ((mean - samples.mean(0)) / samples.std(0)).abs()
    wrong = (var.sqrt() / samples.std(0)).log().abs()
    assert float(off.mean()) < 0.15 and float(off.max()) < 0.4
    assert float(wrong.mean()) < 0.2 and float(wrong.max()) < 0.4


def test_the_prediction_is_of_the_likelihoods_kind():
    q, x = vbdl.MCDropout(mlp()), torch.randn(70, 5)
    settings = dict(n_samples=2000, compile=False)
    found = Predictor(q, vbdl.Categorical(), estimator="moments", **settings)(x)
    sampled = Predictor(q, vbdl.Categorical(), **settings)(x)
    assert type(found) is type(sampled) and found.n_samples == 0
    assert bool(found.standard_error.isnan().all())
    torch.testing.assert_close(found.total, found.aleatoric + found.epistemic, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.probs, sampled.probs, rtol=0, atol=0.01)
    torch.testing.assert_close(found.epistemic, sampled.epistemic, rtol=0.3, atol=1e-3)


@pytest.mark.parametrize("likelihood", [vbdl.Gaussian(2), vbdl.HeteroscedasticGaussian(), vbdl.Bernoulli()])
def test_other_likelihoods(likelihood):
    q, x = vbdl.MCDropout(mlp(outputs=2)), torch.randn(13, 5)
    found = Predictor(q, likelihood, 2000, compile=False, estimator="moments")(x)
    sampled = Predictor(q, likelihood, 2000, compile=False)(x)
    error = 5 * sampled.standard_error + 0.1 * sampled.epistemic.sqrt()
    assert bool(((found.mean - sampled.mean).abs() < error).all())
    torch.testing.assert_close(found.epistemic, sampled.epistemic, rtol=0.35, atol=1e-3)


def test_a_row_does_not_depend_on_its_batch():
    predict = Predictor(vbdl.MCDropout(mlp()), vbdl.Categorical(), compile=False, estimator="moments")
    x = torch.randn(70, 5)
    torch.testing.assert_close(predict(x[3:9]).probs, predict(x).probs[3:9], rtol=0, atol=1e-6)


def test_compiled_is_eager_and_nothing_is_compiled_after_warm_up():
    q, x = (
        vbdl.MeanField(nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 3)), 10, initial_std=0.1),
        torch.randn(13, 5),
    )
    eager = Predictor(q, vbdl.Categorical(), compile=False, estimator="moments")(x)
    predict = Predictor(q, vbdl.Categorical(), estimator="moments").warm_up((13,), example=x)
    with torch.compiler.set_stance("fail_on_recompile"):
        found = predict(x)
    for name in ("probs", "total", "aleatoric", "epistemic"):
        torch.testing.assert_close(getattr(found, name), getattr(eager, name), rtol=1e-4, atol=2e-6)


def test_explain_measures_the_error():
    x = torch.randn(13, 5)
    predict = Predictor(vbdl.MCDropout(mlp()), vbdl.Categorical(), 500, compile=False, estimator="moments")
    said = predict.explain(x)
    assert "AN APPROXIMATION" in said and "500 draws" in said and "probs differs by" in said
    assert predict.replace(estimator="sampling")(x).n_samples == 500
    assert predict.replace(seed=1).estimator == "moments"


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.drop, self.head = nn.Linear(5, 8), nn.Dropout(0.1), nn.Linear(8, 3)

    def forward(self, x):
        h = self.drop(self.embed(x))
        return self.head(torch.softmax(h, -1))


@pytest.mark.parametrize(
    "q, message",
    [
        (lambda: vbdl.DeepEnsemble(mlp(), 3), "An ensemble has few members"),
        (lambda: vbdl.MCDropout(Attention()), "no rule for aten._softmax"),
        (
            lambda: vbdl.MCDropout(nn.Sequential(nn.Linear(5, 8), nn.SELU(), nn.AlphaDropout(0.2), nn.Linear(8, 3))),
            "enters the result in two places",
        ),
    ],
)
def test_what_cannot_be_followed_is_refused_with_the_reason(q, message):
    with pytest.raises(ValueError, match=message):
        Predictor(q(), vbdl.Categorical(), compile=False, estimator="moments")(torch.randn(3, 5))


def test_draws_are_refused():
    predict = Predictor(vbdl.MCDropout(mlp()), vbdl.Categorical(), compile=False, estimator="moments")
    x = torch.randn(3, 5)
    with pytest.raises(ValueError, match="draws nothing"):
        predict(x, samples=True)
    with pytest.raises(ValueError, match="draws nothing"):
        predict.log_prob(x, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="predicts by sampling"):
        predict.save("unused")
    with pytest.raises(ValueError, match="estimator must be"):
        predict.replace(estimator="moment")
    with pytest.raises(ValueError, match="leave out autocast"):
        predict.replace(autocast=torch.bfloat16)(x)


def test_the_gradient_is_that_of_finite_differences():
    predict = Predictor(vbdl.MCDropout(mlp().double()), vbdl.Categorical(), compile=False, estimator="moments")
    x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: predict(x).probs, x, fast_mode=True, atol=1e-4)
