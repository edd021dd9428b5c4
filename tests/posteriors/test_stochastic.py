"""Networks that draw by themselves: their draws are a loop over the network, their moments those of its own passes.

Errors of moments are in standard errors of the reference: 5 of them for hundreds of comparisons at once.
"""

import importlib.util
import inspect
import itertools
import math
import random
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Normal
from torch.overrides import _get_current_function_mode_stack

import vbdl
from vbdl.engine.traced import Traced
from vbdl.nn.noise import Noise
from vbdl.nn.objective import training_keys
from vbdl.nn.random_calls import CounterNoise
from vbdl.posteriors.stochastic import Stochastic

BATCH, FEATURES, HIDDEN, CLASSES = 13, 20, 16, 5


@vbdl.register
class Textbook(nn.Linear):
    """A layer with a std for each weight."""

    def __init__(self, inputs: int = FEATURES, outputs: int = CLASSES):
        super().__init__(inputs, outputs)
        self.rho = nn.Parameter(torch.full((outputs, inputs), -2.0))

    def forward(self, x):
        return F.linear(x, self.weight + torch.exp(self.rho / 2) * torch.randn_like(self.weight), self.bias)

    def kl(self) -> Tensor:
        return 0.5 * (self.rho.exp() + self.weight**2 - 1 - self.rho).sum()

    def config(self):
        return {"inputs": self.in_features, "outputs": self.out_features}


class Base(Textbook):
    """A layer with a buffer for noise, and a tensor for noise that is no buffer."""

    def __init__(self, inputs: int = FEATURES, outputs: int = CLASSES):
        super().__init__(inputs, outputs)
        self.register_buffer("eps", torch.zeros(outputs, inputs))
        self.scratch = torch.zeros(outputs, inputs)


def of_weight(weight: Callable[[Base], Tensor]) -> type[Base]:
    """A layer with this weight."""

    class Layer(Base):
        def forward(self, x):
            return F.linear(x, weight(self), self.bias)

    return Layer


def of_outputs(forward: Callable[[Base, Tensor], Tensor]) -> type[Base]:
    class Layer(Base):
        def forward(self, x):
            return forward(self, x)

    return Layer


def in_buffer(layer: Base) -> Tensor:
    """As blitz does."""
    layer.eps.data.normal_()
    return layer.weight + torch.log1p(torch.exp(layer.rho)) * layer.eps


def in_attribute(layer: Base) -> Tensor:
    layer.scratch.normal_()
    return layer.weight + layer.rho.exp() * layer.scratch


def noisy_linear(layer: Base) -> Tensor:
    """As in NoisyNet (Fortunato et al., 2018): noise of rank one, kept in a buffer."""
    scaled = lambda n: (e := torch.randn(n)).sign().mul_(e.abs().sqrt_())
    layer.eps.copy_(torch.outer(scaled(layer.out_features), scaled(layer.in_features)))
    return layer.weight + layer.rho.exp() * layer.eps


def flipout(layer: Base, x: Tensor) -> Tensor:
    """Wen et al., 2018, as bayesian-torch has it."""
    delta, outputs = layer.rho.exp() * torch.randn_like(layer.rho), F.linear(x, layer.weight, layer.bias)
    sign_in, sign_out = x.clone().uniform_(-1, 1).sign(), outputs.clone().uniform_(-1, 1).sign()
    return outputs + F.linear(x * sign_in, delta) * sign_out


# layers whose weight is mean + std * normal, written in every way
NORMAL = {
    "textbook": Textbook,
    "swapped": of_weight(lambda s: torch.randn(s.weight.shape) * F.softplus(s.rho) + s.weight),
    "addcmul": of_weight(lambda s: torch.addcmul(s.weight, s.rho.exp(), torch.randn_like(s.rho))),
    "rsample": of_weight(lambda s: Normal(s.weight, s.rho.exp()).rsample()),
    "a number": of_weight(lambda s: s.weight + 0.1 * torch.randn_like(s.weight)),
    "std of a row": of_weight(lambda s: s.weight + s.rho[:, :1].exp() * torch.randn_like(s.weight)),
    "in place": of_weight(lambda s: torch.randn_like(s.weight).mul_(s.rho.exp()).add_(s.weight)),
    "buffer": of_weight(in_buffer),
    "returned from a buffer": of_weight(lambda s: s.weight + torch.log1p(torch.exp(s.rho)) * s.eps.data.normal_()),
    "attribute": of_weight(in_attribute),
    "abs": of_weight(lambda s: s.weight + (0.1 * s.rho).abs() * torch.normal(0.0, 1.0, s.rho.shape)),
}
OTHER = {
    "outputs": of_outputs(
        lambda s, x: F.linear(x, s.weight, s.bias) + (x**2 @ s.rho.exp().T).sqrt() * torch.randn(len(x), s.out_features)
    ),
    "NoisyLinear": of_weight(noisy_linear),
    "flipout": of_outputs(flipout),
    "dropconnect": of_weight(lambda s: s.weight * torch.bernoulli(torch.full_like(s.weight, 0.7))),
    "drop_path": of_outputs(
        lambda s, x: F.linear(x, s.weight, s.bias) * x.new_empty(len(x), 1).bernoulli_(0.5).div_(0.5)
    ),
    "uniform": of_weight(lambda s: s.weight * (0.5 + torch.rand_like(s.weight))),
}
LAYERS = NORMAL | OTHER


def network(layer: type[nn.Module] = Textbook) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(layer(FEATURES, HIDDEN), nn.ReLU(), layer(HIDDEN, CLASSES))


def rows(n: int = BATCH) -> Tensor:
    return torch.randn(n, FEATURES, generator=torch.Generator().manual_seed(1))


