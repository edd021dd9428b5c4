"""Local reparameterization and flipout: the same expected gradients as one draw for all rows, with less variance."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from vbdl_kernels import make_key

import vbdl
from vbdl.calling.stacking import call
from vbdl.calling.traversing import state_of
from vbdl.nn.drawn import noise
from vbdl.nn.objective import Objective
from vbdl.nn.row_estimators import random_signs
from vbdl.posteriors.mean_field import MeanField

ROWS, FEATURES, CLASSES = 12, 6, 3


class Positions(nn.Module):
    """A linear layer over the positions of a row, (rows, positions, features), with the rows first or second."""

    def __init__(self, axis: int):
        super().__init__()
        self.axis, self.layer, self.head = axis, nn.Linear(2, 4), nn.Linear(4, CLASSES)

    def forward(self, x):
        x = x.view(-1, 3, 2).movedim(0, self.axis)
        return self.head(self.layer(x).tanh().movedim(self.axis, 0).mean(1))


class Folded(Positions):
    """Rows and positions in one axis, which could stand in either order."""

    def forward(self, x):
        return self.head(self.layer(x.reshape(-1, 2)).tanh().view(-1, 3, 4).mean(1))


class Twice(nn.Module):
    """A layer that acts twice."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, CLASSES)

    def forward(self, x):
        return self.head(self.layer(self.layer(x).tanh()).tanh())


class Tied(nn.Module):
    """A table that a layer takes as its weight."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(FEATURES, FEATURES), nn.Linear(FEATURES, CLASSES)

    def forward(self, x):
        return self.head(F.linear(x, self.table.weight) + self.table(x.argmax(1)))


class LastStep(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.LSTM(2, 4, batch_first=True), nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.head(self.layer(x.view(-1, 3, 2))[0][:, -1])


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(2, 4), nn.Linear(4, CLASSES)
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.1, batch_first=True)

    def forward(self, x):
        return self.head(self.layer(self.embed(x.view(-1, 3, 2))).mean(1))


NETWORKS = {
    "dense": lambda: nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES)),
    "conv": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 4, 2), nn.BatchNorm1d(4), nn.Tanh(), nn.Flatten(), nn.Linear(8, CLASSES)
    ),
    "grouped conv2d": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 1, 3)),
        nn.Conv2d(2, 4, (1, 3), padding="same", groups=2, bias=False),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(12, CLASSES),
    ),
    "layers": lambda: nn.Sequential(vbdl.BayesianLinear(FEATURES, 8), nn.Tanh(), vbdl.BayesianLinear(8, CLASSES)),
    "positions": lambda: Positions(0),
    "positions first": lambda: Positions(1),
    "folded": lambda: Folded(0),
    "twice": Twice,
    "tied": Tied,
    "lstm": LastStep,
    "transformer": Transformer,
}


def make(network: str, estimator: str, initial_std: float = 0.3, **arguments) -> MeanField:
    torch.manual_seed(0)
    net = NETWORKS[network]()
    if network == "layers":
        return MeanField(net, ROWS, estimator=estimator, **arguments)
    return MeanField(net, ROWS, initial_std=initial_std, estimator=estimator, **arguments)


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, FEATURES, generator=generator)
    return x, x[:, :CLASSES].argmax(1)


def located(q: MeanField, data) -> MeanField:
    q.train()
    q.before_training(*data, vbdl.Categorical())
    return q


def outputs_of(q: MeanField, x: torch.Tensor, draws: int, seed: int = 0) -> torch.Tensor:
    """The outputs of training's forward for so many draws, (draws, ...)."""
    with torch.no_grad():
        run = lambda key: call(q.module, {"key": key}, (x,))
        return torch.func.vmap(run)(make_key(seed, range(draws)))


