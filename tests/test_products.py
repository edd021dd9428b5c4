"""Large products of a training step go to oneDNN where that is faster, and give the same numbers up to rounding."""

import pytest
import torch
from torch import nn

import vbdl
from vbdl.compiling import products
from vbdl.compiling.graph import trace
from vbdl.engine import program

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN here")
_OWN = products.product


@pytest.fixture(params=[True, False], ids=["pays", "does not pay"])
def pays(request, monkeypatch):
    monkeypatch.setattr(products, "_pays", lambda: request.param)
    return request.param


def _replaced(function, *inputs):
    """The number of products that are replaced in the graph of a function, whose results are compared."""
    graph = trace(function, *inputs, aligned=False)
    expected = graph(*inputs)
    products.faster_products(graph)
    for a, b in zip(graph(*inputs), expected, strict=True):
        torch.testing.assert_close(a, b)
    shapes = [(n.meta["val"].shape, n.meta["val"].stride()) for n in graph.graph.nodes if n.target is _OWN]
    return len(shapes)


def test_large_products_are_replaced(pays):
    x, w, bias = torch.randn(256, 160), torch.randn(160, 130), torch.randn(130)
    assert _replaced(lambda x, w: (x @ w,), x, w) == pays
    assert _replaced(lambda x, w: (x @ w.t(),), x, w.t().contiguous()) == pays
    assert _replaced(lambda x, w, bias: (torch.addmm(bias, x, w),), x, w, bias) == pays
    assert _replaced(lambda x, w: (x @ w,), torch.randn(3, 256, 160), torch.randn(3, 160, 130)) == pays


@pytest.mark.parametrize("pays", [True], indirect=True)
def test_other_products_stay(pays):
    x, w = torch.randn(256, 160), torch.randn(160, 130)
    assert _replaced(lambda x, w: (x @ w,), x[:64], w) == 0  # small
    assert _replaced(lambda x, w: (x @ w,), torch.randn(4000, 160), w[:, :10]) == 0  # narrow
    assert _replaced(lambda x, w: (x @ w,), x.double(), w.double()) == 0
    assert _replaced(lambda x, w: (x.t() @ w,), torch.randn(160, 200), w) == 0  # small for a copy of a factor
    assert _replaced(lambda x, w, b: (torch.addmm(b, x, w),), x, w, torch.randn(256, 130)) == 0
    assert _replaced(lambda x, w, b: (torch.addmm(b, x, w, beta=2),), x, w, torch.randn(130)) == 0


@pytest.mark.parametrize("pays", [True], indirect=True)
def test_factors_and_biases_may_have_any_strides(pays):
    x, w, bias = torch.randn(256, 160), torch.randn(160, 130), torch.randn(1)
    add = lambda x, w, bias: (torch.addmm(bias, x, w),)
    assert _replaced(lambda x, w, bias: add(x, w, bias.expand(130)), x, w, bias) == 1
    assert _replaced(lambda x, w, bias: add(x, w, bias[:, 1]), x, w, torch.randn(130, 3)) == 1
    assert _replaced(add, x, w, bias) == 0
    for other in (torch.randn(160, 260)[:, ::2], torch.randn(130, 160).t(), torch.randn(160, 1).expand(160, 130)):
        assert _replaced(add, x, other, torch.randn(130)) == 1
        assert _replaced(lambda x, w: (x @ w,), torch.randn(512, 160)[::2], other) == 1


def test_the_operator_keeps_torchs_rules():
    a, b, bias = torch.randn(64, 48), torch.randn(48, 40), torch.randn(40)
    for given in ((a, b), (a, b, bias), (torch.randn(3, 64, 48), torch.randn(3, 48, 40))):
        torch.library.opcheck(_OWN, given, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("members", [1, 2])
@pytest.mark.parametrize("pays", [True], indirect=True)
def test_training_gives_the_same_numbers_up_to_rounding(pays, members):
    torch.manual_seed(0)
    data = torch.randn(1024, 24), torch.randn(1024, 1)
    net = nn.Sequential(nn.Linear(24, 160), nn.Tanh(), nn.Linear(160, 160), nn.Tanh(), nn.Linear(160, 1))
    losses = []
    for compile in (True, False):
        q = vbdl.DeepEnsemble(net, members) if members > 1 else vbdl.Deterministic(net)
        history = vbdl.fit(q, data, vbdl.Gaussian(), epochs=3, batch_size=256, lr=1e-3, compile=compile, progress=False)
        losses.append(torch.tensor(history.train_loss))
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)


class Tokens(nn.Module):
    """Layers on several tokens a row."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Dropout(0.1), nn.Linear(96, 64))

    def forward(self, x):
        return self.layers(x).mean(1)


@pytest.mark.parametrize("method", ["dropout", "ensemble"])
@pytest.mark.parametrize("pays", [True], indirect=True)
def test_predictions_and_their_gradients_are_the_same_up_to_rounding(pays, method, monkeypatch):
    torch.manual_seed(0)
    q = vbdl.MCDropout(Tokens()) if method == "dropout" else vbdl.DeepEnsemble([Tokens().eval() for _ in range(3)])
    x, ran = torch.randn(6, 80, 64, requires_grad=True), []
    monkeypatch.setattr(products, "faster_products", lambda g, f=products.faster_products: ran.append(f(g)))
    monkeypatch.setattr(program, "faster_products", products.faster_products)
    predict = vbdl.Predictor(q, vbdl.Categorical(), 3, compile=True, tiles=6)
    p = predict(x.detach()).probs
    (found,) = torch.autograd.grad(predict(x).probs[:, 0].sum(), x)
    assert ran
    monkeypatch.setattr(products, "_pays", lambda: False)
    other = vbdl.Predictor(q, vbdl.Categorical(), 3, compile=False, tiles=6)
    torch.testing.assert_close(p, other(x.detach()).probs)
    torch.testing.assert_close(found, torch.autograd.grad(other(x).probs[:, 0].sum(), x)[0], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("pays", [True], indirect=True)
def test_rows_that_are_promised_their_bits_keep_their_products(pays, monkeypatch):
    monkeypatch.setattr(program, "faster_products", lambda graph: pytest.fail("products were replaced"))
    vbdl.Predictor(vbdl.MCDropout(Tokens()), vbdl.Categorical(), 4, compile=True, tiles=64)(torch.randn(70, 8, 64))
