"""Networks that keep what they compute from their weights: each draw computes its own."""

import collections
import functools
import types

import pytest
import torch
from torch import Tensor, nn

import vbdl
from vbdl.calling.attributes import Attributes


class Keeps(nn.Module):
    """A network that uses a normalized weight; a subclass keeps it."""

    def __init__(self):
        super().__init__()
        self.a, self.inside, self.b = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.kept: Tensor | None = None
        self.table: dict[str, Tensor] = {}
        self.listed: list[Tensor] = []

    def normalized(self) -> Tensor:
        return self.inside.weight / self.inside.weight.norm()

    def weight(self) -> Tensor:
        return self.normalized()

    def forward(self, x: Tensor) -> Tensor:
        return self.b((self.a(x) @ self.weight()).tanh())


class InAnAttribute(Keeps):
    def weight(self):
        if self.kept is None:
            self.kept = self.normalized()
        return self.kept


class InANewAttribute(Keeps):
    def weight(self):
        if not hasattr(self, "later"):
            self.later = self.normalized()
        return self.later


class InATable(Keeps):
    def weight(self):
        if "weight" not in self.table:
            self.table["weight"] = self.normalized()
        return self.table["weight"]


class InAnOrderedTable(InATable):
    def __init__(self):
        super().__init__()
        self.table = collections.OrderedDict()


class Deep(Keeps):
    """In a table of an object in a list."""

    def __init__(self):
        super().__init__()
        self.listed = [types.SimpleNamespace(table=collections.defaultdict(dict))]

    def weight(self):
        table = self.listed[0].table["weights"]
        if "weight" not in table:
            table["weight"] = self.normalized()
        return table["weight"]


class InAQueue(Keeps):
    def __init__(self):
        super().__init__()
        self.queue = collections.deque(maxlen=3)

    def weight(self):
        if not self.queue:
            self.queue.append(self.normalized())
        return self.queue[0]


class InAList(Keeps):
    def weight(self):
        if not self.listed:
            self.listed.append(self.normalized())
        return self.listed[0]


class AsAProperty(Keeps):
    @functools.cached_property
    def cached(self):
        return self.normalized()

    def weight(self):
        return self.cached


class InACache(Keeps):
    @functools.lru_cache(maxsize=8)  # noqa: B019
    def weight(self):
        return self.normalized()


KINDS = [
    Keeps, InAnAttribute, InANewAttribute, InATable, InAnOrderedTable, InAList, InAQueue, Deep, AsAProperty, InACache,
]  # fmt: skip


def build(kind: type[Keeps], seed: int = 0) -> Keeps:
    torch.manual_seed(seed)
    return kind().eval()


@pytest.mark.parametrize("compiled", [False, "background"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_each_member_keeps_its_own(kind, rows, compiled):
    x = torch.randn(rows, 6)
    with torch.no_grad():
        expected = torch.stack([build(kind, m)(x) for m in range(3)]).mean(0)
    predict = vbdl.Predictor(
        vbdl.DeepEnsemble([build(kind, m) for m in range(3)]), vbdl.Gaussian(3), compile=compiled, tiles=(rows,)
    )
    for _ in range(2):
        torch.testing.assert_close(predict(x).mean, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_each_draw_keeps_its_own(kind):
    x = torch.randn(2, 6)
    q = vbdl.MeanField(build(kind), n_data=10, initial_std=0.3)
    same = vbdl.MeanField(build(Keeps), n_data=10, initial_std=0.3)
    found, expected = (
        vbdl.Predictor(p, vbdl.Gaussian(3), 20, joint=True, compile="background")(x, samples=True).samples
        for p in (q, same)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_attributes_are_taken_back(kind):
    net, x = build(kind), torch.randn(2, 6)
    attributes, before = Attributes(net), {n: repr(v) for n, v in vars(net).items()}
    expected = net(x)
    assert attributes.restore() == (kind is not Keeps)
    assert {n: repr(v) for n, v in vars(net).items()} == before
    assert attributes.restore() == (kind is InACache)  # what a function keeps is not known
    torch.testing.assert_close(net(x), expected)
