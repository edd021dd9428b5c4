"""Every posterior, every network, every promise. A new method is one line of POSTERIORS.

Tolerances: 1e-5 absolute on logits of order 1 is float32 rounding (6e-8) times the few hundred terms of a sum, where
only the order of summation may differ; probabilities are smoother still. What must be equal in every bit is compared
with `torch.equal`.
"""

import copy
import functools
import math
import pickle
import threading
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import vbdl.engine.program
from vbdl.augmentations import GaussianNoise
from vbdl.engine.predictor import Predictor
from vbdl.likelihoods.categorical import Categorical
from vbdl.likelihoods.gaussian import Gaussian
from vbdl.model import Model
from vbdl.posteriors.augmentation import TestTimeAugmentation
from vbdl.posteriors.batch_ensemble import BatchEnsemble
from vbdl.posteriors.deterministic import Deterministic
from vbdl.posteriors.ensemble import DeepEnsemble
from vbdl.posteriors.ivon import IVON
from vbdl.posteriors.laplace import Laplace
from vbdl.posteriors.masksembles import Masksembles
from vbdl.posteriors.mc_dropout import MCDropout
from vbdl.posteriors.mean_field import MeanField
from vbdl.posteriors.snapshots import Snapshots
from vbdl.posteriors.stochastic import Stochastic
from vbdl.posteriors.swag import SWAG
from vbdl.types import is_posterior

BATCH, CLASSES, MEMBERS, SAMPLES, TILE = 13, 5, 3, 7, 64
ROUNDING = {"rtol": 0.0, "atol": 1e-5}


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(11, 19), nn.ReLU(), nn.Dropout(0.3), nn.Linear(19, CLASSES))


def cnn() -> nn.Module:
    """With the running statistics of a trained network: far from 0 and 1."""
    norm = nn.BatchNorm2d(3)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    norm.num_batches_tracked.fill_(1000)
    head = nn.Linear(3 * 5 * 3, CLASSES)
    return nn.Sequential(nn.Conv2d(2, 3, 3), norm, nn.ReLU(), nn.Dropout2d(0.3), nn.Flatten(), head)


class Transformer(nn.Module):
    """(batch, length, features) -> (batch, classes); inside, the batch axis is first or second."""

    def __init__(self, batch_first: bool):
        super().__init__()
        self.batch_first = batch_first
        self.embed = nn.Linear(3, 14)
        self.layer = nn.TransformerEncoderLayer(14, 2, 19, dropout=0.2, batch_first=batch_first)
        self.head = nn.Linear(14, CLASSES)

    def forward(self, x):
        h = self.embed(x)
        h = self.layer(h) if self.batch_first else self.layer(h.transpose(0, 1)).transpose(0, 1)
        return self.head(h.mean(1))


