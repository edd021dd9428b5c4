"""Networks that count their steps in an attribute, as for a warm-up or a temperature, train as a loop trains them."""

import logging

import pytest
import torch
from torch import nn

import vbdl
from vbdl.calling.attributes import OfMembers

STEPS = 24


class Counts(nn.Module):
    """The output grows with the number of training steps; kept in a number, or in a table or list of numbers."""

    def __init__(self, kind: str = "number", recurrent: bool = False):
        super().__init__()
        self.kind, self.steps, self.table, self.listed = kind, 0, {"steps": 0}, [0]
        self.register_buffer("counted", torch.zeros(()))
        self.first = nn.RNN(6, 8, batch_first=True) if recurrent else nn.Linear(6, 8)
        self.drop, self.last = nn.Dropout(0.0), nn.Linear(8, 3)
        self.seen: list[int] = []

    def forward(self, x):
        if self.training:
            self.steps += self.kind == "number"
            self.table["steps"] += self.kind == "table"
            self.listed[0] += self.kind == "list"
            if self.kind == "buffer":
                self.counted = self.counted + 1.0
        t = self.counted if self.kind == "buffer" else self.steps + self.table["steps"] + self.listed[0]
        h = self.first(x[:, None])[0][:, 0] if isinstance(self.first, nn.RNN) else self.first(x)
        return self.last(self.drop(h.tanh())) * (1 - 0.9**t)


class CountsAndDrops(Counts):
    """The same with dropout, which MC dropout needs."""

    def __init__(self, kind: str = "number", recurrent: bool = False):
        super().__init__(kind, recurrent)
        self.drop = nn.Dropout(0.3)


METHODS = {
    "deterministic": lambda make: vbdl.Deterministic(make()),
    "dropout": lambda make: vbdl.MCDropout(make()),
    "ensemble": lambda make: vbdl.DeepEnsemble([make(), make()]),
    "mean-field": lambda make: vbdl.MeanField(make(), n_data=64),
}


def trained(method: str, kind: str, recurrent: bool, compile: bool | None) -> list[torch.Tensor]:
    """The parameters after a training of 24 steps."""
    torch.manual_seed(0)
    network = CountsAndDrops if method == "dropout" else Counts
    q = METHODS[method](lambda: network(kind, recurrent))
    torch.manual_seed(1)
    x, y = torch.randn(64, 6), torch.randint(3, (64,))
    vbdl.fit(q, (x, y), vbdl.Categorical(), epochs=STEPS // 2, batch_size=32, lr=0.05, compile=compile)
    return [p.detach().clone() for p in q.parameters()]


@pytest.mark.parametrize("compile", [None, True, False])
@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["number", "table", "list"])
def test_every_member_counts_every_step_once(kind, method, recurrent, compile, caplog):
    if (recurrent or kind != "number") and compile is True:
        pytest.skip("compiling is not what differs here")
    with caplog.at_level(logging.ERROR):
        found = trained(method, kind, recurrent, compile)
        expected = trained(method, "buffer", recurrent, False)  # torch and vbdl know of buffers
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0.0, atol=2e-4)


class Looks(nn.Sequential):
    """The forward keeps the sizes of its batch, which are the same at every step."""

    def forward(self, x):
        self.rows, self.sizes = x.shape[0], tuple(x.shape)
        return super().forward(x)


def test_a_number_that_follows_from_the_batch_keeps_no_step_from_being_compiled(caplog):
    q = vbdl.Deterministic(Looks(nn.Linear(6, 3)))
    vbdl.fit(
        q, (torch.randn(64, 6), torch.randint(3, (64,))), vbdl.Categorical(), epochs=2, batch_size=32, compile=True
    )
    assert "cannot be compiled" not in caplog.text


def test_it_is_said_why_the_step_is_not_compiled(caplog):
    trained("deterministic", "number", False, True)
    assert "the network changes a number in an attribute at every step" in caplog.text


@pytest.mark.parametrize("first", [0, 1])
def test_a_count_may_begin_late_and_in_one_member_alone(first):
    net = Counts()
    turns, seen = OfMembers(net, 2), ([], [])
    for step in range(4):
        for member in (0, 1):
            with turns.turn(member):
                net.steps += step >= 2 * (member == first)
                seen[member].append(net.steps)
    assert seen[first] == [0, 0, 1, 2] and seen[1 - first] == [1, 2, 3, 4]