def predictor(q, n_samples: int = 7, **settings) -> vbdl.Predictor:
    return vbdl.Predictor(q, vbdl.Categorical(), n_samples=n_samples, compile=False, **settings)


def loop(predict: vbdl.Predictor, x: Tensor) -> Tensor:
    """(samples, batch, classes), one pass of the network after the other."""
    outputs = []
    for number in range(predict.n_samples):
        with predict.posterior.draw(number, predict.seed) as net, torch.no_grad():
            outputs.append(net(x))
    return torch.stack(outputs)


def assert_moments(predict: vbdl.Predictor, passes: Callable[[], Tensor], x: Tensor, n: int) -> None:
    """The mean and the std of a predictor's probabilities are those of n passes of the plain network."""
    with torch.no_grad():
        reference = torch.stack([passes() for _ in range(n)]).double()
    drawn = predict(x, samples=True).samples.softmax(-1).double()
    apart = (drawn.mean(0) - reference.mean(0)).abs()
    error = (reference.var(0) / n + drawn.var(0) / len(drawn)).sqrt()
    assert bool((apart <= 5 * error + 1e-6).all()), float((apart / error).max())
    # the variance of a variance is at most its fourth moment over n
    moment = lambda t: ((t - t.mean(0)) ** 4).mean(0) - t.var(0) ** 2
    apart = (drawn.var(0) - reference.var(0)).abs()
    error = (moment(reference).clamp_min(0) / n + moment(drawn).clamp_min(0) / len(drawn)).sqrt()
    assert bool((apart <= 5 * error + 1e-6).all()), float((apart / error).max())


# -- draws


@pytest.mark.parametrize("layer", LAYERS)
def test_draws_are_a_loop_over_the_network(layer):
    x, predict = rows(), predictor(Stochastic(network(LAYERS[layer])), joint=True)
    drawn = predict(x, samples=True).samples
    torch.testing.assert_close(drawn, loop(predict, x), rtol=1e-4, atol=1e-4)
    assert bool((drawn.std(0) > 1e-4).all())


@pytest.mark.parametrize("layer", NORMAL)
def test_mean_and_std_are_found_however_the_sum_is_written(layer):
    """So that such a layer draws its outputs, like one of MeanField."""
    predict = predictor(Stochastic(network(NORMAL[layer])))
    predict(rows())
    assert "2 mean-field layers draw their outputs" in predict.explain()


def test_a_layer_of_noise_alone_draws_its_outputs():
    """Flipout's second product: its weight is std * noise, and its signs are factors of the input and the output."""
    predict = predictor(Stochastic(network(OTHER["flipout"])))
    predict(rows())
    assert "2 mean-field layers draw their outputs" in predict.explain()


@pytest.mark.parametrize("layer", [name for name in OTHER if name != "flipout"])
def test_other_noise_stays_as_it_is(layer):
    predict = predictor(Stochastic(network(OTHER[layer])))
    predict(rows())
    assert "draw their outputs" not in predict.explain()


@pytest.mark.parametrize("layer", ["textbook", "buffer", "flipout", "drop_path"])
def test_moments_are_those_of_the_networks_own_passes(layer):
    x, net = rows(), network(LAYERS[layer])
    assert_moments(predictor(Stochastic(net), 2000), lambda: net(x).softmax(-1), x, 2000)


def test_weights_are_drawn_as_those_of_mean_field():
    """The same numbers, counters and kernels: a weight is a parameter of MeanField."""
    torch.manual_seed(0)
    plain = nn.Linear(FEATURES, CLASSES)
    layer = Textbook(FEATURES, CLASSES)
    layer.load_state_dict(plain.state_dict(), strict=False)
    q = vbdl.MeanField(plain, n_data=10, initial_std=math.exp(-1), parameters=["weight"])
    x = rows()
    for joint in (True, False):
        a, b = (predictor(p, joint=joint)(x, samples=True).samples for p in (Stochastic(layer), q))
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