class Variational(nn.Linear):
    """A textbook layer, which draws its weights in its forward."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs)
        self.logvar = nn.Parameter(torch.full((outputs, inputs), math.log(0.1**2)))

    def forward(self, x):
        return F.linear(x, self.weight + torch.exp(self.logvar / 2) * torch.randn_like(self.weight), self.bias)


def drawing(network: nn.Module) -> nn.Module:
    """A copy of a network with textbook layers in place of its linear layers, which has no dropout in evaluation."""
    network = copy.deepcopy(network)
    for name, m in list(network.named_modules()):
        if type(m) is nn.Linear:
            owner, _, leaf = name.rpartition(".")
            layer = Variational(m.in_features, m.out_features)
            layer.load_state_dict(m.state_dict(), strict=False)
            setattr(network.get_submodule(owner), leaf, layer.train(m.training))
    return network


NETWORKS = {
    "mlp": (mlp, (11,)),
    "cnn": (cnn, (2, 7, 5)),
    "transformer": (lambda: Transformer(batch_first=True), (7, 3)),
    "transformer, length first": (lambda: Transformer(batch_first=False), (7, 3)),
}


def fitted(q: Laplace) -> Laplace:
    """With the curvature of a pass over 101 rows, of any size."""
    q.module.rows.fill_(101)
    for factor in q.module.factors:
        factor.prior_precision.fill_(50.0)
        for name, t in factor.named_buffers():
            if name.endswith("values") or name.startswith("curvature"):
                t.uniform_(0.0, 20.0)
    return q


def trained(q: nn.Module, epochs: int = 6) -> nn.Module:
    """The posterior after so many epochs without steps: between them its weights move at random."""
    generator = torch.Generator().manual_seed(17)
    q.being_trained(True)
    q.course(epochs, 1e-3)
    q.before_training(None, None, Categorical())
    for epoch in range(epochs):
        with torch.no_grad():
            for name, p in q.named_parameters():
                if p.requires_grad and "factor" not in name:
                    p.add_(0.1 * torch.randn(p.shape, generator=generator))
        q.after_epoch(epoch)
    q.being_trained(False)
    q.after_training(Model(q, Categorical()).eval(), Rows(_rows_of(q)))
    return q


class Rows:
    """Training rows of one batch, the same for all members."""

    validation, own = None, False

    def __init__(self, x: torch.Tensor):
        self.x = x

    def __iter__(self):
        yield self.x, None


def _rows_of(q: nn.Module) -> torch.Tensor:
    """Rows that the network takes."""
    first = next(p for name, p in q.user_network.named_parameters())
    shape = {2: (7, 3) if first.shape[1] == 3 else (11,), 4: (2, 7, 5)}[first.ndim]
    return torch.randn(BATCH, *shape, generator=torch.Generator().manual_seed(6))


POSTERIORS = {
    "deterministic": lambda make: Deterministic(make()),
    "dropout": lambda make: MCDropout(make()),
    "mean-field": lambda make: MeanField(make(), n_data=101, initial_std=0.1),
    "ensemble": lambda make: DeepEnsemble(make(), MEMBERS),
    "ensemble of trained networks": lambda make: DeepEnsemble([make() for _ in range(MEMBERS)]),
    "ensemble of two architectures": lambda make: DeepEnsemble([make(), nn.Sequential(make()), make()]),
    "ensemble of dropout": lambda make: DeepEnsemble([MCDropout(make()) for _ in range(MEMBERS)]),
    "batch ensemble": lambda make: BatchEnsemble(make(), MEMBERS),
    "tabm": lambda make: BatchEnsemble(make(), MEMBERS, initial="tabm"),
    "masksembles": lambda make: Masksembles(make(), MEMBERS),
    "laplace": lambda make: fitted(Laplace(make())),
    "ensemble of laplace": lambda make: DeepEnsemble([fitted(Laplace(make())) for _ in range(MEMBERS)]),
    "snapshots": lambda make: trained(Snapshots(make(), MEMBERS)),
    "stochastic": lambda make: Stochastic(drawing(make())),
    "test-time augmentation": lambda make: TestTimeAugmentation(make(), GaussianNoise(0.5)),
    "ensemble of stochastic": lambda make: DeepEnsemble([Stochastic(drawing(make())) for _ in range(MEMBERS)]),
    "swag": lambda make: trained(SWAG(make(), n_draws=SAMPLES)),
    "ensemble of swag": lambda make: DeepEnsemble([trained(SWAG(make(), n_draws=SAMPLES)) for _ in range(MEMBERS)]),
    "ivon": lambda make: IVON(make(), n_data=101),
    "ensemble of ivon": lambda make: DeepEnsemble(IVON(make(), n_data=101), MEMBERS),
    "ensemble of mean-field": lambda make: DeepEnsemble(MeanField(make(), n_data=101, initial_std=0.1), MEMBERS),
}


class Cells(Collection):
    """Each posterior with the first network, and the methods alone with them all; the rest is slow.

    What holds for a method holds for an ensemble of it, on one network as on another. Read when tests are collected:
    `test_own_methods.py` puts posteriors of its own into POSTERIORS.
    """

    def __init__(self, networks):
        self.networks = networks

    def __len__(self):
        return len(self.networks) * len(POSTERIORS)

    def __contains__(self, cell):
        return cell in list(self)

    def __iter__(self):
        alone = (
            "deterministic", "snapshots", "swag", "ivon", "dropout", "mean-field", "laplace", "stochastic", "ensemble",
            "ensemble of two architectures", "batch ensemble", "masksembles", "test-time augmentation",
        )  # fmt: skip
        for network in self.networks:
            for posterior in POSTERIORS:
                slow = network != next(iter(self.networks)) and posterior not in alone
                yield pytest.param(posterior, network, marks=pytest.mark.slow if slow else ())


def cells(networks):
    return pytest.mark.parametrize("posterior, network", Cells(networks))


every_network = cells(NETWORKS)
two_networks = cells(("mlp", "transformer"))  # where another one could show nothing new
each_posterior = pytest.mark.parametrize("posterior", POSTERIORS)


def _shown_by_others(cell: dict) -> bool:
    """Whether a method on this network and an ensemble of it on the first one show what this cell would.

    Where the batch axis is inside a network shows with dropout, whose masks have one, too.
    """
    ensembles = (
        "ensemble of trained networks", "ensemble of dropout", "ensemble of stochastic", "ensemble of mean-field",
    )  # fmt: skip
    network = cell.get("network", "mlp")
    return (cell.get("posterior") in ensembles and network != "mlp") or (
        cell.get("posterior") != "dropout" and network == "transformer, length first"
    )


pytestmark = pytest.mark.slow_where(cell=_shown_by_others)

# chunks of draws on one network, the whole on two; state and seeds, which no layer reads, on one
chunks_on_the_first = pytest.mark.slow_where(
    cell=lambda p: _shown_by_others(p) or (p["chunk_size"] is not None and p["network"] != "mlp")
)
on_the_first = pytest.mark.slow_where(cell=lambda p: p["network"] != "mlp")

# for what a predictor does with a posterior as a whole: each method, and one ensemble that is stored as a list
methods_alone = pytest.mark.slow_where(
    cell=lambda p: p["posterior"] in ("ensemble of trained networks", "ensemble of dropout", "ensemble of mean-field")
)


def build(posterior: str, network: str) -> nn.Module:
    torch.manual_seed(3)
    return POSTERIORS[posterior](NETWORKS[network][0])


def inputs(network: str, rows: int = BATCH) -> torch.Tensor:
    """The first rows are the same whatever the number of rows."""
    generator = torch.Generator().manual_seed(5)
    return torch.stack([torch.randn(NETWORKS[network][1], generator=generator) for _ in range(rows)])


def predictor(posterior: str, network: str, **settings) -> Predictor:
    q = build(posterior, network)
    n_samples = q.n_draws or SAMPLES
    return Predictor(q, Categorical(), **{"n_samples": n_samples, "tiles": (TILE,), "compile": False, **settings})


@functools.cache
def usual(posterior: str, network: str, compile: bool = False) -> Predictor:
    """One that several tests share, to trace and compile each cell once."""
    return predictor(posterior, network, compile=compile)


def assert_same(a, b, exact: bool = False) -> None:
    for name in ("probs", "total", "aleatoric", "epistemic"):
        x, y = getattr(a, name), getattr(b, name)
        torch.testing.assert_close(
            x, y, **({"rtol": 0, "atol": 0} if exact else ROUNDING), msg=lambda m, n=name: f"{n}: {m}"
        )


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are equal; NaN, the standard error of one draw, equals itself."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(0.0), b.nan_to_num(0.0))


def snapshot(module: nn.Module) -> tuple:
    return (
        {n: t.clone() for n, t in [*module.named_parameters(), *module.named_buffers()]},
        {n: m.training for n, m in module.named_modules()},
        {n: p.requires_grad for n, p in module.named_parameters()},
    )


def assert_untouched(module: nn.Module, before: tuple) -> None:
    tensors, training, requires_grad = snapshot(module)
    assert training == before[1] and requires_grad == before[2] and tensors.keys() == before[0].keys()
    for name, t in tensors.items():
        assert torch.equal(t, before[0][name]), f"{name} was changed"


def random_parts(q) -> bool:
    """Whether draws never end, so that another seed gives others; the members of an ensemble stay who they are."""
    return q.n_draws is None


# -- what a prediction is


@every_network
def test_a_prediction_has_batch_first_and_adds_up(posterior, network):
    q = build(posterior, network)
    assert is_posterior(q)
    p = usual(posterior, network)(inputs(network))
    assert p.probs.shape == (BATCH, CLASSES) and p.total.shape == p.epistemic.shape == (BATCH,)
    torch.testing.assert_close(p.total, p.aleatoric + p.epistemic, rtol=0, atol=1e-6)
    torch.testing.assert_close(p.probs.sum(-1), torch.ones(BATCH), rtol=0, atol=1e-6)
    if q.n_draws == 1:
        assert bool((p.epistemic == 0).all()) and torch.equal(p.aleatoric, p.total), (
            "one network knows no epistemic part"
        )
    else:
        assert bool((p.epistemic > 1e-4).all()), "samples do not differ"
    assert p.n_samples == (q.n_draws or SAMPLES)
    assert p.samples is None


@every_network
def test_stacked_is_a_loop_over_samples(posterior, network):
    x, q = inputs(network), build(posterior, network).eval()
    kept = predictor(posterior, network, joint=True)(x, samples=True)
    rows = []
    with torch.no_grad():
        for part in q.parts:
            part.prepare(x)
            state = part.draws(torch.arange(part.n_draws or SAMPLES), 0)
            count = next(iter(state.values())).shape[0]
            rows += [functional_call(part.module, {n: t[s] for n, t in state.items()}, (x,)) for s in range(count)]
    logits = torch.stack(rows)
    torch.testing.assert_close(kept.samples, logits, **ROUNDING)
    probs = logits.double().softmax(-1)
    entropy = lambda p: -(p * p.log()).sum(-1)
    torch.testing.assert_close(kept.probs, probs.mean(0).float(), **ROUNDING)
    torch.testing.assert_close(kept.total, entropy(probs.mean(0)).float(), **ROUNDING)
    torch.testing.assert_close(kept.aleatoric, entropy(probs).mean(0).float(), **ROUNDING)


@chunks_on_the_first
@two_networks
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_the_gradient_is_that_of_the_loop(posterior, network, chunk_size):
    x, q = inputs(network).requires_grad_(), build(posterior, network).eval().requires_grad_(False)
    probs = []
    for part in q.parts:
        part.prepare(x.detach())
        state = part.draws(torch.arange(part.n_draws or SAMPLES), 0)
        count = next(iter(state.values())).shape[0]
        rows = [functional_call(part.module, {n: t[s] for n, t in state.items()}, (x,)) for s in range(count)]
        probs += [row.softmax(-1) for row in rows]
    (expected,) = torch.autograd.grad(torch.stack(probs).mean(0)[:, 0].sum(), x)
    predict = predictor(posterior, network, joint=True, chunk_size=chunk_size)
    (found,) = torch.autograd.grad(predict(x).probs[:, 0].sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert not predict(x.detach()).probs.requires_grad
    with torch.no_grad():
        assert not predict(x).probs.requires_grad


# -- what it does not depend on


@two_networks
def test_chunking_changes_nothing(posterior, network):
    x = inputs(network)
    whole = usual(posterior, network)(x, samples=True)
    chunked = predictor(posterior, network, chunk_size=2)(x, samples=True)
    assert_same(chunked, whole)
    torch.testing.assert_close(chunked.samples, whole.samples, **ROUNDING)


@two_networks
def test_fewer_draws_are_the_first_draws(posterior, network):
    q = build(posterior, network)
    few = 2
    for part in q.parts:
        state = part.draws(torch.arange(part.n_draws or 100), 0)
        for name, t in part.draws(torch.arange(min(few, len(next(iter(state.values()))))), 0).items():
            assert torch.equal(t, state[name][: len(t)]), name
    x = inputs(network)
    few = min(few, q.n_draws or few)
    kept = predictor(posterior, network, n_samples=few)(x, samples=True).samples
    torch.testing.assert_close(kept, usual(posterior, network)(x, samples=True).samples[:few], **ROUNDING)


@every_network
def test_a_row_does_not_depend_on_its_batch(posterior, network):
    """Bit for bit, at any place in any batch: tiles have one size, and every row in them the same arithmetic."""
    x, predict = inputs(network, rows=2 * TILE + 3), usual(posterior, network)
    whole = predict(x)
    for rows in ([4], [0, 4, 1], list(range(TILE + 2)), torch.randperm(len(x)).tolist()):
        part = predict(x[rows])
        for name in ("probs", "total", "aleatoric", "epistemic", "standard_error"):
            assert same_bits(getattr(part, name), getattr(whole, name)[rows]), f"{name} of rows {rows}"


@on_the_first
@two_networks
def test_the_seed_decides_and_nothing_else(posterior, network):
    x, predict = inputs(network), usual(posterior, network)
    first = predict(x)
    torch.manual_seed(123456)
    assert_same(predict(x), first, exact=True)
    other = predict.replace(seed=1)
    assert other.seed == 1 and predict.seed == 0
    assert torch.equal(other(x).probs, first.probs) != random_parts(predict.posterior)


# -- what it leaves alone


@cells(("mlp", "cnn"))
@pytest.mark.parametrize("training", [True, False])
def test_wrapping_and_predicting_change_nothing(posterior, network, training):
    mine = [NETWORKS[network][0]().train(training) for _ in range(MEMBERS)]
    before = [snapshot(m) for m in mine]
    given = iter(mine)
    q = POSTERIORS[posterior](lambda: next(given)).train(training)
    own = snapshot(q)
    predict = Predictor(q, Categorical(), n_samples=q.n_draws or SAMPLES, tiles=(TILE,), compile=False)
    generator = torch.get_rng_state()
    predict(inputs(network))
    assert torch.equal(torch.get_rng_state(), generator), "prediction drew from torch's generator"
    with pytest.raises(ValueError):
        predict(torch.randn(BATCH, 23))  # the module raises
    assert_untouched(q, own)
    for m, state in zip(mine, before, strict=True):
        assert_untouched(m, state)
    assert torch.is_grad_enabled() and torch.backends.mha.get_fastpath_enabled()
    assert not torch.overrides._get_current_function_mode_stack()


@on_the_first
@two_networks
def test_a_predictor_is_not_trained_further(posterior, network):
    """It holds a copy: training the posterior afterwards changes no prediction."""
    x, q = inputs(network), build(posterior, network)
    predict = Predictor(q, Categorical(), n_samples=q.n_draws or SAMPLES, tiles=(TILE,), compile=False)
    with torch.no_grad():
        for p in q.parameters():
            p.add_(1.0)
    assert_same(predict(x), usual(posterior, network)(x), exact=True)


@on_the_first
@two_networks
def test_state_dict_round_trip(posterior, network):
    x, q = inputs(network), build(posterior, network)
    torch.manual_seed(11)
    other = POSTERIORS[posterior](NETWORKS[network][0])
    settings = dict(n_samples=q.n_draws or SAMPLES, tiles=(TILE,), compile=False)
    other.load_state_dict(copy.deepcopy(q.state_dict()))
    assert_same(Predictor(other, Categorical(), **settings)(x), usual(posterior, network)(x), exact=True)


@methods_alone
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
@each_posterior
def test_a_copy_and_a_pickle_predict_the_same(posterior, copied):
    x, predict = inputs("mlp"), predictor(posterior, "mlp")
    predict.warm_up(example=x)
    assert_same(copied(predict)(x), predict(x), exact=True)
    assert_same(copied(predict(x)), predict(x), exact=True)
    assert torch.equal(copied(predict.as_module())(x), predict(x).mean)


# -- networks that cannot be wrapped


def old_weight_norm() -> nn.Module:
    return nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 5)), nn.Dropout(0.3))


WRAPS = {"dropout": MCDropout, "mean-field": lambda m: MeanField(m, 7), "ensemble": lambda m: DeepEnsemble(m, 2)}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize(
    "network, error, message",
    [
        (lambda x: x, TypeError, "a network must be an nn.Module, got function"),
        (lambda: nn.Sequential(torch.compile(mlp())), ValueError, "module '0' was returned by torch.compile"),
        (old_weight_norm, ValueError, "module '0' has torch.nn.utils.weight_norm.*use torch.nn.utils.parametrizations"),
        (lambda: nn.Sequential(nn.LazyLinear(5), nn.Dropout(0.3)), ValueError, "call it on one batch first"),
    ],
)
def test_what_is_no_plain_network_is_refused(wrap, network, error, message):
    with pytest.raises(error, match=message):
        WRAPS[wrap](network if error is TypeError else network())


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("wrap", ["dropout", "mean-field"])
def test_torchscript_is_refused_where_it_would_be_looked_into(wrap):
    with pytest.raises(ValueError, match="TorchScript"):
        WRAPS[wrap](nn.Sequential(torch.jit.script(mlp()), nn.Dropout(0.3)))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("wrap", WRAPS)
def test_traced_modules_are_refused(wrap):
    how = "torch.jit.trace returned.*or torch.jit.script" if "ensemble" in wrap else "whose layers this method cannot"
    with pytest.raises(ValueError, match=f"TorchScript.*{how}"):
        WRAPS[wrap](torch.jit.trace(mlp().eval(), torch.randn(2, 11)))


# -- sizes at the edge


@every_network
def test_an_empty_batch_a_row_and_a_sample(posterior, network):
    predict = usual(posterior, network)
    empty = predict(inputs(network, 2)[:0], samples=True)
    assert empty.probs.shape == (0, CLASSES) and empty.total.shape == (0,)
    assert empty.samples.shape == (predict.n_samples, 0, CLASSES)
    assert predict(inputs(network, 1)).probs.shape == (1, CLASSES)
    one = predictor(posterior, network, n_samples=1)(inputs(network), samples=True)
    assert one.samples.shape == (1, BATCH, CLASSES)
    torch.testing.assert_close(one.epistemic, torch.zeros(BATCH), rtol=0, atol=1e-6)
    torch.testing.assert_close(one.probs, one.samples[0].softmax(-1), rtol=0, atol=1e-6)
    assert bool(one.standard_error.isnan().all()), "one sample says nothing about its own error"


# -- compiling

# a compile takes seconds: by default the three methods, and dropout, which has most to compile, on every network
_FAST = [
    (p, "mlp") for p in ("deterministic", "snapshots", "swag", "dropout", "mean-field", "stochastic", "ensemble")
] + [
    ("batch ensemble", "mlp"),
    ("masksembles", "mlp"),
    ("dropout", "cnn"),
    ("dropout", "transformer"),
    ("test-time augmentation", "mlp"),
]
COMPILED = _FAST + [
    pytest.param(p, n, marks=pytest.mark.slow) for p in POSTERIORS for n in NETWORKS if (p, n) not in _FAST
]


@pytest.mark.parametrize("posterior, network", COMPILED)
def test_compiling_changes_nothing(posterior, network):
    x, predict = inputs(network), usual(posterior, network, compile=True)
    whole = predict(x)
    assert_same(whole, usual(posterior, network)(x))
    for rows in ([7], torch.randperm(BATCH).tolist()):
        part = predict(x[rows])
        for name in ("probs", "total", "aleatoric", "epistemic", "standard_error"):
            assert same_bits(getattr(part, name), getattr(whole, name)[rows]), f"{name} of rows {rows}"


def test_a_compiled_predictor_has_the_gradient_too():
    x = inputs("mlp").requires_grad_()
    gradient = lambda p: torch.autograd.grad(p(x).total.sum(), x)[0]
    compiled = usual("dropout", "mlp", compile=True)
    torch.testing.assert_close(gradient(compiled), gradient(usual("dropout", "mlp")), **ROUNDING)
    assert_same(compiled(x), compiled(x.detach()))


@pytest.mark.slow
@every_network
def test_compiled_chunks_are_the_whole(posterior, network):
    x = inputs(network)
    chunked = predictor(posterior, network, chunk_size=2, compile=True)(x, samples=True)
    whole = usual(posterior, network)(x, samples=True)
    assert_same(chunked, whole)
    torch.testing.assert_close(chunked.samples, whole.samples, **ROUNDING)


@chunks_on_the_first
@two_networks
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_only_the_first_call_compiles(posterior, network, chunk_size, monkeypatch):
    compiled = []
    monkeypatch.setattr(vbdl.engine.program, "compile_graph", lambda graph, inputs: compiled.append(graph) or graph)
    predict = predictor(posterior, network, compile=True, chunk_size=chunk_size)
    predict.warm_up((1, BATCH), example=inputs(network, 1))
    count = len(compiled)
    assert count >= 1
    for rows in (1, BATCH, 0, 3 * TILE + 1):
        predict(inputs(network, max(rows, 1))[:rows])
    assert len(compiled) == count
    with pytest.raises(RuntimeError, match="warm"):
        predict(torch.randn(BATCH, *NETWORKS[network][1], 2))


# -- threads


def in_threads(function, arguments: list) -> list:
    together = threading.Barrier(len(arguments))

    def run(argument):
        together.wait()
        return function(argument)

    with ThreadPoolExecutor(len(arguments)) as pool:
        return list(pool.map(run, arguments))


@methods_alone
@each_posterior
def test_eight_threads_are_eight_calls(posterior):
    """Bit for bit, with predictors of their own that are traced at the same moment, and with one for all."""
    x, q = inputs("mlp"), build(posterior, "mlp")
    settings = dict(n_samples=q.n_draws or SAMPLES, tiles=(TILE,), compile=False)
    serial = [Predictor(q, Categorical(), seed=s, **settings)(x) for s in range(2)]
    fresh = [Predictor(q, Categorical(), seed=s % 2, **settings) for s in range(8)]
    for got, expected in zip(in_threads(lambda p: p(x), fresh), serial * 4, strict=True):
        assert_same(got, expected, exact=True)
    shared = Predictor(q, Categorical(), **settings)
    for rows, p in in_threads(lambda rows: (rows, shared(x[:rows])), list(range(1, 9))):
        assert torch.equal(p.probs, serial[0].probs[:rows])


def test_threads_leave_the_settings_of_the_process():
    """Tracing turns torch's fused transformer off for a while: two at a time must not turn it off for good."""
    predictors = [predictor("ensemble", "transformer") for _ in range(3)]
    in_threads(lambda p: p(inputs("transformer")), predictors)
    assert torch.backends.mha.get_fastpath_enabled()


