"""Element-wise operations before transpositions: the same bits, and products that follow each other without a copy."""

import pytest
import torch
from torch import nn

import vbdl
from vbdl.compiling.graph import trace
from vbdl.compiling.rewrite.loops import transpose_last

T = torch.ops.aten.transpose.int
a, w = torch.randn(3, 32, 64), torch.randn(3, 8, 32)


def chain(x, bias, weight):
    """As linear layers leave it: a bias and an activation between two products."""
    h = torch.relu((x.mT + bias).view(3, 64, 32))
    return torch.bmm(weight, h.mT)


def forks(x, bias, weight):
    """Two whole arguments, a mask, constants, and the view itself used beside."""
    y = x.mT
    h = torch.where(y > 0.1, torch.tanh(y) * 2.0, y + bias)
    return torch.bmm(weight, h.mT), h.sum(1), y


def untouched(x, bias, weight):
    """Arguments in two orders: whichever is chosen, one is read across."""
    return torch.bmm(weight, (x.mT + weight.new_ones(3, 64, 32)).mT), x.mT.contiguous().view(3, 4, 16, 32)


@pytest.mark.parametrize("function", [chain, forks, untouched])
@pytest.mark.parametrize("bias", [torch.randn(3, 1, 32), torch.randn(32), torch.tensor(0.3)], ids=["3", "1", "0"])
def test_the_same_bits(function, bias):
    graph = trace(function, a, bias, w, aligned=False)
    expected = graph(a, bias, w)
    transpose_last(graph)
    found = graph(a, bias, w)
    for x, y in zip(*((t if isinstance(t, tuple) else (t,)) for t in (found, expected)), strict=True):
        assert torch.equal(x, y) and x.stride() == y.stride()


def test_nothing_is_computed_on_a_transposed_view():
    graph = trace(chain, a, torch.randn(3, 1, 32), w, aligned=False)
    transpose_last(graph)
    pointwise = [n for n in graph.graph.nodes if torch.Tag.pointwise in getattr(n.target, "tags", ())]
    assert len(pointwise) == 2
    for node in pointwise:
        assert node.meta["val"].is_contiguous() and node.meta["val"].shape == (3, 32, 64)
        assert not any(n.target is T and n.meta["val"].shape == (3, 32, 64) for n in node.all_input_nodes)


@pytest.mark.parametrize("width", [50, 64])
def test_compiled_predictions_are_those_of_the_graph(width):
    network = nn.Sequential(nn.Linear(7, width), nn.ReLU(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3))
    predict = vbdl.Predictor(vbdl.DeepEnsemble(network, 4), vbdl.Categorical(), tiles=(64,))
    x = torch.randn(150, 7)
    found, expected = predict(x), predict.replace(compile=False)(x)
    torch.testing.assert_close(found.probs, expected.probs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.epistemic, expected.epistemic, rtol=1e-4, atol=1e-6)
    assert torch.equal(predict(x.flip(0)).probs.flip(0), found.probs)