class PerRow(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(FEATURES, CLASSES)

    def forward(self, x):
        return self.layer(x + torch.randn_like(x))


def test_rows_share_noise_with_a_batch_axis_or_have_their_own():
    x = rows(1).expand(BATCH, -1).contiguous()
    shared = predictor(Stochastic(PerRow()), 50)(x, samples=True).samples
    assert bool((shared == shared[:, :1]).all())
    each = predictor(Stochastic(PerRow(), per_row=True), 50)(x, samples=True).samples
    assert bool((each[:, 1:] != each[:, :1]).all())
    assert abs(float(torch.corrcoef(torch.stack([each[:, 0, 0], each[:, 1, 0]]))[0, 1])) < 0.6
    q = Stochastic(PerRow(), per_row=True)
    few = predictor(q, 50, tiles=4)(x[:3], samples=True).samples
    many = predictor(q, 50, tiles=64)(x, samples=True).samples
    torch.testing.assert_close(few, many[:, :3])  # a row's noise does not depend on the rows after it


class GaussianNoise(nn.Module):
    def forward(self, x):
        return x + 0.5 * torch.randn_like(x) if self.training else x


def test_noise_of_training_is_drawn_on_request():
    net = nn.Sequential(nn.Linear(FEATURES, HIDDEN), GaussianNoise(), nn.Dropout(0.5), nn.Linear(HIDDEN, CLASSES))
    with pytest.raises(ValueError, match=r"draws nothing in evaluation mode.*noisy=\['1', '2'\]"):
        predictor(Stochastic(net))(rows())
    predict = predictor(Stochastic(net, noisy=[GaussianNoise]), joint=True)
    torch.testing.assert_close(predict(rows(), samples=True).samples, loop(predict, rows()), rtol=0, atol=1e-5)
    assert [call.path for call in predict.posterior.module.calls] == ["1"]
    assert not predict.posterior.module.sites
    with pytest.raises(ValueError, match="noisy names 'noise'"):
        Stochastic(net, noisy=["noise"])


# -- random functions


_LOG_NORMAL = (math.exp(1 / 4) - 1) * math.exp(1 / 4)  # variance of a log-normal number with a std of 1/2

FUNCTIONS = {  # function, mean and variance of its numbers
    "rand": (lambda n: torch.rand(n), 1 / 2, 1 / 12),
    "rand(2, n)": (lambda n: torch.rand(2, n), 1 / 2, 1 / 12),
    "rand_like": (lambda n: torch.rand_like(torch.empty(n)), 1 / 2, 1 / 12),
    "randn, double": (lambda n: torch.randn((n,), dtype=torch.float64), 0, 1),
    "normal of tensors": (lambda n: torch.normal(torch.full((n,), 2.0), torch.full((n,), 3.0)), 2, 9),
    "normal of numbers": (lambda n: torch.normal(2.0, 3.0, (n,)), 2, 9),
    "normal_": (lambda n: torch.empty(n).normal_(2, 3), 2, 9),
    "uniform_": (lambda n: torch.empty(n).uniform_(-1, 3), 1, 16 / 12),
    "exponential_": (lambda n: torch.empty(n).exponential_(2), 1 / 2, 1 / 4),
    "geometric_": (lambda n: torch.empty(n).geometric_(0.25), 4, 12),
    "log_normal_": (
        lambda n: torch.empty(n).log_normal_(0, 0.5),
        math.exp(1 / 8),
        (math.exp(1 / 4) - 1) * math.exp(1 / 4),
    ),
    "cauchy_, cut off": (lambda n: torch.empty(n).cauchy_().clamp(-1, 1), 0, None),
    "bernoulli": (lambda n: torch.bernoulli(torch.full((n,), 0.3)), 0.3, 0.21),
    "bernoulli_": (lambda n: torch.empty(n).bernoulli_(0.3), 0.3, 0.21),
    "randint": (lambda n: torch.randint(2, 6, (n,)), 3.5, 15 / 12),
    "randint to": (lambda n: torch.randint(4, (n,)), 1.5, 15 / 12),
    "randint_like": (lambda n: torch.randint_like(torch.empty(n), 4), 1.5, 15 / 12),
    "random_": (lambda n: torch.empty(n).random_(4), 1.5, 15 / 12),
    "multinomial": (lambda n: torch.multinomial(torch.tensor([1.0, 2.0, 1.0]), n, replacement=True), 1, 1 / 2),
    "Uniform": (lambda n: torch.distributions.Uniform(-1.0, 3.0).rsample((n,)), 1, 16 / 12),
    "Laplace": (lambda n: torch.distributions.Laplace(0.0, 1.0).rsample((n,)), 0, 2),
    "rrelu": (lambda n: F.rrelu(-torch.ones(n), 0.0, 1.0, training=True), -1 / 2, 1 / 12),
    "gumbel_softmax": (lambda n: F.gumbel_softmax(torch.zeros(n, 2), hard=True)[:, 0], 1 / 2, 1 / 4),
}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_random_functions_have_their_distribution(function):
    draw, mean, variance = FUNCTIONS[function]
    generator = torch.get_rng_state()
    with CounterNoise(noise := Noise(torch.tensor([0, 0]), nn.Identity())):
        first = draw(20_000).double().flatten()
        second = draw(20_000).double().flatten()
    with CounterNoise(Noise(torch.tensor([0, 0]), nn.Identity())):
        again = draw(20_000).double().flatten()
    assert torch.equal(first, again) and not torch.equal(first, second) and len(noise.calls) == 2
    assert torch.equal(torch.get_rng_state(), generator), f"{function} drew from torch's generator"
    assert abs(float(first.mean()) - mean) < 5 * float(first.std()) / math.sqrt(len(first))
    if variance is not None:
        fourth = float(((first - first.mean()) ** 4).mean() - first.var() ** 2)
        assert abs(float(first.var()) - variance) < 5 * math.sqrt(max(fourth, 0.0) / len(first)) + 1e-6


# every function that draws in torch.nn.init, and those in Python whose call torch hands to a mode as a whole
INITIALIZATIONS = [
    name
    for name, function in vars(nn.init).items()
    if name.endswith("_") and not name.startswith("_") and "generator" in inspect.signature(function).parameters
]
APPROXIMATIONS = {
    "svd_lowrank": lambda a: torch.svd_lowrank(a, 2, niter=0),
    "pca_lowrank": lambda a: torch.pca_lowrank(a, 2, niter=0),
    "lobpcg": lambda a: torch.lobpcg(a, 1, niter=1),
}
AS_ONE_CALL = {
    **{n: lambda m, n=n: getattr(nn.init, n)(torch.empty(6, 6), *[0.5] * (n == "sparse_")) for n in INITIALIZATIONS},
    **{n: lambda m, f=f: f(m.symmetric)[1] for n, f in APPROXIMATIONS.items()},
}


@pytest.mark.parametrize("function", AS_ONE_CALL)
def test_functions_of_torch_that_draw_inside_are_drawn(function):
    module = nn.Module()
    module.symmetric = nn.Parameter(torch.diag(torch.arange(1.0, 7.0)))

    def draw(count: int) -> Tensor:
        return torch.stack([AS_ONE_CALL[function](module).detach().flatten() for _ in range(count)])

    generator = torch.get_rng_state()
    with CounterNoise(noise := Noise(torch.tensor([0, 0]), nn.Identity())):
        drawn = draw(200)
    with CounterNoise(Noise(torch.tensor([0, 0]), nn.Identity())):
        again = draw(200)
    assert torch.equal(torch.get_rng_state(), generator), f"{function} drew from torch's generator"
    assert torch.equal(drawn, again) and noise.calls and drawn.std() > 0
    torch.manual_seed(1)
    own = draw(200)
    for power in (1, 2):
        a, b = drawn.double() ** power, own.double() ** power
        error = ((a.var(0) + b.var(0)) / len(a)).sqrt()
        assert bool(((a.mean(0) - b.mean(0)).abs() <= 5 * error + 1e-6).all()), f"moment {power} of {function}"


def test_permutations_and_draws_without_replacement_are_whole():
    with CounterNoise(Noise(torch.tensor([0, 0]), nn.Identity())):
        assert torch.equal(torch.randperm(100).sort().values, torch.arange(100))
        chosen = torch.stack([torch.multinomial(torch.tensor([1.0, 1.0, 2.0]), 2) for _ in range(2000)])
    assert bool((chosen[:, 0] != chosen[:, 1]).all())
    assert abs(float((chosen[:, 0] == 2).double().mean()) - 0.5) < 0.06


# -- the first answer


@pytest.mark.parametrize("rows_of_tile", [1, BATCH])
@pytest.mark.parametrize("layer", [*NORMAL, "flipout", "dropconnect", "drop_path", "NoisyLinear", "outputs"])
def test_the_first_answer_is_not_traced_and_is_that_of_the_graph(layer, rows_of_tile, monkeypatch):
    release, probe = threading.Event(), Traced.probe

    def held(self):
        assert release.wait(60)
        return probe(self)

    monkeypatch.setattr(Traced, "probe", held)
    monkeypatch.setattr("vbdl.engine.program.compile_graph", lambda graph, inputs: graph)
    q, x = Stochastic(network(LAYERS[layer])), rows(rows_of_tile)
    predict = vbdl.Predictor(q, vbdl.Categorical(), n_samples=7, compile="background")
    first = predict(x)
    release.set()
    expected = predictor(q, 7)(x)
    predict.wait()
    for field in ("probs", "total", "epistemic", "standard_error"):
        torch.testing.assert_close(getattr(first, field), getattr(expected, field), rtol=1e-4, atol=3e-5)
        torch.testing.assert_close(getattr(predict(x), field), getattr(expected, field), rtol=1e-4, atol=3e-5)
    assert "network as it is" not in predict.explain()


# forms of a parameter that is affine in its noise: f(mean, std, noise)
FORMS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "m + s n": lambda m, s, n: m + s * n,
    "s n": lambda m, s, n: s * n,
    "n": lambda m, s, n: n,
    "2 n": lambda m, s, n: 2.0 * n,
    "m + n": lambda m, s, n: m + n,
    "m - s n": lambda m, s, n: m - s * n,
    "s n - m": lambda m, s, n: s * n - m,
    "-n": lambda m, s, n: -n,
    "m + 2 n": lambda m, s, n: m + 2 * n,
    "m + n / s": lambda m, s, n: m + n / s,
    "m (1 + s n)": lambda m, s, n: m * (1 + s * n),
    "(m + n) / s": lambda m, s, n: (m + n) / s,
    "addcmul": torch.addcmul,
    "addcmul of value": lambda m, s, n: torch.addcmul(m, s, n, value=0.3),
    "add of alpha": lambda m, s, n: torch.add(m, n, alpha=0.2),
    "sub of alpha": lambda m, s, n: torch.sub(m, n, alpha=0.2),
    "lerp": lambda m, s, n: torch.lerp(m, n, 0.3),
    "lerp of weights": lambda m, s, n: torch.lerp(n, m, s),
    "in place": lambda m, s, n: n.mul_(s).add_(m),
    "triangle": lambda m, s, n: m + s * n.view(1, *n.shape).tril()[0] if n.ndim > 1 else m + n.cumsum(0) * 0,
    "exponential": lambda m, s, n: m + (s * n).exp(),
    "square": lambda m, s, n: m + s * n.square(),
}


