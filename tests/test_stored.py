"""Compiled calls that a later process loads: the same bits, without the compiler, and never those of another graph."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import torch

from vbdl.compiling import cache, stored
from vbdl.compiling.compiler import compile_graph
from vbdl.compiling.graph import trace

_PREDICT = """
import sys

import torch
from torch import nn
import vbdl

torch.manual_seed(0)
net = nn.Sequential(
    nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 16), nn.Dropout(0.2), nn.GELU(),
    nn.Linear(16, 3),
).eval()
x = torch.randn(3, 1, 8, 8)
for posterior in (vbdl.MCDropout(net), vbdl.DeepEnsemble(net, 3)):
    predict = vbdl.Predictor(posterior, vbdl.Categorical(), tiles=8, compile=True)
    print(predict(x).probs.numpy().tobytes().hex(), predict(x).epistemic.numpy().tobytes().hex())
print("torch._inductor.compile_fx" in sys.modules)
"""


def test_a_second_process_has_the_same_bits_without_the_compiler(tmp_path):
    place = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    runs = [
        subprocess.run([sys.executable, "-c", _PREDICT], env=place, capture_output=True, text=True, timeout=300)
        for _ in range(2)
    ]
    assert all(run.returncode == 0 for run in runs), runs[0].stderr + runs[1].stderr
    (*first, compiled), (*second, compiled_again) = (run.stdout.splitlines() for run in runs)
    assert (compiled, compiled_again) == ("True", "False")
    assert first == second and len(first) == 2


def _graph(function, *inputs):
    return trace(function, *inputs, aligned=False)


def _key(function, *inputs):
    return stored.key_of(_graph(function, *inputs), list(inputs))


def test_a_graph_with_constants_is_found_by_their_numbers(compiled):
    inputs = [torch.randn(4, 70)]
    for shift in (1.0, 1.0, 2.0):
        table = torch.arange(70.0).sin() + shift
        graph = _graph(functools.partial(lambda table, x: (x * table,), table), *inputs)
        torch.testing.assert_close(compile_graph(graph, inputs)(*inputs)[0], inputs[0] * table)
    assert len(compiled) == 2


def test_what_the_values_are_called_does_not_matter():
    inputs = [torch.randn(4, 5)]
    graph = _graph(lambda x: (x.relu() * 2.0,), *inputs)
    other = _graph(lambda x: (x.relu() * 2.0,), *inputs)
    for i, node in enumerate(other.graph.nodes):
        node.name = f"other_{i}"
    assert stored.key_of(graph, inputs) == stored.key_of(other, inputs) is not None


def test_different_graphs_have_different_keys():
    x, y = torch.randn(4, 4), torch.randn(4, 4)
    half = x.bfloat16()
    keys = [
        _key(lambda a, b: (a + b,), x, y),
        _key(lambda a, b: (a - b,), x, y),
        _key(lambda a, b: (b - a,), x, y),
        _key(lambda a, b: (a + b, a), x, y),
        _key(lambda a, b: (a + b,), x, y.mT),
        _key(lambda a, b: (a + b,), x, y[:1]),
        _key(lambda a, b: (a + b,), half, y),
        _key(lambda a, b: (a + b.double(),), x, y),
        _key(lambda a, b: (a + b * 1.0,), x, y),
        _key(lambda a, b: (a + b * 1,), x, y),
        _key(lambda a, b: (a + b * 0.0,), x, y),
        _key(lambda a, b: (a + b * -0.0,), x, y),
        _key(lambda a, b: (a.sum(0) + b,), x, y),
        _key(lambda a, b: (a.sum(1) + b,), x, y),
    ]
    assert None not in keys and len(set(keys)) == len(keys)


def test_the_same_graph_elsewhere_has_another_key(monkeypatch):
    x = torch.randn(4, 4)
    keys = [_key(lambda a: (a.relu(),), x)]
    torch.set_num_threads(2)
    keys.append(_key(lambda a: (a.relu(),), x))
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    assert _key(lambda a: (a.relu(),), x) != keys[0]
    torch.use_deterministic_algorithms(False)
    with monkeypatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CPP_ENABLE_UNSAFE_MATH_OPT_FLAG", "1")
        keys.append(_key(lambda a: (a.relu(),), x))
    stored._fixed.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "another")
        keys.append(_key(lambda a: (a.relu(),), x))
    stored._fixed.cache_clear()
    assert None not in keys and len(set(keys)) == len(keys)
    assert _key(lambda a: (a.relu(),), x) == keys[0]


def test_nothing_is_stored_with_other_settings_of_the_compiler(monkeypatch):
    import torch._inductor.config as settings

    x = torch.randn(4, 4)
    assert _key(lambda a: (a.relu(),), x) is not None
    with settings.patch(size_asserts=False):
        assert _key(lambda a: (a.relu(),), x) is None
    assert _key(lambda a: (a.relu(),), x) is not None
    for name, value in (("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1"), ("TORCHINDUCTOR_FX_GRAPH_CACHE", "0")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert _key(lambda a: (a.relu(),), x) is None


def test_operators_of_other_packages_are_not_stored():
    with torch.library._scoped_library("vbdl_test_stored", "DEF") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")
        assert _key(lambda a: (torch.ops.vbdl_test_stored.twice(a),), torch.randn(3)) is None


def _stored_files():
    return [file for file in Path(str(cache.folder())).glob("vbdl/**/*") if file.is_file()]


def test_what_cannot_be_loaded_is_compiled_again(compiled):
    inputs = [torch.randn(6, 7)]
    graph = _graph(lambda x: (x.softmax(-1),), *inputs)
    expected = compile_graph(graph, inputs)(*inputs)[0]
    (file,) = _stored_files()
    whole = file.read_bytes()
    parts = torch.load(file)
    assert parts["kernels"]
    for broken in (b"", whole[:-100], b"no archive", None):
        if broken is None:
            gone = {name: (f"{path}.gone", own) for name, (path, own) in parts["kernels"].items()}
            torch.save({**parts, "kernels": gone}, file)
        else:
            file.write_bytes(broken)
        before = len(compiled)
        assert torch.equal(compile_graph(graph, inputs)(*inputs)[0], expected)
        assert len(compiled) == before + 1 and _stored_files() == [file] and file.read_bytes() == whole


def test_a_call_is_stored_only_if_what_is_loaded_computes_the_same(compiled, monkeypatch):
    original = stored._loaded

    def wrong(file):
        call = original(file)
        return lambda inputs: [t + 1 for t in call(inputs)]

    monkeypatch.setattr(stored, "_loaded", wrong)
    inputs = [torch.randn(6, 7)]
    graph = _graph(lambda x: (x.softmax(-1),), *inputs)
    torch.testing.assert_close(compile_graph(graph, inputs)(*inputs)[0], inputs[0].softmax(-1))
    assert _stored_files() == []


def test_a_folder_that_cannot_be_written_to_changes_nothing(compiled, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(stored, "file", lambda key: tmp_path / "file" / "under" / key)
    inputs = [torch.randn(6, 7)]
    graph = _graph(lambda x: (x.softmax(-1),), *inputs)
    for _ in range(2):
        torch.testing.assert_close(compile_graph(graph, inputs)(*inputs)[0], inputs[0].softmax(-1))
    assert len(compiled) == 2


def test_an_interrupted_store_leaves_nothing_behind(compiled, monkeypatch):
    def fails(parts, file):
        file.write_bytes(b"half")
        raise OSError("no space")

    monkeypatch.setattr(torch, "save", fails)
    inputs = [torch.randn(6, 7)]
    compile_graph(_graph(lambda x: (x.softmax(-1),), *inputs), inputs)
    assert _stored_files() == []
