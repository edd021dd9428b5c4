"""Repeated blocks of a graph are found by what they compute, compiled once, and give the same numbers."""

import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

import vbdl
from vbdl.calling.graphs import without_fused_attention
from vbdl.compiling import cache, compiler, repeated
from vbdl.compiling.compiler import compile_graph
from vbdl.compiling.graph import trace
from vbdl.compiling.repeated import Joined, parts


@pytest.fixture(autouse=True)
def _small_blocks_too(monkeypatch):
    """Blocks of any work are parts of their own: those of a test are small."""
    monkeypatch.setattr(repeated, "_WORK", 0)


_ADD = torch.ops.aten.add.Tensor


class _Layers(nn.Module):
    """Equal transformer layers under one mask."""

    def __init__(self, layers: int, width: int = 16):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 32, batch_first=True, norm_first=True) for _ in range(layers)
        )
        self.first, self.last = nn.Linear(8, width), nn.Linear(width, 3)
        self.eval()

    def forward(self, x):
        mask = torch.zeros(x.shape[1], x.shape[1]).masked_fill(torch.ones(x.shape[1], x.shape[1]).triu(1).bool(), -1e9)
        h = self.first(x)
        for layer in self.layers:
            h = layer(h, mask)
        return self.last(h.mean(1))


def _traced(network, x):
    """The network as a graph of its parameters and x, with random numbers in the parameters."""
    names = [n for n, _ in network.named_parameters()]
    values = [torch.randn_like(p) * 0.2 for p in network.parameters()]

    def function(*args):
        return (torch.func.functional_call(network, dict(zip(names, args, strict=False)), (args[-1],)),)

    with torch.no_grad(), without_fused_attention():
        return trace(function, *values, x, aligned=False), [*values, x]


def test_parts_that_are_stored_are_not_run_to_load_them(compiled, monkeypatch):
    graph, inputs = _traced(_Layers(6), torch.randn(2, 5, 8))
    expected = compile_graph(graph, inputs)(*inputs)[0]
    before, run = len(compiled), []
    load = compiler.stored.load

    def loaded(key):
        call = load(key)
        return None if call is None else lambda arguments: run.append(key) or call(arguments)

    monkeypatch.setattr(compiler.stored, "load", loaded)
    call = compile_graph(graph, inputs)
    assert isinstance(call, Joined) and len(compiled) == before and not run
    assert torch.equal(call(*inputs)[0], expected) and len(run) > len(set(run))


@pytest.mark.parametrize("text", ["", "[]", "3", "[[]]", "broken"])
def test_what_is_wrongly_known_of_parts_changes_nothing(text, compiled):
    graph, inputs = _traced(_Layers(6), torch.randn(2, 5, 8))
    expected = compile_graph(graph, inputs)(*inputs)[0]
    (file,) = Path(str(cache.folder())).glob("vbdl/**/*.parts")
    known = file.read_text()
    file.write_text(known.replace("5", "7") if text == "broken" else text)
    assert torch.equal(compile_graph(graph, inputs)(*inputs)[0], expected)
    assert file.read_text() == known


def test_equal_layers_are_compiled_once(compiled):
    graph, inputs = _traced(_Layers(6), torch.randn(2, 5, 8))
    found = parts(graph)
    call = compile_graph(graph, inputs)
    torch.testing.assert_close(call(*inputs)[0], graph(*inputs)[0], rtol=1e-4, atol=1e-5)
    assert isinstance(call, Joined) and len(compiled) == 3 < len(found)  # before, a block and after
    assert sum(len(g.graph.nodes) for g in compiled) < 0.6 * len(graph.graph.nodes)
    other, same = _traced(_Layers(9), torch.randn(2, 5, 8))
    before = len(compiled)
    torch.testing.assert_close(compile_graph(other, same)(*same)[0], other(*same)[0], rtol=1e-4, atol=1e-5)
    assert len(compiled) == before  # three more layers are nothing to compile


def test_parts_are_the_whole_graph_in_order():
    graph, _ = _traced(_Layers(6), torch.randn(2, 5, 8))
    nodes = [n for n in graph.graph.nodes if n.op == "call_function"]
    regions = [part.region for part in parts(graph)]
    assert [n for r in regions for n in r.nodes] == nodes
    assert len(regions) >= 6 and len({len(r.nodes) for r in regions[1:-1]}) == 1
    passed = [n for r in regions for n in r.nodes if n.name in r.outputs]
    assert all(isinstance(n.meta["val"], torch.Tensor) for n in passed)


def test_few_or_short_or_small_blocks_are_one_graph(monkeypatch):
    few, _ = _traced(_Layers(2), torch.randn(2, 5, 8))
    short, _ = _traced(nn.Sequential(*[nn.Linear(8, 8), nn.Tanh()] * 20), torch.randn(2, 8))
    assert parts(few) == [] and parts(short) == []
    small, _ = _traced(_Layers(6), torch.randn(2, 5, 8))
    large, _ = _traced(_Layers(6, width=256), torch.randn(16, 50, 8))
    monkeypatch.undo()
    assert parts(small) == [] and len(parts(large)) > 6