# -- precision


@two_networks
def test_autocast_is_close_and_its_statistics_are_float32(posterior, network):
    x = inputs(network)
    low, full = predictor(posterior, network, autocast=torch.bfloat16)(x), usual(posterior, network)(x)
    for name in ("probs", "total", "aleatoric", "epistemic"):
        assert getattr(low, name).dtype == torch.float32
    # bfloat16 keeps 8 bits: 0.4 % of logits of order 1 and of each of a few layers
    torch.testing.assert_close(low.probs, full.probs, rtol=0, atol=0.02)
    assert not torch.equal(low.probs, full.probs), "autocast had no effect"


def test_warming_up_measures_what_autocast_costs():
    """As large as the difference of the two predictors, and said by `explain`; nothing of it in float32."""
    x = inputs("mlp", TILE)
    low, full = (
        predictor("dropout", "mlp", autocast=torch.bfloat16, tiles=(TILE,)),
        predictor("dropout", "mlp", tiles=(TILE,)),
    )
    low.warm_up((1,), example=x)
    full.warm_up((1,), example=x)
    assert low.precision.largest == pytest.approx(float((low(x).probs - full(x).probs).abs().max()), rel=1e-3)
    assert low.precision.standard_error == pytest.approx(float(full(x).standard_error.mean()), rel=1e-3)
    assert "bfloat16: means differ from float32 by at most" in low.explain()
    assert full.precision is None and "precision" not in full.explain()


