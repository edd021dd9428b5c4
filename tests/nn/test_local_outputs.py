"""The network as it is draws the outputs of the same layers as the graph, from the same counters."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vbdl
from vbdl.compiling.rewrite import layers_that_draw_outputs
from vbdl.likelihoods.gaussian import Gaussian
from vbdl.nn.drawn_uses import DrawnUses
from vbdl.nn.local_outputs import local_layers

ROWS, WIDTH = 5, 6


class Calls(nn.Module):
    """A module whose forward is this function of the module and its input."""

    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *args):
        return self.function(self, *args)


def dense():
    return nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU(), nn.Linear(8, 7, bias=False), nn.Tanh(), nn.Linear(7, 4))


def convolutional():
    return nn.Sequential(
        nn.Unflatten(1, (1, WIDTH)), nn.Conv1d(1, 3, 3), nn.BatchNorm1d(3), nn.Flatten(), nn.Linear(12, 4)
    )


def on_sequences():
    """The first layer acts on three vectors of a row, the second on one."""
    return Calls(
        lambda m, x: m.head(m.body(x.view(-1, 3, 2)).relu().mean(1)), body=nn.Linear(2, 8), head=nn.Linear(8, 4)
    )


def twice():
    """A layer that acts twice on a row, which makes its outputs dependent."""
    return Calls(lambda m, x: m.one(m.one(x).relu())[:, :4], one=nn.Linear(WIDTH, WIDTH))


def of_a_constant():
    """A layer of a learned vector, which no row changes."""
    return Calls(lambda m, x: m.head(x) + m.of(x.new_ones(1, 3)), head=nn.Linear(WIDTH, 4), of=nn.Linear(3, 4))


def by_matmul():
    return Calls(
        lambda m, x: F.linear(x @ m.a.weight.T, m.b.weight, m.b.bias), a=nn.Linear(WIDTH, 8), b=nn.Linear(8, 4)
    )


def with_attention():
    attention = nn.MultiheadAttention(2, 1, batch_first=True)
    run = lambda m, x: m.head(m.attention(*[x.view(-1, 3, 2)] * 3)[0].flatten(1))
    return Calls(run, attention=attention, head=nn.Linear(6, 4))


def looking_at_the_weight():
    return Calls(lambda m, x: m.head(x) * (m.head.weight.shape[0] / 4 + m.head.weight.norm()), head=nn.Linear(WIDTH, 4))


# the number of layers that draw outputs; None: the network as it is cannot tell
NETWORKS = {
    dense: 3, convolutional: 1, on_sequences: 1, by_matmul: 1, with_attention: 1,
    twice: None, of_a_constant: None, looking_at_the_weight: None,
}  # fmt: skip


def both(q, x, **settings):
    """The samples of the graph and of the network as it is, and the execution."""
    predict = vbdl.Predictor(q, Gaussian(4), 6, compile=False, tiles=len(x), **settings)
    flat = predict.check(x)
    (execution,) = predict.executions.drawing(flat)
    calls = execution._as_it_is("").calls
    inputs = calls.inputs(flat)
    plain = torch.cat([calls.run(i, "parameters", inputs)["parameters"] for i in range(len(calls))])
    again = torch.cat([calls.run(i, "parameters", inputs)["parameters"] for i in range(len(calls))])
    assert torch.equal(plain, again)
    return execution.parameters(flat), plain, execution


@pytest.mark.parametrize("rows", [1, ROWS])
@pytest.mark.parametrize("make", NETWORKS)
def test_the_network_as_it_is_has_the_draws_of_the_graph(make, rows):
    torch.manual_seed(0)
    graph, plain, execution = both(vbdl.MeanField(make(), 100), torch.randn(rows, WIDTH))
    assert execution._first.local == NETWORKS[make]
    if execution._first.local is not None:
        assert layers_that_draw_outputs(execution.graph_plan.reasons) == execution._first.local
        torch.testing.assert_close(plain, graph, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("parameters", [["0"], ["0.weight", "4"], ["4.bias"]])
def test_with_some_parameters_drawn(parameters):
    torch.manual_seed(0)
    graph, plain, execution = both(vbdl.MeanField(dense(), 100, parameters=parameters), torch.randn(ROWS, WIDTH))
    assert execution._first.local is not None
    torch.testing.assert_close(plain, graph, rtol=1e-4, atol=1e-5)


def test_joint_draws_weights():
    graph, plain, execution = both(vbdl.MeanField(dense(), 100), torch.randn(ROWS, WIDTH), joint=True)
    assert not execution._first.local_layers
    torch.testing.assert_close(plain, graph, rtol=1e-4, atol=1e-5)


def test_equal_rows_do_not_tell_what_depends_on_them():
    weight = torch.ones(4, WIDTH)
    with DrawnUses({"weight": weight}) as uses:
        F.linear(torch.ones(ROWS, WIDTH), weight)
    assert local_layers(uses, uses, ROWS) is None


def test_the_first_answer_is_that_of_the_graph_and_needs_no_trace(monkeypatch):
    torch.manual_seed(0)
    q, x = vbdl.MeanField(dense(), 100), torch.randn(ROWS, WIDTH)
    expected = vbdl.Predictor(q, Gaussian(4), 6, compile=False)(x).mean
    predict = vbdl.Predictor(q, Gaussian(4), 6, compile="background")
    monkeypatch.setattr("vbdl.engine.execution.Execution._begin", lambda self: None)
    monkeypatch.setattr("vbdl.engine.execution.Execution._graph", None)
    torch.testing.assert_close(predict(x).mean, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compile", [False, "background"])
@pytest.mark.parametrize("of_rows", [False, True])
def test_a_layer_of_a_constant_has_the_same_draws_alone_and_in_a_batch(of_rows, compile):
    torch.manual_seed(0)
    forward = lambda m, x: m.head(x) + m.of(x.new_ones(len(x) if of_rows else 1, 3))
    net = Calls(forward, head=nn.Linear(WIDTH, 4), of=nn.Linear(3, 4))
    predict, x = vbdl.Predictor(vbdl.MeanField(net, 100), Gaussian(4), 6, compile=compile), torch.randn(ROWS, WIDTH)
    for _ in range(2):
        alone = torch.cat([predict(row, samples=True).samples for row in x.split(1)], 1)
        torch.testing.assert_close(predict(x, samples=True).samples, alone, rtol=1e-4, atol=1e-5)
        predict.wait()
