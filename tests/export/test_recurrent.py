"""Recurrent networks in the graph of a package: one step in the graph, whatever the length, with the same values."""

import itertools

import pytest
import torch
from torch import fx, nn

import vbdl
from vbdl.export.graph import tile_call
from vbdl.nn.recurrent_layer import recurrent_layer

# sums of at most a few hundred float32 terms of order 1, through seven steps: 1e-7 each, with a margin of ten
ROUNDING: dict = {"rtol": 1e-5, "atol": 1e-5}
LAYERS = {
    "GRU": lambda: nn.GRU(3, 5, 2, batch_first=True),
    "both ways": lambda: nn.GRU(3, 5, batch_first=True, bidirectional=True, bias=False),
    "LSTM": lambda: nn.LSTM(3, 5, batch_first=True),
    "projected": lambda: nn.LSTM(3, 5, 2, batch_first=True, proj_size=2, bidirectional=True),
    "in float64": lambda: nn.LSTM(3, 5, batch_first=True).double(),
    "RNN": lambda: nn.RNN(3, 5, batch_first=True, nonlinearity="relu"),
}


class Network(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.drop, self.layer = nn.Dropout(0.2), layer()
        size = (self.layer.proj_size or 5) * (1 + self.layer.bidirectional)
        self.out = nn.Linear(size, 2, dtype=self.layer.weight_ih_l0.dtype)

    def forward(self, x):
        outputs, final = self.layer(self.drop(x))
        h = final[0] if isinstance(final, tuple) else final
        return self.out(outputs[:, -1]) + h.sum((0, 2)).unsqueeze(1)


def linearized(layer):
    network = Network(layer).eval()
    posterior = vbdl.Laplace(network, parameters="all", structure="diagonal")
    rows = torch.randn(6, 4, 3, dtype=network.out.weight.dtype), torch.arange(6) % 2
    vbdl.fit(posterior, rows, vbdl.Categorical(), epochs=0, progress=False)
    return posterior


METHODS = {
    "members": lambda layer: vbdl.DeepEnsemble([Network(layer).eval() for _ in range(3)]),
    "dropout": lambda layer: vbdl.MCDropout(Network(layer)),
    "drawn weights": lambda layer: vbdl.MeanField(Network(layer), 100),
    "linearized": linearized,
}


def graphs(module):
    return [module, *(m for m in module.modules() if isinstance(m, fx.GraphModule) and m is not module)]


def cases():
    """Every layer, method and backend; thorough where the graph of another case has the same scan."""
    for layer, method, backend in itertools.product(LAYERS, METHODS, ["aoti", "onnx"]):
        own = method == "members" and backend == "aoti"
        own |= method == "linearized" and backend == "onnx" and layer in ("both ways", "projected")
        yield pytest.param(method, layer, backend, marks=[] if own else pytest.mark.thorough)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize(("method", "layer", "backend"), list(cases()))
def test_a_graph_of_any_length_has_one_step(method, layer, backend):
    torch.manual_seed(0)
    posterior = METHODS[method](LAYERS[layer])
    predict = vbdl.Predictor(posterior, vbdl.Categorical(), 3, compile=False, tiles=4, joint=True)
    sizes = []
    for steps in (3, 7):
        x = torch.randn(4, steps, 3, dtype=torch.float64 if "float64" in layer else torch.float32)
        call = tile_call(predict, predict.check(x), backend)
        fields = call.module(torch.tensor(predict.seed), x)
        torch.testing.assert_close(fields[call.fields.index("probs")], predict(x).probs, **ROUNDING)
        nodes = [node for graph in graphs(call.module) for node in graph.graph.nodes]
        sizes.append(len(nodes))
        if backend == "aoti":
            assert all(node.target is not recurrent_layer for node in nodes)
    assert sizes[0] == sizes[1]
