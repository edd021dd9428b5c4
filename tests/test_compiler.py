"""Compiled graphs are found again in Inductor's cache, at the shapes they were compiled for."""

import torch
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

from vbdl.compiler import can_compile, compile_graph
from vbdl.graph import trace


def test_a_graph_is_compiled_once_for_each_shape():
    def function(x, w):
        return (torch.relu(x @ w).sum(0),)

    assert can_compile()
    found = []
    with fresh_cache():
        for rows in (64, 64, 128, 64):
            counters.clear()
            inputs = [torch.randn(rows, 5), torch.randn(5, 7)]
            graph = trace(function, *inputs, aligned=False)
            torch.testing.assert_close(compile_graph(graph, inputs)(*inputs)[0], function(*inputs)[0])
            found.append(counters["inductor"]["fxgraph_cache_hit"])
            assert counters["inductor"]["fxgraph_cache_bypass"] == 0
    assert found == [0, 1, 0, 1]
