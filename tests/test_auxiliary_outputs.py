"""`fit(auxiliary={output: weight})` adds the losses of further outputs, as a loop over them does."""

from collections import namedtuple

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import vbdl

ROWS, FEATURES, CLASSES, EPOCHS, LR = 24, 4, 3, 5, 0.05
Heads = namedtuple("Heads", ["logits", "early", "late"])


class Network(nn.Module):
    """A network with two auxiliary heads that it returns in training only, as a container of some kind."""

    def __init__(self, kind="named tuple"):
        super().__init__()
        self.kind = kind
        self.body, self.more = nn.Linear(FEATURES, 8), nn.Linear(8, 8)
        self.head, self.early, self.late = (nn.Linear(8, CLASSES) for _ in range(3))

    def forward(self, x):
        hidden = self.body(x).tanh()
        more = self.more(hidden).tanh()
        heads = Heads(self.head(more), self.early(hidden), self.late(more))
        if self.kind == "dict":  # also in prediction, as torchvision's segmentation networks do
            return heads._asdict()
        if not self.training:
            return heads.logits
        return tuple(heads) if self.kind == "tuple" else heads


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(ROWS, FEATURES, generator=generator), torch.randint(CLASSES, (ROWS,), generator=generator)


def network(kind="named tuple", seed=0):
    torch.manual_seed(seed)
    return Network(kind)


def options(**more):
    """Options of `fit` for full batches and plain gradient descent."""
    more = {"epochs": EPOCHS, "compile": False, "progress": False} | more
    return {"batch_size": ROWS, "optimizer": lambda ps: torch.optim.SGD(ps, lr=LR)} | more


def trained_by_a_loop(net, x, y, weights):
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    losses = []
    for _ in range(EPOCHS):
        optimizer.zero_grad()
        outputs = net.train()(x)
        parts = outputs if net.kind == "tuple" else list(outputs.values() if net.kind == "dict" else outputs)
        loss = cross_entropy(parts[0], y) + sum(w * cross_entropy(parts[i], y) for i, w in weights.items())
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return net, losses


METHODS = {
    "deterministic": lambda net, **choice: vbdl.Deterministic(net, **choice),
    "ensemble": lambda net, **choice: vbdl.DeepEnsemble([net, network(net.kind, seed=1)], **choice),
}
CASES = [(method, kind, False) for method in METHODS for kind in ("named tuple", "dict", "tuple")]


@pytest.mark.parametrize(("method", "kind", "compiled"), [*CASES, ("ensemble", "named tuple", True)])
def test_auxiliary_losses_are_those_of_a_loop(method, kind, compiled, data):
    q = METHODS[method](network(kind), **({"output": 0} if kind == "tuple" else {}))
    weights = {1: 0.3, 2: 0.5}
    named = {1: 0.3, -1: 0.5} if kind != "named tuple" else {"early": 0.3, "late": 0.5}
    history = vbdl.fit(q, data, vbdl.Categorical(), auxiliary=named, **options(compile=compiled))
    for m in range(q.n_members):
        by_loop, losses = trained_by_a_loop(network(kind, seed=m), *data, weights)
        torch.testing.assert_close(torch.tensor(history.train_loss)[:, m], torch.tensor(losses))
        trained = q.member(m) if method == "ensemble" else q.module.inner.state_dict()
        for name, value in by_loop.state_dict().items():
            torch.testing.assert_close(trained[name], value)


@pytest.mark.parametrize(
    "method", ["MeanField", "IVON", "SWAG", "Snapshots", "BatchEnsemble", "Masksembles", "Laplace"]
)
def test_every_method_trains_auxiliary_heads(method, data):
    arguments = {"MeanField": [ROWS], "IVON": [ROWS], "BatchEnsemble": [2], "Masksembles": [2, 2.0]}.get(method, [])
    more = {"parameters": ["head"]} if method == "Laplace" else {}
    heads = []
    for auxiliary in ({}, {"early": 1.0}):
        q = getattr(vbdl, method)(network(), *arguments, **more)
        given = {"optimizer": None} if method == "IVON" else {}
        vbdl.fit(q, data, vbdl.Categorical(), auxiliary=auxiliary, **options(**given))
        heads.append({name: t for name, t in q.state_dict().items() if "early" in name})
    assert heads[0] and any(not torch.equal(t, heads[1][name]) for name, t in heads[0].items())


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"missing": 0.3}, TypeError, "without a tensor 'missing' in training.*early"),
        ({"logits": 0.3}, ValueError, "whose weight is 1: leave it out"),
        ({"early": -1.0}, ValueError, "a number of at least 0"),
        ({"early": float("nan")}, ValueError, "a number of at least 0"),
        ({"early": "much"}, ValueError, "a number of at least 0"),
        ({None: 1.0}, TypeError, "by its name or index"),
        (["early"], TypeError, "map outputs to the weights"),
    ],
)
def test_auxiliary_outputs_that_are_none_are_refused(given, error, words, data):
    with pytest.raises(error, match=words):
        vbdl.fit(vbdl.Deterministic(network()), data, vbdl.Categorical(), auxiliary=given, **options())


def test_a_network_of_one_output_has_no_auxiliary_one(data):
    q = vbdl.Deterministic(nn.Linear(FEATURES, CLASSES))
    with pytest.raises(TypeError, match="returned Tensor without a tensor 'early'"):
        vbdl.fit(q, data, vbdl.Categorical(), auxiliary={"early": 0.3}, **options())
