"""Recurrent networks: one scan for all samples, or rows of one layer, against torch's layers in a loop over draws."""

import copy
import itertools
import re

import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

import vbdl
from vbdl.calling.stacking import call
from vbdl.engine import ways
from vbdl.engine.predictor import Predictor
from vbdl.nn import noise
from vbdl.nn.recurrent import WholeLayers

# sums of at most a few hundred float32 terms of order 1, through seven steps: 1e-7 each, with a margin of ten
ROUNDING: dict = {"rtol": 1e-5, "atol": 1e-5}
CELLS = ("GRU", "LSTM", "RNN")


def layer(cell, layers=1, both=False, first=True, dropout=0.0, **options):
    if cell == "RNN" and both:
        options["nonlinearity"] = "relu"
    batch = dict(batch_first=first, bidirectional=both, dropout=dropout if layers > 1 else 0.0)
    return getattr(nn, cell)(6, 5, num_layers=layers, **batch, **options)


def outputs(net, state, x, lengths, first):
    """Everything that the layer returns, under these parameters."""
    if lengths is not None:
        x = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=first, enforce_sorted=False)
    out, final = functional_call(net, state, (x,)) if state else net(x)
    return (out.data if lengths is not None else out, *(final if isinstance(final, tuple) else (final,)))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", [torch.float64, pytest.param(torch.float32, marks=pytest.mark.thorough)])
def test_stacked_layers_are_the_layers_in_turn(cell, dtype):
    """Values of all outputs, and gradients by inputs and weights, of every option of torch's layers."""
    switch, projections = [False, True], [0, 3] if cell == "LSTM" else [0]
    options = list(itertools.product([1, 3], switch, switch, switch, projections, [1, 4], switch))
    for layers, both, first, bias, projection, rows, packed in options[:: 3 if dtype == torch.float64 else 1]:
        more = {"proj_size": projection} if projection else {}
        nets = [layer(cell, layers, both, first, bias=bias, **more).eval().to(dtype) for _ in range(3)]
        x = torch.randn(rows, 7, 6, dtype=dtype)
        x = (x if first else x.transpose(0, 1)).requires_grad_()
        lengths = torch.tensor([5, 7, 2, 5][:rows]) if packed else None
        compare(nets, x, lengths, first, {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else ROUNDING)


def compare(nets, x, lengths, first, tolerance):
    stacked, _ = stack_module_state(nets)
    with WholeLayers():
        together = vmap(lambda state: outputs(nets[0], state, x, lengths, first))(stacked)
    in_turn = [torch.stack(t) for t in zip(*(outputs(n, {}, x, lengths, first) for n in nets), strict=True)]
    torch.testing.assert_close(list(together), in_turn, **tolerance)
    weights = [torch.randn_like(t) for t in in_turn]
    own = [dict(net.named_parameters())[name] for name in stacked for net in nets]
    by = lambda t, of: torch.autograd.grad(t, of, weights, retain_graph=True)
    by_x, *by_stacked = by(together, [x, *stacked.values()])
    expected_x, *expected = by(in_turn, [x, *own])
    expected = [torch.stack(expected[i : i + 3]) for i in range(0, len(expected), 3)]
    torch.testing.assert_close([by_x, *by_stacked], [expected_x, *expected], **tolerance)


def test_a_vmap_inside_one_over_samples_is_right():
    nets, x = [layer("GRU").eval() for _ in range(3)], torch.randn(4, 2, 7, 6)
    stacked, _ = stack_module_state(nets)
    one = lambda state: vmap(lambda rows: functional_call(nets[0], state, (rows,))[0])(x)
    with torch.no_grad(), WholeLayers():
        together = vmap(one)(stacked)
    expected = torch.stack([torch.stack([net(rows)[0] for rows in x]) for net in nets])
    torch.testing.assert_close(together, expected, **ROUNDING)


# -- predictors


class Network(nn.Module):
    """A recurrent layer on rows of one length or packed, between two others, read at the last step of each row."""

    def __init__(self, cell, layers, both, first, packed):
        super().__init__()
        self.first, self.packed = first, packed
        self.before, self.layer = nn.Linear(4, 6), layer(cell, layers, both, first, dropout=0.3)
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(10 if both else 5, 3)

    def forward(self, x, lengths):
        x = self.before(x)
        x = x if self.first else x.transpose(0, 1)
        if self.packed:
            x = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), batch_first=self.first, enforce_sorted=False)
        out, _ = self.layer(x)
        if self.packed:
            out, _ = nn.utils.rnn.pad_packed_sequence(out, batch_first=self.first, total_length=7)
        out = out if self.first else out.transpose(0, 1)
        return self.head(self.drop(out[torch.arange(len(out)), lengths - 1]))


METHODS = {
    "ensemble": lambda nets: vbdl.DeepEnsemble(nets),
    "dropout": lambda nets: vbdl.MCDropout(nets[0]),
    "mean-field": lambda nets: vbdl.MeanField(nets[0], n_data=10, initial_std=0.1),
}
CASES = list(itertools.product(CELLS, [1, 2], [False, True], [True, False], [False, True], METHODS))
FEW = CASES[::7]  # 7 divides no number of options, so every option is met with every other; all of them are thorough


