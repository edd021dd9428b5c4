"""The C++ kernels of a graph share files, and compute what they compute in files of their own."""

import contextlib
import threading

import pytest
import torch
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import CppPythonBindingsCodeCache
from torch._inductor.utils import fresh_cache

from vbdl.compiling import kernels, stored
from vbdl.compiling.compiler import compile_graph
from vbdl.compiling.graph import trace


def _apart(x, *weights):
    """Elementwise operations between products, which keep them in kernels of their own; the last fails if it must."""
    for number, w in enumerate(weights):
        x = (x @ w).softmax(-1) * (number + 1)
    return x, x.gather(1, x[:, :1].long()).exp()


@pytest.fixture
def files(monkeypatch):
    """The sources of the files that are compiled, in a folder of their own."""
    sources, load = [], CppPythonBindingsCodeCache.load_async

    def counted(source, *args, **kwargs):
        sources.append(source)
        return load(source, *args, **kwargs)

    monkeypatch.setattr(CppPythonBindingsCodeCache, "load_async", counted)
    with fresh_cache():
        yield sources


def _inputs():
    torch.manual_seed(0)
    return [torch.rand(6, 5), *(torch.randn(5, 5) for _ in range(5))]


def test_kernels_share_files_and_compute_the_same(files, monkeypatch):
    inputs = _inputs()
    graph = trace(_apart, *inputs, aligned=False)
    monkeypatch.setattr(stored, "load", lambda key: None)
    together = compile_graph(graph, inputs)
    shared, count = list(files), sum(source.count("METH_FASTCALL") for source in files)
    assert count >= 5 and len(shared) <= -(-count // 4)
    with fresh_cache():  # the kernels, not Inductor's code that was found in its cache
        monkeypatch.setattr(kernels, "compiled_together", contextlib.nullcontext)
        files.clear()
        alone = compile_graph(graph, inputs)
        assert len(files) == count
        assert all(map(torch.equal, together(*inputs), alone(*inputs)))


def test_kernels_of_a_shared_file_are_loaded_by_the_next_process(files, monkeypatch):
    inputs = _inputs()
    graph = trace(_apart, *inputs, aligned=False)
    expected = compile_graph(graph, inputs)(*inputs)
    files.clear()
    key = stored.key_of(graph, inputs)
    assert key is not None
    loaded = stored.load(key)
    assert loaded is not None and not files
    assert all(map(torch.equal, loaded(list(inputs)), expected))


def test_what_a_kernel_finds_wrong_is_raised(files):
    inputs = _inputs()
    graph = trace(_apart, *inputs, aligned=False)
    call = compile_graph(graph, inputs)
    inputs[-1] = torch.full((5, 5), torch.nan)  # as an index
    with pytest.raises(RuntimeError, match="index out of bounds"):
        call(*inputs)


def test_files_have_about_as_much_to_compile():
    each = {f"k{n}": kernels._Kernel((), "x" * length) for n, length in enumerate((10, 90, 50, 40, 60, 30))}
    divided = kernels._divided(each, 2)
    assert sorted(sum(divided, [])) == sorted(each)
    assert [sum(len(each[name].source) for name in names) for names in divided] == [140, 140]


_INCLUDE = "#include <torch/csrc/inductor/cpp_prefix.h>\n"


@pytest.mark.parametrize(
    ("types", "source"),
    [
        (["float*", "int64_t"], _INCLUDE + 'extern "C" void kernel(float* a, int64_t n) {}'),
        (["float*"], _INCLUDE + '#include <map>\nextern "C" void kernel(float* a) {}'),
        (["float*"], _INCLUDE + 'void f();\nextern "C" void kernel(float* a) {}'),
    ],
)
def test_kernels_with_more_than_pointers_and_a_function_have_their_own_files(types, source):
    assert not kernels._can_share(types, source)


def test_another_thread_has_files_of_its_own(files):
    """A user's torch.compile on another thread, during ours; and ours after the user's own."""
    source = _INCLUDE + 'extern "C" void kernel(float* a) { a[0] = 3; }'
    made = []
    with kernels.compiled_together():
        kernel = AsyncCompile().cpp_pybinding(["float*"], source)
        thread = threading.Thread(target=lambda: made.append(AsyncCompile().cpp_pybinding(["float*"], source)))
        thread.start()
        thread.join()
    assert isinstance(kernel, kernels._Kernel) and not isinstance(made[0], kernels._Kernel)
    scope = {"ours": kernel, "theirs": made[0]}
    AsyncCompile().wait(scope)  # after the context has ended
    for name in scope:
        t = torch.zeros(1)
        scope[name](t)
        assert t == 3
