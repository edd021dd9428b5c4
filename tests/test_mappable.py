"""Functions that torch's vmap has no rule for, in networks whose draws run together all the same."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import vbdl
from vbdl.calling.mappable import Mappable
from vbdl.engine import ways
from vbdl.engine.predictor import Predictor

ROUNDING = {"rtol": 1e-5, "atol": 2e-6}
LAST, LAST_3D = torch.channels_last, torch.channels_last_3d


class Calls(nn.Module):
    """A network that calls one function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def last(x):
    return x.contiguous(memory_format=LAST)


VECTORS, STATES, IMAGES, VOLUMES = draw(5, 6), draw(5, 4), draw(5, 8, 6, 4), draw(5, 8, 3, 4, 2)
IDS = torch.arange(20).view(5, 4) % 7
WEIGHTS = draw(5, 4)

# a module and its inputs; the inputs in which samples may differ come first
LAYERS = {
    "GRU cell": (nn.GRUCell(6, 4), VECTORS, STATES),
    "GRU cell without bias": (nn.GRUCell(6, 4, bias=False), VECTORS, STATES),
    "GRU cell of one vector": (nn.GRUCell(6, 4), VECTORS[0]),
    "LSTM cell": (nn.LSTMCell(6, 4), VECTORS),
    "LSTM cell of one vector": (nn.LSTMCell(6, 4), VECTORS[0]),
    "LSTM cell without bias": (nn.LSTMCell(6, 4, bias=False), VECTORS),
    "RNN cell": (nn.RNNCell(6, 4), VECTORS, STATES),
    "RNN cell with relu": (nn.RNNCell(6, 4, nonlinearity="relu"), VECTORS, STATES),
    "bilinear": (nn.Bilinear(6, 4, 3), VECTORS, STATES),
    "bilinear without bias": (nn.Bilinear(6, 4, 3, bias=False), VECTORS, STATES),
    "bilinear of one vector": (nn.Bilinear(6, 4, 3), VECTORS[0], STATES[0]),
    "bilinear of images": (nn.Bilinear(4, 4, 3), IMAGES, IMAGES),
    **{f"bags, {mode}": (nn.EmbeddingBag(7, 3, mode=mode), IDS) for mode in ("sum", "mean", "max")},
    **{f"bags, {m}, padded": (nn.EmbeddingBag(7, 3, mode=m, padding_idx=2), IDS) for m in ("sum", "mean", "max")},
    "bags, weighted": (
        Calls(lambda w, table: F.embedding_bag(IDS, table, mode="sum", per_sample_weights=w)), WEIGHTS, draw(7, 3),
    ),
    "bags of padding alone": (
        Calls(lambda table: F.embedding_bag(torch.ones_like(IDS), table, mode="max", padding_idx=1)), draw(7, 3),
    ),
    "bags, padded from the end": (
        Calls(lambda table: F.embedding_bag(IDS, table, mode="mean", padding_idx=-5)), draw(7, 3),
    ),
    "global average": (nn.AdaptiveAvgPool2d(1), IMAGES),
    "global average of two sizes": (nn.AdaptiveAvgPool2d((1, 1)), IMAGES),
    "average of parts": (nn.AdaptiveAvgPool2d(2), IMAGES),
    "global average of volumes": (nn.AdaptiveAvgPool3d(1), VOLUMES),
    "group norm": (nn.GroupNorm(2, 8), IMAGES),
    "group norm of volumes": (nn.GroupNorm(2, 8), VOLUMES),
    "contiguous": (Calls(lambda x: x.contiguous(memory_format=LAST) * 2), IMAGES),
    "clone": (Calls(lambda x: x.clone(memory_format=LAST) * 2), IMAGES),
    "to": (Calls(lambda x: x.to(torch.float64, memory_format=LAST) * 2), IMAGES),
    "to, of volumes": (Calls(lambda x: x.to(memory_format=LAST_3D) * 2), VOLUMES),
    "asked": (Calls(lambda x: x * (1 + last(x).is_contiguous(memory_format=LAST))), IMAGES),
    "strides": (Calls(lambda x: torch.tensor(last(x).stride()) * x.mean((1, 2, 3)).unsqueeze(-1)), IMAGES),
}  # fmt: skip


def channels_last(t):
    """The same values of all samples, those of each image laid out with channels last."""
    return t.movedim(2, -1).contiguous().movedim(-1, 2) if t.ndim > 4 else t