class OfForms(nn.Linear):
    """A linear layer whose weight and bias are drawn by two of `FORMS`."""

    def __init__(self, weight: str, bias: str | None):
        super().__init__(FEATURES, CLASSES)
        self.std, self.bias_std = (
            nn.Parameter(torch.rand(CLASSES, FEATURES) + 0.1),
            nn.Parameter(torch.rand(CLASSES) + 0.1),
        )
        self.forms = weight, bias

    def forward(self, x):
        weight, bias = self.forms
        drawn = FORMS[weight](self.weight, self.std, torch.randn_like(self.std))
        of_bias = None if bias is None else FORMS[bias](self.bias, self.bias_std, torch.randn_like(self.bias_std))
        return F.linear(x, drawn, of_bias)


@pytest.mark.parametrize("weight, bias", [*((w, None) for w in FORMS), *(("m + s n", b) for b in FORMS), ("s n", "n")])
def test_the_network_as_it_is_and_the_graph_have_the_same_draws(weight, bias):
    q, x = Stochastic(OfForms(weight, bias)), rows(BATCH)
    behind = vbdl.Predictor(q, vbdl.Categorical(), n_samples=7, compile="background")
    first = behind(x, samples=True).samples
    alone = vbdl.Predictor(q, vbdl.Categorical(), n_samples=7, compile=False, tiles=1)
    for predict in (vbdl.Predictor(q, vbdl.Categorical(), n_samples=7, compile=False), behind, alone):
        torch.testing.assert_close(predict(x, samples=True).samples, first, rtol=1e-4, atol=3e-5)


