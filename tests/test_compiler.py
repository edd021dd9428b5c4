"""Compiled graphs are found again in Inductor's cache, at the shapes they were compiled for."""

import errno
import logging
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

from vbdl.compiling import compiler, stored
from vbdl.compiling.compiler import can_compile, compile_graph
from vbdl.compiling.graph import trace


def test_a_graph_is_compiled_once_for_each_shape(monkeypatch):
    monkeypatch.setattr(stored, "load", lambda key: None)  # Inductor's own cache is for what is not stored

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


def test_two_threads_trace_one_after_the_other():
    """Inductor traces in the background while predictions are traced; torch's patches of nn.Module are global."""
    first_in, second_in, first_out = threading.Event(), threading.Event(), threading.Event()
    before = torch.nn.Module.__call__

    def first(x):
        first_in.set()
        second_in.wait(0.5)  # it comes in only if nothing keeps it out
        return x + 1

    def second(x):
        second_in.set()
        first_out.wait(10)
        return x + 2

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(trace, first, torch.zeros(3))
        one.add_done_callback(lambda _: first_out.set())
        first_in.wait(10)
        two = pool.submit(trace, second, torch.zeros(3))
        assert [float(future.result()(torch.zeros(3))[0]) for future in (one, two)] == [1, 2]
    assert torch.nn.Module.__call__ is before


def test_modules_run_in_other_threads_during_a_symbolic_trace():
    """Inductor traces modules symbolically in the background, while uncompiled graphs answer."""
    graph, x = trace(lambda x: x + 1, torch.zeros(3)), torch.zeros(3)
    with ThreadPoolExecutor(1) as pool:

        class Waits(torch.nn.Module):
            def forward(self, y):
                answer = pool.submit(graph, x).result(10)
                torch.testing.assert_close(answer, x + 1)
                return y * 2

        traced = torch.fx.symbolic_trace(Waits())
    torch.testing.assert_close(traced(x + 3), x + 6)


_PREDICT = """
import torch
from torch import nn
import vbdl

torch.manual_seed(0)
net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 2))
x = torch.randn(2, 3)
compiled = vbdl.Predictor(vbdl.MCDropout(net), vbdl.Categorical(), n_samples=4)(x).probs
plain = vbdl.Predictor(vbdl.MCDropout(net), vbdl.Categorical(), n_samples=4, compile=False)(x).probs
torch.testing.assert_close(compiled, plain, rtol=1e-6, atol=1e-6)
"""


def test_a_file_in_the_place_of_the_cache_is_said_once(tmp_path):
    (tmp_path / "cache").write_text("no folder")
    place = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", _PREDICT], env=place, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("is not a folder") == 1 and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "code, by_compiler",
    [(c, False) for c in (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.ENOTDIR)]
    + [(c, True) for c in (errno.ENOSPC, errno.EROFS)],
)
def test_a_cache_that_cannot_be_written_is_as_no_compiler(code, by_compiler, monkeypatch, caplog):
    error: Exception = OSError(code, os.strerror(code), "/cache/fx")
    if by_compiler:  # in a process of its own
        error = RuntimeError(f"C++ compile error: cc1plus: fatal error: {os.strerror(code)}")

    def fails(*args, **kwargs):
        raise RuntimeError("InductorError") from error

    monkeypatch.setattr(stored, "load", lambda key: None)
    monkeypatch.setattr(compiler, "_from_cache", fails)
    compiler._warned.clear()
    inputs = [torch.randn(4, 5)]
    graph = trace(lambda x: (x.relu(),), *inputs, aligned=False)
    with caplog.at_level(logging.WARNING, logger="vbdl"):
        for _ in range(2):
            assert torch.equal(compile_graph(graph, inputs)(*inputs)[0], inputs[0].relu())
    (record,) = [r for r in caplog.records if r.name == "vbdl"]
    assert "the same results up to rounding" in record.getMessage() and os.strerror(code) in record.getMessage()
    compiler._warned.clear()