def gradients_of(q: MeanField, data, draws: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """The gradient of the loss in each parameter for so many draws, (draws, ...) each."""
    objective = Objective(q.module, vbdl.Categorical())
    buffers = {name: b.clone() for name, b in objective.named_buffers()}

    def loss(trained, key):
        return call(objective, {**buffers, **trained, "key": key}, data)

    trained = {n: p.detach() for n, p in objective.named_parameters()}
    keys = make_key(seed, range(draws))
    found = [torch.func.vmap(torch.func.grad(loss), (None, 0))(trained, part) for part in keys.split(1000)]
    return {name: torch.cat([part[name] for part in found]) for name in trained}


def within(found: torch.Tensor, expected: torch.Tensor, error: torch.Tensor) -> bool:
    """Whether every difference is within 5 of its standard errors."""
    return bool(((found - expected).abs() <= 5 * error + 1e-6).all())


# -- the distribution of a layer's outputs


def one_layer(estimator: str) -> MeanField:
    torch.manual_seed(0)
    return MeanField(nn.Linear(FEATURES, CLASSES), ROWS, initial_std=0.3, estimator=estimator)


@pytest.mark.parametrize("estimator", ["local", "flipout"])
def test_a_row_has_the_mean_and_variance_of_drawn_weights(estimator, data):
    """Over 20,000 draws, in every output: 5 standard errors; rows are uncorrelated."""
    q, x, n = located(one_layer(estimator), data), data[0], 20_000
    y = outputs_of(q, x, n).double()
    inner = q.module.inner
    variance = (0.3**2 * (x.square().sum(1, keepdim=True) + 1)).double().expand(-1, CLASSES)
    with torch.no_grad():
        mean = inner(x).double()
    assert within(y.mean(0), mean, (variance / n).sqrt())
    assert within(y.var(0), variance, variance * math.sqrt(2 / n))
    standard = (y - mean) / variance.sqrt()
    assert within(standard.pow(4).mean(0), torch.tensor(3.0), torch.tensor(math.sqrt(96 / n)))
    correlation = torch.einsum("nro,nso->rso", standard, standard) / n
    apart = ~torch.eye(ROWS, dtype=torch.bool)
    assert within(correlation[apart], torch.tensor(0.0), torch.tensor(math.sqrt(1 / n)))
    shared = outputs_of(located(one_layer("shared"), data), x, 2000).double()
    shared = (shared - mean) / variance.sqrt()
    assert float((torch.einsum("nro,nso->rso", shared, shared) / 2000)[apart].abs().max()) > 0.3


def test_flipout_is_a_network_of_each_row(data):
    """Row i is computed with mean + r_i s_i^T * std * E, whose signs and noise follow from the counters."""
    q, (x, _) = located(make("twice", "flipout"), data), data
    key = make_key(7, [3])[0]
    with torch.no_grad():
        found = call(q.module, {"key": key}, (x,))
    inner, rows = q.module.inner, []
    parameters = {name: p.detach() for name, p in inner.named_parameters()}
    signs = {name: random_signs(key, 2 * i, ROWS, len(parameters[f"{name}.weight"]) + FEATURES)
             for i, name in enumerate(("layer", "head"))}  # fmt: skip
    for row in range(ROWS):
        weights = {}
        for number, (name, p) in enumerate(parameters.items()):
            owner, leaf = name.split(".")
            before, after = signs[owner][row, :FEATURES], signs[owner][row, FEATURES:]
            e = noise(key, number, p)
            weights[name] = p + 0.3 * e * (after if leaf == "bias" else after.outer(before))
        rows.append(torch.func.functional_call(inner, weights, (x[row : row + 1],)))
    torch.testing.assert_close(found, torch.cat(rows), rtol=0, atol=1e-5)


def test_signs_are_fair_and_independent_bits():
    signs = random_signs(make_key(0, [0])[0], 3, 500, 70).double()
    assert signs.shape == (500, 70) and set(signs.unique().tolist()) == {-1.0, 1.0}
    assert float(signs.mean(0).abs().max()) < 5 / math.sqrt(500)
    correlation = signs.mT @ signs / 500 - torch.eye(70)
    assert float(correlation.abs().max()) < 5.5 / math.sqrt(500)
    assert torch.equal(random_signs(make_key(0, [0])[0], 3, 20, 70).double(), signs[:20])


# -- gradients


EXACT = [("dense", "local"), ("layers", "local")] + [
    (network, "flipout") for network in ("dense", "grouped conv2d", "positions", "positions first", "twice", "layers")
]


@pytest.mark.parametrize("network, estimator", EXACT)
def test_the_expected_gradient_is_that_of_shared_draws(network, estimator, data):
    """Over 8000 draws of each: 5 standard errors of the difference, in every parameter."""
    draws = 8000
    shared = gradients_of(located(make(network, "shared"), data), data, draws)
    found = gradients_of(located(make(network, estimator), data), data, draws, seed=1)
    for name, a in shared.items():
        b = found[name]
        error = ((a.var(0) + b.var(0)) / draws).sqrt()
        assert within(a.mean(0), b.mean(0), error), name


@pytest.mark.parametrize("network", ["dense", "grouped conv2d", "positions"])
def test_the_variance_of_the_gradient_is_lower(network, data):
    """Summed over the means. Among alike rows, the part that shared draws have in common is most of it."""
    data = 1 + 0.3 * data[0], torch.zeros_like(data[1])
    variance = {}
    for estimator in ("shared", "flipout", "local"):
        found = gradients_of(located(make(network, estimator, initial_std=0.1), data), data, 2000)
        variance[estimator] = sum(float(g.var(0).sum()) for n, g in found.items() if "log_std" not in n)
    assert variance["flipout"] < 0.6 * variance["shared"], variance
    assert variance["local"] < 0.6 * variance["shared"], variance
    if network == "dense":
        assert variance["local"] < 1.05 * variance["flipout"], variance


def test_the_variance_of_the_gradient_falls_with_the_rows(data):
    """That of shared draws does not: their noise is common to the rows, of which these are one, repeated."""
    variance = {}
    for estimator in ("shared", "flipout", "local"):
        for rows in (1, 16):
            many = data[0][:1].expand(rows, -1), data[1][:1].expand(rows)
            q = located(make("dense", estimator, initial_std=0.1), data)
            variance[estimator, rows] = float(gradients_of(q, many, 1500)["network.inner.2.bias"].var(0).sum())
    assert variance["shared", 16] == pytest.approx(variance["shared", 1], rel=1e-3)
    for estimator in ("flipout", "local"):
        assert variance[estimator, 16] < variance[estimator, 1] / 16 * 1.4


# -- where they apply


SHARED = {
    ("conv", "local"): {"2.weight", "2.bias"},
    ("conv", "flipout"): {"2.weight", "2.bias"},
    ("folded", "flipout"): {"layer.weight", "layer.bias"},
    ("twice", "local"): {"layer.weight", "layer.bias"},
    ("tied", "flipout"): {"table.weight"},
    ("lstm", "flipout"): {f"layer.{kind}_l0" for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")},
}
APPROXIMATE = {
    ("conv", "local"): {"1.weight", "1.bias"},
    ("grouped conv2d", "local"): {"1.weight"},
    ("positions", "local"): {"layer.weight", "layer.bias"},
    ("positions first", "local"): {"layer.weight", "layer.bias"},
}


@pytest.mark.parametrize("network", [n for n in NETWORKS if n != "transformer"])
@pytest.mark.parametrize("estimator", ["local", "flipout"])
def test_what_draws_for_every_row_is_said(network, estimator, data):
    q = located(make(network, estimator), data)
    shared = SHARED.get((network, estimator), SHARED.get((network, "flipout"), set()))
    approximate = APPROXIMATE.get((network, estimator), set())
    for name, how in q.estimators.items():
        expected = estimator
        if name in shared:
            expected = "shared"
        elif name in approximate:
            expected = f"{estimator}, approximate"
        assert how == expected, name
    names = {
        n.removeprefix("inner.").replace(".inner.", ".") for n, _ in q.module.named_parameters() if "log_std" not in n
    }
    assert {n.replace(".inner.", ".") for n in q.estimators} == names


def test_in_a_transformer_attention_and_normalization_draw_once(data):
    q = located(make("transformer", "flipout"), data)
    for name, how in q.estimators.items():
        assert how == ("shared" if "attn" in name or "norm" in name else "flipout"), name


@pytest.mark.parametrize("network", ["folded", "tied", "lstm"])
def test_where_none_applies_the_draws_are_the_shared_ones(network, data):
    """In every bit, for the layers that fall back; the head is frozen."""
    found = []
    for estimator in ("shared", "flipout"):
        torch.manual_seed(0)
        net = NETWORKS[network]()
        net.head.requires_grad_(False)
        q = located(MeanField(net, ROWS, estimator=estimator), data)
        assert set(q.estimators.values()) == {"shared"}
        with torch.no_grad():  # one by one: nothing maps a recurrent layer
            found.append(torch.stack([call(q.module, {"key": key}, (data[0],)) for key in make_key(0, range(3))]))
    assert torch.equal(*found)


def test_looking_for_layers_changes_nothing(data):
    q = make("conv", "flipout").train()
    before = {name: t.clone() for name, t in state_of(q).items()}
    generator = torch.get_rng_state()
    located(q, data)
    assert torch.equal(torch.get_rng_state(), generator)
    for name, t in state_of(q).items():
        assert torch.equal(t, before[name]), name


# -- training


def fitted(q, data, **options):
    settings = {"epochs": 4, "batch_size": 5, "lr": 1e-2, "compile": False, "progress": False}
    history = vbdl.fit(q, data, vbdl.Categorical(), **{**settings, **options})
    return q, history


@pytest.mark.parametrize(
    "network, estimator", [("conv", "local"), pytest.param("transformer", "flipout", marks=pytest.mark.slow)]
)
def test_compiled_and_eager_training_agree(network, estimator, data):
    """Up to rounding. Adam would make steps of it where a gradient is 0, as of the bias of the keys of attention."""
    sgd = {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.05)}
    eager, _ = fitted(make(network, estimator), data, **sgd)
    compiled, history = fitted(make(network, estimator), data, compile=True, **sgd)
    assert history.compile_seconds > 0
    for name, t in eager.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], t, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("estimator", ["local", "flipout"])