class ConstantInput(nn.Module):
    """A drawn layer of a constant, as that of a recurrent network's first state, and one of the rows."""

    def __init__(self):
        super().__init__()
        self.of_state, self.of_rows = Textbook(4, CLASSES), Textbook()

    def forward(self, x):
        return torch.tanh(self.of_rows(x) + self.of_state(x.new_full((len(x), 4), 0.5)))


@pytest.mark.parametrize("compile", ["background", False])
def test_a_row_has_the_same_draws_alone_where_a_drawn_layer_has_a_constant_input(compile):
    q, x = Stochastic(ConstantInput()), rows(BATCH)
    predict = vbdl.Predictor(q, vbdl.Categorical(), n_samples=7, compile=compile)
    alone = torch.cat([predict(row, samples=True).samples for row in x.split(1)], 1)
    torch.testing.assert_close(alone, predict(x, samples=True).samples, rtol=1e-4, atol=3e-5)


# -- training


def kl(net: nn.Module) -> Tensor:
    return torch.stack([m.kl() for m in net.modules() if isinstance(m, Textbook)]).sum()


def labels(x: Tensor) -> Tensor:
    return x[:, :CLASSES].argmax(-1)


@pytest.mark.parametrize("layer", ["textbook", "buffer"])
def test_gradients_are_those_of_the_networks_own_loss(layer):
    """With the noise of the counters put where torch's generator would be."""
    net, x = network(LAYERS[layer]), rows()
    q = Stochastic(net, kl=kl, n_data=101)
    q.losses(x, labels(x), vbdl.Categorical()).sum().backward()
    own = dict(q.module.inner.named_parameters())
    noise = Noise(training_keys(q.seed, 1, torch.zeros((), dtype=torch.int64))[0], net, training=True)
    with CounterNoise(noise):
        loss = F.cross_entropy(net(x), labels(x)) + kl(net) / 101
    assert [call.shape for call in noise.calls] == [(HIDDEN, FEATURES), (CLASSES, HIDDEN)]
    loss.backward()
    for name, p in net.named_parameters():
        torch.testing.assert_close(own[name].grad, p.grad, rtol=1e-5, atol=1e-7, msg=name)


def test_a_layer_used_twice_draws_twice():
    """Whether its forward reads the noise from its buffer or from what the function returned, drawing or training."""
    losses = []
    for name in ("buffer", "returned from a buffer"):
        torch.manual_seed(0)
        layer = NORMAL[name](FEATURES, FEATURES)
        q = Stochastic(nn.Sequential(layer, nn.Tanh(), layer))
        predict = predictor(q, joint=True)
        torch.testing.assert_close(predict(rows(), samples=True).samples, loop(predict, rows()), rtol=1e-4, atol=1e-4)
        losses.append(q.losses(rows(), labels(rows()), vbdl.Categorical()).detach())
    torch.testing.assert_close(*losses)


def test_compiled_training_is_plain_training_and_resumes(tmp_path):
    x, trained = rows(60), []
    for compile, checkpoint in ((False, None), (True, None), (False, tmp_path / "c")):
        q = Stochastic(network(), kl=kl, n_data=60)
        settings = {"batch_size": 20, "lr": 1e-2, "compile": compile, "progress": False, "kl_warmup": 2}
        if checkpoint is not None:
            vbdl.fit(Stochastic(network(), kl=kl, n_data=60), (x, labels(x)), vbdl.Categorical(), epochs=2,
                     checkpoint=checkpoint, **settings)  # fmt: skip
        vbdl.fit(q, (x, labels(x)), vbdl.Categorical(), epochs=4, checkpoint=checkpoint, **settings)
        assert q.kl_weight == 1.0
        trained.append(q)
    for other in trained[1:]:
        for name, t in trained[0].state_dict().items():
            torch.testing.assert_close(other.state_dict()[name], t, rtol=1e-4, atol=1e-5, msg=name)


def test_without_a_kl_nothing_is_added():
    x, q = rows(), Stochastic(network())
    assert q.kl_weight is None and q.module.regularization(q.module.key) is None
    loss = q.losses(x, labels(x), vbdl.Categorical())
    weighted = Stochastic(network(), kl=kl, n_data=10)
    torch.testing.assert_close(
        weighted.losses(x, labels(x), vbdl.Categorical()) - loss, (kl(network()) / 10).reshape(1), rtol=1e-4, atol=1e-4
    )


def test_an_ensemble_of_them_trains_its_members_together():
    x = rows(60)
    q = vbdl.DeepEnsemble([Stochastic(network(NORMAL["buffer"]), kl=kl, n_data=60, seed=s) for s in range(3)])
    vbdl.fit(q, (x, labels(x)), vbdl.Categorical(), epochs=2, compile=False, progress=False)
    assert q.one_by_one == "" and q.kl_weight == 1.0
    one = [q.member(m)["inner.0.weight"] for m in range(3)]
    assert not torch.equal(one[0], one[1])
    assert bool((predictor(q, 6)(x).epistemic > 0).all())


# -- what is refused


class Sometimes(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(FEATURES, CLASSES)

    def forward(self, x):
        if bool((x[:, 0] > 0).any()):
            x = x + torch.randn(FEATURES)
        return self.layer(x + torch.randn(FEATURES))


class OfDraws(nn.Module):
    """A network whose noise decides which of its other random calls are made."""

    def __init__(self, forward: Callable[[nn.Module, Tensor], Tensor]):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.Dropout(0.3)) for _ in range(3)])
        self.last = nn.Linear(FEATURES, CLASSES)
        self.function = forward

    def forward(self, x):
        return self.last(self.function(self, x).tanh())


def layer_drop(m: nn.Module, x: Tensor) -> Tensor:
    for layer in m.layers:
        if torch.rand(()) >= 0.4:
            x = x + layer(x).tanh()
    return x