def rows(count):
    return torch.randn(count, 7, 4), torch.arange(count) % 3 + 5


def in_turn(q, x, n_samples):
    """The outputs of each draw, one after the other, by torch's layers."""
    q = q.eval()
    q.prepare(x)
    drawn, shared = q.draws(torch.arange(n_samples), 0), q.shared()
    state = lambda s: {**shared, **{n: t[s] for n, t in drawn.items()}}
    return torch.stack([call(q.module, state(s), x) for s in range(n_samples)])


@pytest.mark.parametrize(
    "case", [pytest.param(c, id="-".join(map(str, c)), marks=() if c in FEW else pytest.mark.thorough) for c in CASES]
)
def test_predictions_are_those_of_the_draws_in_turn(case):
    """Each draw, its statistics, and the gradient of a prediction by the inputs."""
    *options, method = case
    q = METHODS[method]([Network(*options).eval() for _ in range(3)])
    x, lengths = rows(8)
    predict = Predictor(q, vbdl.Categorical(), 3, compile=False, joint=True)
    p = predict((x, lengths), samples=True)
    expected = in_turn(q, (x, lengths), 3).detach()
    torch.testing.assert_close(p.samples, expected, **ROUNDING)
    torch.testing.assert_close(predict((x[:1], lengths[:1])).probs, expected.softmax(-1).mean(0)[:1], **ROUNDING)
    x.requires_grad_()
    weights = torch.randn(8, 3)
    (found,) = torch.autograd.grad((predict((x, lengths)).mean * weights).sum(), x)
    (by_hand,) = torch.autograd.grad((in_turn(q, (x, lengths), 3).softmax(-1).mean(0) * weights).sum(), x)
    torch.testing.assert_close(found, by_hand, **ROUNDING)


@pytest.mark.parametrize("cell", ["GRU", pytest.param("LSTM", marks=pytest.mark.thorough)])
@pytest.mark.parametrize("method", ["ensemble", pytest.param("dropout", marks=pytest.mark.thorough)])
def test_compiled_predictions_are_those_of_the_draws_in_turn(cell, method):
    q, x = METHODS[method]([Network(cell, 2, False, True, False).eval() for _ in range(3)]), rows(8)
    predict = Predictor(q, vbdl.Categorical(), 3, compile=True)
    expected = in_turn(q, x, 3).softmax(-1).mean(0)
    for _ in range(2):
        torch.testing.assert_close(predict(x).probs, expected, **ROUNDING)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("packed", [False, True])
def test_linearized_layers_predict_in_float32(cell, packed):
    """Compiled and not, as in float64; every step of torch's LSTM lacks the derivative, or is in the graph."""
    torch.manual_seed(0)
    x, lengths = rows(8)
    q = vbdl.Laplace(Network(cell, 2, True, True, packed).eval(), parameters="all", structure="diagonal")
    vbdl.fit(q, ((x, lengths), torch.arange(8) % 3), vbdl.Categorical(), epochs=0, progress=False)
    predict = Predictor(q, vbdl.Categorical(), 3, compile=False, joint=True)
    p = predict((x, lengths), samples=True)
    whole = Predictor(copy.deepcopy(q).double(), vbdl.Categorical(), 3, compile=False, joint=True)
    expected = whole((x.double(), lengths), samples=True)
    torch.testing.assert_close(p.samples, expected.samples.float(), rtol=1e-4, atol=1e-4)
    if not packed:
        assert "tangents of recurrent layers" in predict.explain()
        compiled = predict.replace(compile=True)
        torch.testing.assert_close(compiled((x, lengths)).probs, p.probs, **ROUNDING)
    x.requires_grad_()
    (found,) = torch.autograd.grad(predict((x, lengths)).mean[:, 0].sum(), x)
    y = x.detach().double().requires_grad_()
    (by_hand,) = torch.autograd.grad(whole((y, lengths)).mean[:, 0].sum(), y)
    torch.testing.assert_close(found, by_hand.float(), rtol=1e-3, atol=1e-4)


def test_explain_says_how_recurrent_layers_run():
    said = lambda cell, method: Predictor(METHODS[method](nets(cell)), vbdl.Categorical(), 3).explain(rows(2))
    nets = lambda cell: [Network(cell, 2, False, True, False).eval() for _ in range(3)]
    assert "share one scan over time" in said("GRU", "ensemble")
    assert "runs one draw after the other" in said("LSTM", "ensemble")
    assert "draws are rows of one recurrent layer" in said("GRU", "dropout")
    assert "no draw changes runs once" in said("GRU", "dropout")


