"""PyTorch Geometric's layers by the wrapper of docs/networks.md."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import vbdl

geometric = pytest.importorskip("torch_geometric")
pytestmark = pytest.mark.slow

NODES, FEATURES, CLASSES = 12, 4, 3
TEXT = (Path(__file__).parents[2] / "docs" / "networks.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.S)
(CODE,) = [block for block in BLOCKS if "class OneGraph" in block]
(OF_GRAPHS,) = [block for block in BLOCKS if "class Graphs" in block]
LAYERS = {
    "sage": lambda a, b: geometric.nn.SAGEConv(a, b),
    "gin": lambda a, b: geometric.nn.GINConv(nn.Linear(a, b)),
    "gat": lambda a, b: geometric.nn.GATConv(a, b, add_self_loops=False),
    "gcn": lambda a, b: geometric.nn.GCNConv(a, b, add_self_loops=False),
}


class Network(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.first, self.second, self.drop = layer(FEATURES, 8), layer(8, CLASSES), nn.Dropout(0.2)

    def forward(self, x, edge_index):
        return self.second(self.drop(self.first(x, edge_index).relu()), edge_index)


@pytest.fixture
def data():
    torch.manual_seed(0)
    train = torch.arange(NODES) % 2 == 0
    edges = torch.randint(NODES, (2, 40))
    return geometric.data.Data(
        x=torch.randn(NODES, FEATURES),
        y=torch.randint(CLASSES, (NODES,)),
        edge_index=edges[:, edges[0] != edges[1]],
        train_mask=train,
        test_mask=~train,
    )


@pytest.mark.parametrize("layer", LAYERS)
def test_a_graph_is_one_row(layer, data):
    space = {"torch": torch, "nn": nn, "vbdl": vbdl, "data": data, "network": Network(LAYERS[layer])}
    quick = CODE.replace("batch_size=1", "batch_size=1, epochs=2, compile=False")
    exec(quick.replace("(q, likelihood)", "(q, likelihood, compile=False)"), space)
    assert space["prediction"].probs.shape == (1, NODES // 2, CLASSES)


@pytest.mark.parametrize("layer", LAYERS)
def test_members_are_those_of_the_network_itself(layer, data):
    space = {"torch": torch, "nn": nn, "vbdl": vbdl}
    exec(CODE.split("\n\n\nq, likelihood")[0], space)
    networks = [Network(LAYERS[layer]).eval() for _ in range(2)]
    q = vbdl.DeepEnsemble([space["OneGraph"](network, data.edge_index) for network in networks])
    inputs, _ = space["rows_of"](data, data.test_mask)
    samples = vbdl.Predictor(q, vbdl.Categorical(), compile=False)(inputs, samples=True).samples
    with torch.no_grad():
        expected = torch.stack([network(data.x, data.edge_index)[data.test_mask] for network in networks])
    torch.testing.assert_close(samples[:, 0], expected, rtol=1e-5, atol=1e-5)


class Pooled(nn.Module):
    """One output for each graph of a batch, of PyG's layers."""

    def __init__(self, layer):
        super().__init__()
        self.first, self.second, self.drop = layer(FEATURES, 8), layer(8, CLASSES), nn.Dropout(0.2)

    def forward(self, x, edge_index, batch):
        hidden = self.drop(self.first(x, edge_index).relu())
        return geometric.nn.global_mean_pool(self.second(hidden, edge_index), batch)


@pytest.fixture
def graphs():
    torch.manual_seed(0)
    sizes = [5, 3, 7, 5, 4]
    edges = [torch.randint(n, (2, 3 * n)) for n in sizes]
    return [geometric.data.Data(x=torch.randn(n, FEATURES), edge_index=e) for n, e in zip(sizes, edges, strict=True)]


def quickly(code):
    return code.replace("likelihood)\n", "likelihood, epochs=2, compile=False)\n", 1)


@pytest.mark.parametrize("layer", [*LAYERS, "gat with dropout"])
def test_graphs_of_different_sizes_are_rows(layer, graphs):
    layers = {**LAYERS, "gat with dropout": lambda a, b: geometric.nn.GATConv(a, b, dropout=0.3)}
    space = {"torch": torch, "nn": nn, "vbdl": vbdl, "graphs": graphs, "labels": torch.arange(5) % CLASSES}
    space["network"] = Pooled(layers[layer])
    exec(quickly(OF_GRAPHS), space)
    assert space["prediction"].probs.shape == (5, CLASSES)
    predict = vbdl.Predictor(space["q"], space["likelihood"], 4, tiles=(1, 8))
    rows = space["rows_of_graphs"]
    together = predict(rows(graphs), samples=True).samples
    for i, graph in enumerate(graphs):  # padded to another size, alone
        alone = predict(rows([graph]), samples=True).samples
        torch.testing.assert_close(alone[:, 0], together[:, i], rtol=1e-5, atol=1e-5)


def test_members_on_graphs_are_those_of_pygs_batches(graphs):
    space = {"torch": torch, "nn": nn, "vbdl": vbdl}
    exec(OF_GRAPHS.split("\n\n\nq, likelihood")[0], space)
    networks = [Pooled(LAYERS["gcn"]).eval() for _ in range(2)]
    q = vbdl.DeepEnsemble([space["Graphs"](network) for network in networks])
    batch = geometric.data.Batch.from_data_list(graphs)
    samples = vbdl.Predictor(q, vbdl.Categorical())(space["rows_of_graphs"](batch.to_data_list()), samples=True).samples
    with torch.no_grad():
        expected = torch.stack([network(batch.x, batch.edge_index, batch.batch) for network in networks])
    torch.testing.assert_close(samples, expected, rtol=1e-5, atol=1e-5)
