"""Graph networks: the wrapper of docs/networks.md, whose rows are graphs and whose targets belong to chosen nodes."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vbdl

NODES, FEATURES, CLASSES = 12, 4, 3
TEXT = (Path(__file__).parents[1] / "docs" / "networks.md").read_text()
(CODE,) = [block for block in re.findall(r"```python\n(.*?)```", TEXT, re.S) if "class OneGraph" in block]
DEFINITIONS, USE = CODE.split("\n\n\nq, likelihood")


class Neighbors(nn.Module):
    """Two layers that add the sum over a node's neighbors: GraphSAGE with sums (Hamilton et al., 2017)."""

    def __init__(self):
        super().__init__()
        self.own = nn.ModuleList([nn.Linear(FEATURES, 8), nn.Linear(8, CLASSES)])
        self.near = nn.ModuleList([nn.Linear(FEATURES, 8), nn.Linear(8, CLASSES)])
        self.drop = nn.Dropout(0.2)

    def forward(self, x, edge_index):
        for own, near in zip(self.own, self.near, strict=True):
            sums = torch.zeros_like(x).index_add(0, edge_index[1], x[edge_index[0]])
            x = own(self.drop(x.tanh())) + near(sums)
        return x


@pytest.fixture
def data():
    """A graph as PyTorch Geometric's `Data` holds it."""
    generator = torch.Generator().manual_seed(0)
    train = torch.arange(NODES) % 2 == 0
    return SimpleNamespace(
        x=torch.randn(NODES, FEATURES, generator=generator),
        y=torch.randint(CLASSES, (NODES,), generator=generator),
        edge_index=torch.randint(NODES, (2, 40), generator=generator),
        train_mask=train,
        test_mask=~train,
    )


def defined(**names):
    space = {"torch": torch, "nn": nn, "vbdl": vbdl, **names}
    exec(DEFINITIONS, space)
    return space


def test_the_code_of_the_document_runs(data):
    space = defined(network=Neighbors(), data=data)
    quick = USE.replace("batch_size=1", "batch_size=1, epochs=3, compile=False")
    exec(f"q, likelihood{quick}".replace("(q, likelihood)", "(q, likelihood, compile=False)"), space)
    assert space["prediction"].probs.shape == (1, NODES // 2, CLASSES)
    assert space["prediction"].epistemic.shape == (1, NODES // 2)


def test_members_train_and_predict_as_by_a_loop(data):
    networks = []
    for seed in range(2):
        torch.manual_seed(seed)
        networks.append(Neighbors().eval())
        networks[-1].drop.p = 0.0
    space = defined()
    wrap, rows = space["OneGraph"], space["rows_of"]
    q, likelihood = vbdl.DeepEnsemble([wrap(network, data.edge_index) for network in networks]), vbdl.Categorical()
    train, y = rows(data, data.train_mask)
    sgd = lambda ps: torch.optim.SGD(ps, lr=0.01)  # noqa: E731
    vbdl.fit(q, (train, y), likelihood, epochs=3, batch_size=1, optimizer=sgd, compile=False)
    samples = vbdl.Predictor(q, likelihood, compile=False)(rows(data, data.test_mask)[0], samples=True).samples
    for number, network in enumerate(networks):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            logits = network(data.x, data.edge_index)[data.train_mask]
            # the likelihood of a row, here a graph, is the sum over its nodes
            F.cross_entropy(logits, data.y[data.train_mask], reduction="sum").backward()
            optimizer.step()
        with torch.no_grad():
            expected = network(data.x, data.edge_index)[data.test_mask]
        torch.testing.assert_close(samples[number, 0].log_softmax(-1), expected.log_softmax(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", [vbdl.MCDropout, lambda network: vbdl.MeanField(network, NODES)])
def test_nodes_as_rows_are_refused_with_the_wrapper_to_use(method, data):
    class Nodes(Neighbors):
        def forward(self, x):
            return super().forward(x, data.edge_index)

    with pytest.raises(ValueError, match="make the graph one row"):
        vbdl.fit(method(Nodes()), (data.x, data.y), vbdl.Categorical(), compile=False)


class Adjacent(nn.Module):
    """A graph convolution with a sparse adjacency, as a buffer or as a plain attribute."""

    def __init__(self, adjacency, as_buffer):
        super().__init__()
        self.first, self.head = nn.Linear(3, 6), nn.Linear(6, 3)
        if as_buffer:
            self.register_buffer("adjacency", adjacency)
        else:
            self.adjacency = adjacency

    def forward(self, x):  # (batch, nodes, features)
        h = self.first(x)
        flat = h.transpose(0, 1).flatten(1)
        h = torch.sparse.mm(self.adjacency, flat).unflatten(1, h.shape[::2]).transpose(0, 1)
        return self.head(h.relu().mean(1))


@pytest.mark.parametrize("as_buffer", [True, False])
@pytest.mark.parametrize("equal", [True, False])
def test_ensembles_take_sparse_tensors(as_buffer, equal):
    torch.manual_seed(0)
    adjacency = [(torch.rand(7, 7) < 0.3).float().to_sparse() for _ in range(3)]
    nets = [Adjacent(adjacency[0].clone() if equal else a, as_buffer).eval() for a in adjacency]
    x, y = torch.randn(8, 7, 3), torch.arange(8) % 3
    q = vbdl.DeepEnsemble(nets)
    expected = torch.stack([net(x).detach().softmax(-1) for net in nets]).mean(0)
    for compile in (False, True):
        torch.testing.assert_close(vbdl.Predictor(q, vbdl.Categorical(), compile=compile)(x).probs, expected)
    vbdl.fit(q, (x, y), vbdl.Categorical(), epochs=1, progress=False)
    assert not torch.equal(vbdl.Predictor(q, vbdl.Categorical(), compile=False)(x).probs, expected)