@pytest.mark.parametrize("method", METHODS)
def test_packed_draws_are_mapped_where_that_is_faster(method):
    q, x = METHODS[method]([Network("GRU", 2, False, True, True).eval() for _ in range(3)]), rows(8)
    n = 3 if method == "ensemble" else 9
    predict = Predictor(q, vbdl.Categorical(), n, compile=False, joint=True)
    torch.testing.assert_close(predict(x, samples=True).samples, in_turn(q, x, n).detach(), **ROUNDING)
    said = predict.explain()
    ((in_turn_ms, mapped_ms),) = re.findall(r"timed: (\S+) ms in turn, (\S+) ms mapped", said)
    assert f"strategy       {'mapped' if float(mapped_ms) < float(in_turn_ms) else 'plain'}" in said


def test_a_forward_that_counts_its_calls_is_not_mapped():
    """Mapped together the draws would count once."""

    class Counts(Network):
        def __init__(self):
            super().__init__("GRU", 2, False, True, True)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x, lengths):
            self.calls += 1
            return super().forward(x, lengths) + self.calls

    q, x = vbdl.MCDropout(Counts().eval()), rows(3)
    predict = Predictor(q, vbdl.Categorical(), 3, compile=False)
    p = predict(x, samples=True)
    assert "strategy       plain" in predict.explain()
    torch.testing.assert_close(predict(x, samples=True).samples, p.samples, rtol=0, atol=0)


class Variational(nn.Module):
    """A recurrent network that draws its weights in every forward, and writes into its noise."""

    def __init__(self, packed):
        super().__init__()
        self.inner = Network("LSTM", 2, False, True, packed)
        self.log_std = nn.Parameter(torch.full((3, 5), -1.0))

    def forward(self, x, lengths):
        scaled = torch.randn_like(self.log_std)
        scaled.mul_(self.log_std.exp())
        drawn = {"head.weight": self.inner.head.weight + scaled}
        return functional_call(self.inner, drawn, (x + 0.1 * torch.rand_like(x), lengths))


@pytest.mark.parametrize("packed", [False, True])
def test_noise_of_networks_that_draw_is_kept(packed, monkeypatch):
    """By `vbdl.Stochastic`: the draws of a loop over the network, and none is drawn twice as long as memory allows."""
    q, x, draws = vbdl.Stochastic(Variational(packed).eval()), rows(8), []
    for place in ("execution", "first_run"):
        monkeypatch.setattr(f"vbdl.engine.{place}.before_tracing", lambda *_: (ways.PLAIN, "said"))
    drawing = noise.normal
    monkeypatch.setattr(noise, "normal", lambda *args: draws.append(args) or drawing(*args))
    expected = in_turn(q, x, 4).detach()
    for budget in (2**30, 2):
        predict = Predictor(q, vbdl.Categorical(), 4, compile=False, memory_budget=budget)
        predict(x)
        draws.clear()
        for _ in range(2):
            torch.testing.assert_close(predict(x, samples=True).samples, expected, **ROUNDING)
        assert bool(draws) == (budget == 2)


class Forecast(nn.Module):
    """A recurrent layer beside something whose second derivative is not 0."""

    def __init__(self, cell):
        super().__init__()
        self.layer, self.head = layer(cell, both=True), nn.Linear(10, 2)

    def forward(self, x):
        return self.head(self.layer(x)[0][:, -1]) + x.square().sum((1, 2)).unsqueeze(1)


def linearized(network, x, **options):
    q = vbdl.Laplace(network, parameters="all", structure="diagonal")
    vbdl.fit(q, (x, torch.arange(len(x)) % 2), vbdl.Categorical(), epochs=0, progress=False)
    return Predictor(q, vbdl.Categorical(), 4, compile=False, **options)


@pytest.mark.parametrize("cell", ["GRU", "LSTM"])
@pytest.mark.parametrize("method", ["linearized", "ensemble"])
def test_predictions_have_second_derivatives(cell, method):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 6, dtype=torch.float64)
    nets = [Forecast(cell).double().eval() for _ in range(2)]
    predict = Predictor(vbdl.DeepEnsemble(nets), vbdl.Categorical(), compile=False)
    if method == "linearized":
        predict = linearized(nets[0], x)

    def slope(x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(predict(x).probs[:, 0].square().sum(), x, create_graph=True)[0], x

    along, step = torch.randn_like(x), 1e-6
    gradient, at = slope(x)
    (found,) = torch.autograd.grad((gradient * along).sum(), at)
    expected = (slope(x + step * along)[0] - slope(x - step * along)[0]) / (2 * step)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-7)


def test_linearized_layers_run_with_autocast():
    torch.manual_seed(0)
    x = torch.randn(4, 3, 6)
    assert linearized(Forecast("RNN").eval(), x, autocast=torch.bfloat16)(x).probs.isfinite().all()


def test_linearized_networks_differentiate_recurrent_layers_themselves():
    class Slope(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.GRU(4, 5, batch_first=True), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(torch.func.grad(lambda z: self.layer(z)[0].square().sum())(x).sum(1))

    torch.manual_seed(0)
    x = torch.randn(4, 3, 4)
    assert linearized(Slope().eval(), x)(x).probs.isfinite().all()