def test_a_stacked_member_is_trained_as_alone(estimator, data):
    members = [make("conv", estimator), make("conv", estimator)]
    q, history = fitted(vbdl.DeepEnsemble(members), data)
    assert not history.one_by_one and q.base.estimators["1.weight"].startswith(estimator)
    for member in range(2):
        alone, _ = fitted(make("conv", estimator, seed=member), data, seed=member)
        for name, t in alone.module.state_dict().items():
            torch.testing.assert_close(q.member(member)[name], t, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("ensemble", [False, True])
@pytest.mark.parametrize("estimator", ["local", "flipout"])
def test_a_resumed_training_is_an_uninterrupted_one(estimator, ensemble, data, tmp_path):
    wrap = lambda: vbdl.DeepEnsemble(make("conv", estimator), 2) if ensemble else make("conv", estimator, n_samples=2)
    whole, _ = fitted(wrap(), data)
    checkpoint = {"checkpoint": tmp_path / "checkpoint", "checkpoint_every": 2}
    fitted(wrap(), data, epochs=2, **checkpoint)
    resumed, history = fitted(wrap(), data, **checkpoint)
    assert history.epochs == 4
    for name, t in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], t), name


@pytest.mark.parametrize("estimator", ["local", "flipout"])
def test_predictions_do_not_depend_on_it(estimator, data, tmp_path):
    q = make("conv", estimator)
    fitted(q, data)
    plain = make("conv", "shared")
    plain.load_state_dict(q.state_dict())
    predict, other = (vbdl.Predictor(p, vbdl.Categorical(), compile=False) for p in (q, plain))
    assert torch.equal(predict(data[0]).probs, other(data[0]).probs)
    predict.save(tmp_path / "model", example=data[0])
    loaded = vbdl.load(tmp_path / "model")
    assert loaded.posterior.estimator == estimator
    assert torch.equal(loaded(data[0]).probs, predict(data[0]).probs)
    assert copy.deepcopy(q).estimators == q.estimators


def test_zeros_have_a_finite_gradient(data):
    """The variance of outputs of zeros is 0, whose root has no derivative."""
    net = nn.Sequential(nn.Linear(FEATURES, 4, bias=False), nn.ReLU(), nn.Linear(4, CLASSES, bias=False))
    with torch.no_grad():
        net[0].weight.fill_(-100.0)
    q = located(MeanField(net, ROWS, estimator="local"), data)
    q.losses(data[0].abs(), data[1], vbdl.Categorical()).sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in q.parameters())


def test_an_unknown_estimator_is_refused():
    with pytest.raises(ValueError, match="estimator must be one of 'shared', 'local', 'flipout', got 'global'"):
        MeanField(nn.Linear(2, 2), 10, estimator="global")
