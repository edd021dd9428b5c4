"""Networks that compute weights from parameters: their layers act on tensors without a batch axis."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vbdl
from vbdl.engine.predictor import Predictor

ROUNDING = {"rtol": 1e-5, "atol": 2e-6}


class Hyper(nn.Module):
    """A linear layer whose weights are what another layer computes from a parameter."""

    def __init__(self, layer, shape):
        super().__init__()
        self.layer, self.code, self.drop = layer, nn.Parameter(torch.randn(shape)), nn.Dropout(0.3)

    def forward(self, x):
        made = self.layer(self.drop(self.code))
        return F.linear(x, (made[0] if isinstance(made, tuple) else made).reshape(-1)[:18].view(3, 6))


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.MultiheadAttention(6, 2, 0.2)

    def forward(self, x):
        return self.layer(x, x, x)


class Pairs(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Bilinear(5, 5, 18)

    def forward(self, x):
        return self.layer(x, x)


LAYERS = {
    "linear": (lambda: nn.Linear(5, 18), (5,)),
    "two linear": (lambda: nn.Sequential(nn.Linear(5, 300, bias=False), nn.Tanh(), nn.Linear(300, 18)), (5,)),
    "linear of rows": (lambda: nn.Linear(6, 6), (3, 6)),
    "bilinear": (Pairs, (5,)),
    "layer norm": (lambda: nn.LayerNorm(18), (18,)),
    "convolution": (lambda: nn.Conv2d(2, 2, 2), (2, 4, 4)),
    "transposed convolution": (lambda: nn.ConvTranspose1d(2, 3, 3), (2, 8)),
    "pooling": (lambda: nn.AvgPool1d(2), (2, 18)),
    "GRU": (lambda: nn.GRU(4, 9), (2, 4)),
    "LSTM cell": (lambda: nn.LSTMCell(4, 18), (4,)),
    "attention": (Attends, (3, 6)),
}
METHODS = {
    "ensemble": lambda make: vbdl.DeepEnsemble([make().eval() for _ in range(3)]),
    "dropout": lambda make: vbdl.MCDropout(make().eval()),
    "mean-field": lambda make: vbdl.MeanField(make().eval(), n_data=100),
}


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", LAYERS)
def test_layers_that_see_no_rows(name, method, compile):
    """Draws are those of each row alone, and members are those of a loop over them."""
    layer, shape = LAYERS[name]
    made = []
    q = METHODS[method](lambda: made.append(Hyper(layer(), shape)) or made[-1])
    x = torch.randn(5, 6)
    predict = Predictor(q, vbdl.Gaussian(3), 3, compile=compile, joint=True)
    found = predict(x, samples=True).samples[..., 0]
    assert found.std(0).mean() > 1e-4
    torch.testing.assert_close(predict(x[:1], samples=True).samples[..., 0], found[:, :1], **ROUNDING)
    if method == "ensemble":
        with torch.no_grad():
            torch.testing.assert_close(found, torch.stack([net(x) for net in made]), **ROUNDING)