@methods_alone
@each_posterior
@pytest.mark.parametrize("chunk_size", [None, 1])
def test_a_double_network_predicts_in_double(posterior, chunk_size):
    q = build(posterior, "mlp").double()
    x = inputs("mlp").double()
    settings = dict(n_samples=q.n_draws or SAMPLES, tiles=(TILE,), compile=False, chunk_size=chunk_size)
    p = Predictor(q, Categorical(), **settings)(x, samples=True)
    assert p.probs.dtype == p.total.dtype == torch.float64
    torch.testing.assert_close(p.probs, p.samples.softmax(-1).mean(0), rtol=0, atol=1e-14)


# -- regression: the same engine with another likelihood


@each_posterior
def test_regression_adds_up_and_chunks(posterior):
    x, q = inputs("mlp"), build(posterior, "mlp")
    settings = dict(n_samples=q.n_draws or SAMPLES, tiles=(TILE,), compile=False)
    likelihood = Gaussian(n_outputs=CLASSES, std=0.5, covariance=True)
    whole = Predictor(q, likelihood, **settings)(x, samples=True)
    chunked = Predictor(q, likelihood, chunk_size=2, **settings)(x)
    means = whole.samples[..., 0].double()
    torch.testing.assert_close(whole.epistemic, means.var(0, correction=0).float(), **ROUNDING)
    torch.testing.assert_close(whole.aleatoric, torch.full((BATCH, CLASSES), 0.25), **ROUNDING)
    torch.testing.assert_close(whole.total, whole.aleatoric + whole.epistemic, **ROUNDING)
    torch.testing.assert_close(whole.covariance.diagonal(dim1=1, dim2=2), whole.total, **ROUNDING)
    for name in ("mean", "total", "aleatoric", "epistemic", "covariance", "standard_error"):
        # the standard error of one draw is NaN
        torch.testing.assert_close(getattr(chunked, name), getattr(whole, name), equal_nan=True, **ROUNDING)