def noisy_weight_at_times(m: nn.Module, x: Tensor) -> Tensor:
    weight = m.layers[0][0].weight
    if torch.rand(()) < 0.4:
        weight = weight + 0.5 * torch.randn(FEATURES, FEATURES)
    return F.linear(x, weight)


def one_of_two_noises(m: nn.Module, x: Tensor) -> Tensor:
    if torch.rand(()) < 0.4:
        x = x + 0.5 * torch.randn(x.shape)  # of each row
    else:
        x = x + torch.randn(FEATURES, FEATURES).sum(0)  # of a weight
    return x + 0.1 * torch.randn(FEATURES)


def any_order(m: nn.Module, x: Tensor) -> Tensor:
    noisy = [x, m.layers[0][0].weight]
    for which in torch.randperm(2).tolist():
        noisy[which] = noisy[which] + 0.5 * torch.randn_like(noisy[which])
    return F.linear(*noisy)


def as_often_as_drawn(m: nn.Module, x: Tensor) -> Tensor:
    while torch.rand(()) < 0.5:
        x = (x + m.layers[0](x) + 0.2 * torch.randn(FEATURES)).tanh()
    return x


@pytest.mark.parametrize(
    "forward, joint",
    [
        (layer_drop, False),
        (layer_drop, True),
        (noisy_weight_at_times, False),
        (one_of_two_noises, False),
        (any_order, False),
        (as_often_as_drawn, True),
    ],
)
def test_noise_decides_which_calls_are_made(forward, joint):
    """Draws have the moments of the network's own passes, and are the same in other batches and in `draw`."""
    net, x, n = OfDraws(forward), rows(FEATURES), 600  # as many rows as the weight has
    q = Stochastic(net, noisy=["layers"])
    predict = vbdl.Predictor(q, vbdl.Gaussian(CLASSES), n_samples=n, compile=False, joint=joint)
    drawn = predict(x, samples=True).samples[..., 0]
    net.eval()
    net.layers.train()
    torch.manual_seed(1)
    with torch.no_grad():
        own = torch.stack([net(x) for _ in range(4 * n)])
    for power in (1, 2):
        a, b = ((t - own.mean(0) * (power - 1)).pow(power) for t in (drawn, own))
        errors = (b.var(0) * (1 / n + 1 / len(b))).sqrt()
        assert ((a.mean(0) - b.mean(0)).abs() < 5 * errors).all()
    few = vbdl.Predictor(q, vbdl.Gaussian(CLASSES), n_samples=8, compile=False, joint=joint)
    for part in (slice(0, 1), slice(2, 7)):
        torch.testing.assert_close(few(x[part], samples=True).samples[..., 0], drawn[:8, part], rtol=0.0, atol=1e-5)
    for number in range(8):
        with few.posterior.draw(number, few.seed) as network, torch.no_grad():
            torch.testing.assert_close(network(x), drawn[number], rtol=0.0, atol=1e-5)