def test_a_graph_that_writes_to_its_arguments_is_not_tried_out(compiled):
    weight, x = torch.randn(6, 6), torch.randn(2, 6)
    graph = trace(lambda weight, x: (_chain(x @ weight),), weight, x, aligned=False)
    assert parts(graph)
    first, *_ = graph.graph.nodes
    (end,) = graph.graph.find_nodes(op="output")
    with graph.graph.inserting_before(end):
        graph.graph.call_function(torch.ops.aten.copy_.default, (first, graph.graph.call_function(_ADD, (first, 1.0))))
    graph.recompile()
    before = weight.clone()
    call = compile_graph(graph, [weight, x])
    assert torch.equal(weight, before) and len(compiled) == 1
    torch.testing.assert_close(call(weight, x)[0], _chain(x @ before), rtol=1e-4, atol=1e-5)
    assert torch.equal(weight, before + 1)


def test_training_steps_are_compiled_in_one_piece(compiled):
    x = torch.randn(2, 6)
    graph = trace(lambda x: (_chain(x),), x, aligned=False)
    assert not isinstance(compile_graph(graph, [x], whole=True), Joined) and len(compiled) == 1


def test_parts_that_nothing_shows_to_be_equal_are_compiled_each(compiled, monkeypatch):
    network = _Layers(6)
    graph, inputs = _traced(network, torch.randn(2, 5, 8))
    key_of, asked = compiler.stored.key_of, []

    def only_the_whole(graph, inputs):
        asked.append(key_of(graph, inputs))
        return asked[0] if len(asked) == 1 else None  # as after a setting of the compiler was changed meanwhile

    monkeypatch.setattr(compiler.stored, "key_of", only_the_whole)
    call = compile_graph(graph, inputs)
    torch.testing.assert_close(call(*inputs)[0], graph(*inputs)[0], rtol=1e-4, atol=1e-5)
    assert len(compiled) == len(asked) - 1 > 6


def _halve(module, args, output):
    return output * 0.5


def test_one_layer_that_is_different_is_compiled_as_it_is(compiled):
    network = _Layers(9)
    network.layers[4].get_submodule("linear2").register_forward_hook(_halve)
    graph, inputs = _traced(network, torch.randn(2, 5, 8))
    call = compile_graph(graph, inputs)
    torch.testing.assert_close(call(*inputs)[0], graph(*inputs)[0], rtol=1e-4, atol=1e-5)
    assert isinstance(call, Joined)


def test_short_steps_of_a_loop_are_put_together(compiled):
    weight, x = torch.randn(6, 6) * 0.3, torch.randn(2, 6)

    def function(weight, x):
        states = []
        for _ in range(60):
            x = torch.tanh(x @ weight) + x.sigmoid()
            states.append(x)
        return torch.stack(states), x

    graph = trace(function, weight, x, aligned=False)
    regions = [part.region for part in parts(graph)]
    assert len(regions) > 3 and all(len(r.nodes) >= 40 for r in regions[1:-1])
    outputs, expected = compile_graph(graph, [weight, x])(weight, x), function(weight, x)
    assert len(compiled) <= 4
    for a, b in zip(outputs, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_graph_may_return_its_arguments_and_constants(compiled):
    table = torch.arange(6.0)

    def function(x, y):
        for _ in range(60):
            x = torch.tanh(x + y).sin() * table
        return y, x, x

    x, y = torch.randn(2, 6), torch.randn(2, 6)
    graph = trace(function, x, y, aligned=False)
    call = compile_graph(graph, [x, y])
    assert isinstance(call, Joined)
    for a, b in zip(call(x, y), function(x, y), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_value_is_let_go_once_no_part_needs_it():
    x = torch.randn(3)
    graph = trace(lambda x: (_chain(x),), x, aligned=False)
    found, seen = parts(graph), []

    def call(region):
        def run(*values):
            outputs = region.graph(*values)
            assert sum(reference() is not None for reference in seen) <= 1  # its own argument
            seen.extend(weakref.ref(t) for t in outputs)
            return outputs

        return run

    names = [n.name for n in graph.graph.find_nodes(op="placeholder")]
    (end,) = graph.graph.find_nodes(op="output")
    joined = Joined(found, [call(part.region) for part in found], {}, names, [n.name for n in end.args[0]])
    torch.testing.assert_close(joined(x)[0], _chain(x))
    assert len(seen) == len(found) > 3


def _chain(x):
    for _ in range(100):
        x = x.sin() + 1
        x = x.cos() * 2
    return x


def test_draws_are_those_of_the_uncompiled_graph(compiled):
    torch.manual_seed(0)
    posterior, x = vbdl.MCDropout(_Layers(4)), torch.randn(3, 5, 8)
    made = [vbdl.Predictor(posterior, vbdl.Categorical(), n_samples=6, compile=c) for c in (True, False)]
    first, second = (predict(x, samples=True) for predict in made)
    torch.testing.assert_close(first.samples, second.samples, rtol=1e-4, atol=1e-5)