@pytest.mark.parametrize("layout", [lambda t: t, channels_last], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("differ", ["parameters", "inputs", "all"])
@pytest.mark.parametrize("name", LAYERS)
def test_samples_together_are_those_of_each(name, differ, layout):
    network, *inputs = LAYERS[name]
    parameters = {n: p.detach() for n, p in network.named_parameters()}
    floats = all(t.is_floating_point() for t in inputs)
    if not (parameters if differ == "parameters" else floats):
        pytest.skip("it has no such tensors")
    stack = lambda t, stacked: layout(torch.stack([t, -t, t + 0.3])) if stacked else t
    states = {n: stack(t, differ != "inputs") for n, t in parameters.items()}
    inputs = [stack(t, differ != "parameters") for t in inputs]
    run = lambda state, *x: functional_call(network, state, x)
    in_dims = (None if differ == "inputs" else 0, *([None if differ == "parameters" else 0] * len(inputs)))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("error", ".*batching rule.*")
        with Mappable():
            together = vmap(run, in_dims=in_dims)(states, *inputs)
        of = lambda t, i, stacked: t[i] if stacked else t
        for i in range(3):
            state = {n: of(t, i, differ != "inputs") for n, t in states.items()}
            each = run(state, *(of(t, i, differ != "parameters") for t in inputs))
            for a, b in zip(*(o if isinstance(o, tuple) else (o,) for o in (together, each)), strict=True):
                torch.testing.assert_close(a[i], b, **ROUNDING)


# -- in networks


def images(**layers):
    """A network of images in channels last."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout2d(0.3), nn.Conv2d(8, 8, 3, groups=2),
        nn.GroupNorm(2, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip
    return net.to(memory_format=LAST)


class Turned(nn.Module):
    """Lays out its rows with channels last, if they are not."""

    def __init__(self):
        super().__init__()
        self.net = images()

    def forward(self, x):
        x = self.net[:4](x)
        return self.net[4:](x if x.is_contiguous(memory_format=LAST) else x.contiguous(memory_format=LAST))


class Steps(nn.Module):
    """A recurrent cell in a loop over time, with dropout on its state."""

    def __init__(self, kind=nn.GRUCell):
        super().__init__()
        self.cell, self.drop, self.head = kind(6, 5), nn.Dropout(0.3), nn.Linear(5, 3)

    def forward(self, x):
        h = x.new_zeros(len(x), 5)
        c = h
        for t in range(x.shape[1]):
            if isinstance(self.cell, nn.LSTMCell):
                h, c = self.cell(x[:, t], (self.drop(h), c))
            else:
                h = self.drop(self.cell(x[:, t], h))
        return self.head(h)


class Pairs(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.drop, self.pairs = nn.Linear(6, 5), nn.Dropout(0.3), nn.Bilinear(5, 6, 3)

    def forward(self, x):
        return self.pairs(self.drop(self.first(x).tanh()), x)


class Bags(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.drop, self.head = nn.EmbeddingBag(7, 5), nn.Dropout(0.3), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.drop(self.table(x)).tanh())


NETWORKS = {
    "channels last": (images, draw(4, 3, 8, 8).contiguous(memory_format=LAST)),
    "turned": (Turned, draw(4, 3, 8, 8)),
    "GRU cell": (Steps, draw(4, 5, 6)),
    "LSTM cell": (lambda: Steps(nn.LSTMCell), draw(4, 5, 6)),
    "RNN cell": (lambda: Steps(nn.RNNCell), draw(4, 5, 6)),
    "bilinear": (Pairs, VECTORS),
    "bags": (Bags, IDS),
}
METHODS = {
    "ensemble": lambda make: vbdl.DeepEnsemble([make().eval() for _ in range(3)]),
    "dropout": lambda make: vbdl.MCDropout(make().eval()),
    "mean-field": lambda make: vbdl.MeanField(make().eval(), n_data=100),
}


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NETWORKS)
def test_draws_together_are_those_of_the_network_as_it_is(name, method, compile, monkeypatch):
    make, x = NETWORKS[name]
    q, samples = METHODS[method](make), {}
    for verdict in (ways.GRAPH, ways.PLAIN):
        monkeypatch.setattr("vbdl.engine.execution.before_tracing", lambda *_, verdict=verdict: (verdict, "said"))
        monkeypatch.setattr("vbdl.engine.execution.after_tracing", lambda *_: (ways.GRAPH, ""))
        predict = Predictor(q, vbdl.Categorical(), 3, seed=7, compile=compile, joint=True)
        samples[verdict] = predict(x, samples=True).samples
        assert ("stacked" in predict.explain()) == (verdict == ways.GRAPH), predict.explain()
    torch.testing.assert_close(samples[ways.GRAPH], samples[ways.PLAIN], **ROUNDING)


# -- what cannot be mapped


class Renormed(nn.Module):
    """Calls a function that vmap has no rule for."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.3), nn.Linear(5, 3))

    def forward(self, x):
        return torch.renorm(self.net(x), 2, 0, 1.0)


@pytest.mark.parametrize("clearly, kept", [(0.0, "repeated rows"), (1e9, "loop")])
@pytest.mark.parametrize("compile", [False, pytest.param("background", marks=pytest.mark.thorough)])
def test_a_loop_over_draws_stays_where_it_is_faster_than_repeated_rows(compile, clearly, kept, monkeypatch):
    monkeypatch.setattr("vbdl.engine.execution._CLEARLY", clearly)
    predict = Predictor(vbdl.MCDropout(Renormed().eval()), vbdl.Categorical(), 9, compile=compile)
    first = predict(VECTORS, samples=True).samples
    predict.warm_up(len(VECTORS), example=VECTORS, samples=True)
    torch.testing.assert_close(predict(VECTORS, samples=True).samples, first, **ROUNDING)
    assert f"strategy       {kept}" in predict.explain()
    assert "the draws run one after the other, so both were timed" in predict.explain()


def test_of_many_draws_that_run_one_after_the_other_few_run_to_find_it_out(monkeypatch):
    """torch warns once it has run them all."""
    monkeypatch.setattr("vbdl.engine.execution._CLEARLY", 0.0)
    counted, renorm = [], torch.ops.aten.renorm.default

    class Counts(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            counted.extend([func] * (func is renorm))
            return func(*args, **(kwargs or {}))

    predict = Predictor(vbdl.MCDropout(Renormed().eval()), vbdl.Categorical(), 1000, compile=False, tiles=5)
    with Counts():
        predict(VECTORS)
    assert "strategy       repeated rows" in predict.explain()
    assert len(counted) < 500