def refused(forward: Callable[[nn.Module, Tensor], Tensor]) -> nn.Module:
    class Refused(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(FEATURES, CLASSES)

        def forward(self, x):
            return self.layer(forward(self, x))

    return Refused()


def _python(module, x):
    return x + random.random() + torch.randn(FEATURES)


def _the_same_at_times() -> Callable[[nn.Module, Tensor], Tensor]:
    numbers = itertools.chain([0.5, 0.9, 0.9, 0.9, 0.5001], itertools.repeat(0.7))
    return lambda module, x: (x + torch.randn(FEATURES)) * next(numbers)


def _own_generator(module, x):
    return x + torch.randn(FEATURES) + torch.randn(FEATURES, generator=torch.Generator().manual_seed(3))


def _part(module, x):
    noise = torch.zeros(FEATURES)
    noise[:3].normal_()
    return x + noise


@pytest.mark.parametrize(
    "net, message",
    [
        (nn.Linear(FEATURES, CLASSES), "draws nothing in evaluation mode.*MeanField"),
        (Sometimes(), "calls that depend on the rows"),
        (refused(lambda m, x: x.normal_()), "normal_ in the module itself draws into an input in place"),
        (refused(lambda m, x: x + m.layer.bias.data.normal_().sum()), "draws into parameter 'layer.bias' in place"),
        (refused(lambda m, x: x + torch.poisson(torch.ones(FEATURES))), "poisson is called .* torch.randn or"),
        (
            refused(lambda m, x: x + torch.distributions.Gamma(1.0, 1.0).sample((FEATURES,))),
            "_standard_gamma is called",
        ),
        (refused(_python), "another generator than torch's"),
        (refused(_the_same_at_times()), "another generator than torch's"),
        (
            refused(lambda m, x: x + nn.init.kaiming_uniform_(torch.empty(1, FEATURES), generator=torch.Generator())),
            r"kaiming_uniform_\(generator=\) is called",
        ),
        (refused(_own_generator), r"randn\(generator=\) is called .* make it a buffer"),
        (refused(_part), "part or a view of a tensor in place"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_words(net, message):
    x = torch.cat([-rows(2).abs(), rows(BATCH).abs()])
    with pytest.raises((ValueError, NotImplementedError), match=message):
        predictor(Stochastic(net))(x)


def test_training_refuses_it_before_the_first_step():
    q = Stochastic(nn.Linear(FEATURES, CLASSES))
    with pytest.raises(ValueError, match="draws nothing"):
        vbdl.fit(q, (rows(60), labels(rows(60))), vbdl.Categorical(), epochs=1, compile=False, progress=False)
    assert int(q.steps) == 0


@pytest.mark.parametrize(
    "wrap", [lambda n: vbdl.MCDropout(nn.Sequential(n, nn.Dropout(0.1))), lambda n: vbdl.MeanField(n, 10),
             lambda n: vbdl.DeepEnsemble([n, n])],
)  # fmt: skip
def test_other_methods_name_this_one(wrap):
    q = wrap(network())
    with pytest.raises(ValueError, match=r"vbdl\.Stochastic"):
        predictor(q, q.n_draws or 3)(rows())


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="number of training rows"):
        Stochastic(network(), kl=kl)
    with pytest.raises(TypeError, match="kl=lambda net"):
        layer = Textbook()
        Stochastic(layer, kl=layer.kl, n_data=5)
    with pytest.raises(ValueError, match="n_data must be"):
        Stochastic(network(), n_data=0)
    with pytest.raises(TypeError, match="noisy must be a list"):
        Stochastic(network(), noisy="0")
    q = Stochastic(network(), kl=lambda net: 3.0, n_data=5)
    with pytest.raises(TypeError, match="kl must return"):
        q.losses(rows(), labels(rows()), vbdl.Categorical())
    with pytest.raises(RuntimeError, match=r"call prepare\(x\)"), q.draw(0):
        pass


# -- the rest of the library


def test_a_saved_predictor_predicts_the_same(tmp_path):
    predict, x = predictor(Stochastic(network(), kl=kl, n_data=10, noisy=["0"], n_samples=2)), rows()
    predict.save(tmp_path / "model", example=x)
    loaded = vbdl.load(tmp_path / "model")
    assert torch.equal(loaded(x).probs, predict(x).probs)
    assert loaded.posterior.config() == predict.posterior.config() and loaded.posterior.kl_weight is None
    assert "stochastic network" in (tmp_path / "model" / "README.md").read_text().lower()
    ensemble = predictor(vbdl.DeepEnsemble([Stochastic(network(), seed=s) for s in range(2)]), 4)
    ensemble.save(tmp_path / "ensemble", example=x)
    assert torch.equal(vbdl.load(tmp_path / "ensemble")(x).probs, ensemble(x).probs)


def test_inspect_lists_the_random_calls():
    net = nn.Sequential(PerRow().layer, of_outputs(flipout)(CLASSES, CLASSES))
    generator = torch.get_rng_state()
    text = str(vbdl.inspect(net, rows()))
    assert torch.equal(torch.get_rng_state(), generator)
    assert "1 (randn_like): 5x5, one draw for all rows" in text
    assert "1 (uniform_): 1x5, batch on axis 0, shared by the rows of a draw" in text
    assert "plan for Stochastic:" in text and "vbdl.Stochastic(module)" in text


def test_a_network_that_draws_is_recommended_this_method():
    x = rows(60)
    found = vbdl.recommend(network(), (x, labels(x)), budget=0.5)
    assert found.method == "Stochastic"
    with pytest.raises(ValueError, match="'stochastic' is for a network that draws by itself"):
        vbdl.VBDLClassifier(method="stochastic").fit(x.numpy(), labels(x).numpy())


# -- layers of libraries, if installed


def of_bayesian_torch(kind: str) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    models = pytest.importorskip("bayesian_torch.models.dnn_to_bnn")
    net = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))
    names = ("prior_mu", "prior_sigma", "posterior_mu_init", "posterior_rho_init", "moped_enable", "moped_delta")
    models.dnn_to_bnn(net, {**dict(zip(names, (0.0, 1.0, 0.0, -3.0, True, 0.5), strict=True)), "type": kind})
    return net, models.get_kl_loss


def of_blitz() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    layers = pytest.importorskip("blitz.modules")
    losses = pytest.importorskip("blitz.losses")
    make = lambda i, o: layers.BayesianLinear(i, o, posterior_rho_init=-2.0)
    return nn.Sequential(make(FEATURES, HIDDEN), nn.ReLU(), make(HIDDEN, CLASSES)), losses.kl_divergence_from_nn


def of_torchbnn() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    bnn = pytest.importorskip("torchbnn")
    make = lambda i, o: bnn.BayesLinear(0, 0.1, i, o)
    return nn.Sequential(make(FEATURES, HIDDEN), nn.ReLU(), make(HIDDEN, CLASSES)), bnn.BKLLoss(reduction="sum")


def of_torch_uncertainty() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """Its layers alone: the package itself needs Lightning."""
    package = importlib.util.find_spec("torch_uncertainty")
    if package is None or package.origin is None:
        pytest.skip("torch_uncertainty is not installed")
    folder = Path(package.origin).parent / "layers" / "bayesian"
    spec = importlib.util.spec_from_file_location("bayesian_layers", folder / "__init__.py")
    assert spec is not None and spec.loader is not None
    layers = importlib.util.module_from_spec(spec)
    sys.modules["bayesian_layers"] = layers
    spec.loader.exec_module(layers)
    make = lambda i, o: layers.BayesLinear(i, o, sigma_init=-2.0)
    of = lambda net: [m for m in net.modules() if isinstance(m, layers.BayesLinear)]
    kl_of = lambda net: sum(m.log_variational_posterior - m.log_prior for m in of(net))
    return nn.Sequential(make(FEATURES, HIDDEN), nn.ReLU(), make(HIDDEN, CLASSES)), kl_of


LIBRARIES = {
    "bayesian-torch": lambda: of_bayesian_torch("Reparameterization"),
    "bayesian-torch, flipout": lambda: of_bayesian_torch("Flipout"),
    "blitz": of_blitz,
    "torchbnn": of_torchbnn,
    "torch-uncertainty": of_torch_uncertainty,
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("library", LIBRARIES)
def test_layers_of_libraries_predict_and_train(library):
    """Their draws are a loop, mean and std those of 10^4 of their own passes, and fit takes their own KL."""
    torch.manual_seed(0)
    (net, library_kl), x = LIBRARIES[library](), rows()
    predict = predictor(Stochastic(net), joint=True)
    torch.testing.assert_close(predict(x, samples=True).samples, loop(predict, x), rtol=1e-4, atol=1e-4)
    fast = predictor(Stochastic(net), 10_000)
    assert_moments(fast, lambda: net(x).softmax(-1), x, 10_000)
    assert ("2 mean-field layers draw their outputs" in fast.explain()) == ("flipout" not in library)
    x = rows(60)
    for compile in (False, True):
        q = Stochastic(net, kl=library_kl, n_data=60)
        history = vbdl.fit(q, (x, labels(x)), vbdl.Categorical(), epochs=3, compile=compile, progress=False)
        assert all(math.isfinite(loss) for (loss,) in history.train_loss)
        assert bool((predictor(q)(x).epistemic > 0).all())


@vbdl.register
class Uninitialized(Textbook):
    """A layer whose buffer for noise is memory that nobody initialized, like that of blitz's layers."""

    def __init__(self, inputs: int = FEATURES, outputs: int = CLASSES):
        super().__init__(inputs, outputs)
        self.register_buffer("eps", torch.full((outputs, inputs), math.inf))

    def forward(self, x):
        return F.linear(x, self.weight + self.rho.exp() * self.eps.normal_(), self.bias)


def test_noise_in_memory_that_nobody_initialized_is_saved(tmp_path):
    predict, x = (
        vbdl.Predictor(Stochastic(Uninitialized()), vbdl.Categorical(), 7, compile=False),
        torch.randn(3, FEATURES),
    )
    probs = predict(x).probs
    vbdl.save(predict, tmp_path / "model", example=x)
    again = vbdl.load(tmp_path / "model", module=Uninitialized())
    torch.testing.assert_close(again(x).probs, probs)


def test_a_network_runs_inside_of_one_mode_of_torch():
    """Each mode takes longer than a small operation, for every function that the network calls."""
    depths = []

    class Seeing(Textbook):
        def forward(self, x):
            depths.append(len(_get_current_function_mode_stack()))
            return super().forward(x)

    predict = vbdl.Predictor(Stochastic(Seeing()), vbdl.Categorical(), 4, compile="background")
    predict(torch.randn(1, FEATURES))
    assert set(depths) == {1}


def test_a_row_runs_between_two_others_once_before_the_first_answer():
    """The run shows the batch axes of noise, that it may be drawn apart, that rows are apart, and which layers draw."""
    rows = []

    class Seeing(Textbook):
        def forward(self, x):
            rows.append(len(x))
            return super().forward(x)

    predict = vbdl.Predictor(Stochastic(Seeing()), vbdl.Categorical(), 4, compile="background")
    predict(torch.randn(1, FEATURES))
    # a draw, its noise at 0 and at three values, other noise of its layers; then all draws
    assert rows[:9] == [2, 3, 1, 1, 1, 1, 1, 1, 4]


class Hierarchical(nn.Module):
    """A drawn layer computes the scale of another layer's noise, as hypernetworks do."""

    def __init__(self):
        super().__init__()
        self.layer, self.of_scale = nn.Linear(4, 1), nn.Linear(1, 1)
        self.one = nn.Parameter(torch.ones(1, 1))

    def forward(self, x):
        weight = self.of_scale.weight
        scale = F.linear(self.one, weight + 2 * torch.randn_like(weight)).abs()
        weight = self.layer.weight
        return F.linear(x, weight + scale * torch.randn_like(weight), self.layer.bias)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_scale_that_another_drawn_layer_computes_is_drawn_too(rows):
    torch.manual_seed(0)
    net, x = Hierarchical(), torch.ones(rows, 4)
    own = torch.stack([net(x) for _ in range(4096)]).var(0).detach()
    for seed in range(3):
        found = vbdl.Predictor(vbdl.Stochastic(net), vbdl.Gaussian(), 4096, seed=seed, compile=False)(x).epistemic
        torch.testing.assert_close(found, own, rtol=0.2, atol=0)


GATES = {
    "uniform": lambda: 3 * torch.rand(1, 1),
    "bernoulli": lambda: torch.bernoulli(torch.full((1, 1), 0.5)),
    "sign": lambda: 3 * (torch.randn(1, 1) > 0),
    "threshold": lambda: 3 * (torch.randn(1, 1).abs() > 0.3),
    "scalar": lambda: torch.randn(()),
    "normal": lambda: torch.randn(1, 1),
    "each weight": lambda: 3 * (torch.randn(1, 4) > 0),
    "clamped": lambda: torch.randn(1, 1).clamp(0, 1),
}


class Gated(nn.Module):
    """Noise that multiplies the noise of a weight, as in a spike and slab."""

    def __init__(self, gate):
        super().__init__()
        self.layer, self.gate = nn.Linear(4, 1), gate

    def forward(self, x):
        weight = self.layer.weight
        return F.linear(x, weight + self.gate() * torch.randn_like(weight), self.layer.bias)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("gate", GATES)
def test_noise_that_multiplies_the_noise_of_a_weight_is_drawn_too(gate, rows):
    torch.manual_seed(0)
    net, x = Gated(GATES[gate]), torch.ones(rows, 4)
    own = torch.stack([net(x) for _ in range(8192)]).var(0).detach()
    for seed in range(2):
        found = vbdl.Predictor(vbdl.Stochastic(net), vbdl.Gaussian(), 4096, seed=seed, compile=False)(x).epistemic
        torch.testing.assert_close(found, own, rtol=0.2, atol=0)
