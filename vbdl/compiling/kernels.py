"""The C++ kernels of a graph, compiled several in a file.

Inductor compiles each kernel in a file of its own. Reading the precompiled headers, Python's and linking then take half
a second of a core for each, and what the kernel itself takes is mostly a tenth of that: the training step of a small
transformer has 22 kernels. vbdl compiles as many files as Inductor has threads, and puts several kernels in each.
"""

import contextlib
import functools
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

_FEWEST = 4  # kernels of a file; more files would compile no sooner
_BEGIN = re.compile(r'\s*#include <torch/csrc/inductor/cpp_prefix\.h>\s*extern "C"\s+void\s+kernel\(')


@dataclass(frozen=True)
class _Kernel:
    """A kernel that is still to be compiled: the C++ types of its arguments and its source."""

    types: tuple[str, ...]
    source: str


_this_thread = threading.local()  # .shares: whether this thread's kernels share files
_lock = threading.Lock()


@contextlib.contextmanager
def compiled_together() -> Iterator[None]:
    """A context in which the kernels that the code of a graph defines on this thread are compiled several in a file."""
    _replace_once()
    before, _this_thread.shares = _are_shared(), True
    try:
        yield
    finally:
        _this_thread.shares = before


def _are_shared() -> bool:
    return getattr(_this_thread, "shares", False)


def _replace_once() -> None:
    """Replace Inductor's functions once, by ones that outside the context, as on other threads, work as before."""
    from torch._inductor.async_compile import AsyncCompile

    with _lock:
        if "vbdl_asks" in vars(AsyncCompile):
            return
        alone, wait = AsyncCompile.cpp_pybinding, AsyncCompile.wait

        def define(self: Any, argtypes: list[str], source_code: str) -> Any:
            if _are_shared() and _can_share(argtypes, source_code):
                return _Kernel(tuple(argtypes), source_code)
            return alone(self, argtypes, source_code)

        def compile_defined(self: Any, scope: dict[str, Any]) -> None:
            if defined := {name: value for name, value in scope.items() if isinstance(value, _Kernel)}:
                _compile(defined, scope)
            wait(self, scope)

        AsyncCompile.cpp_pybinding, AsyncCompile.wait = define, compile_defined
        AsyncCompile.vbdl_asks = True  # type: ignore[attr-defined]


def _can_share(types: Sequence[str], source: str) -> bool:
    """Whether a kernel is one function of pointers that needs no header but Inductor's."""
    one = _BEGIN.match(source) and source.count("#include") == source.count('extern "C"') == 1
    return bool(one) and all(t.endswith("*") for t in types)


def _compile(kernels: dict[str, _Kernel], scope: dict[str, Any]) -> None:
    """Compile kernels and put them into the scope under their names."""
    from torch._inductor.async_compile import AsyncCompile, get_compile_threads
    from torch._inductor.codecache import CppPythonBindingsCodeCache

    threads = get_compile_threads()
    files = _divided(kernels, min(threads, -(-len(kernels) // _FEWEST)))
    load = functools.partial(
        CppPythonBindingsCodeCache.load_async, submit_fn=AsyncCompile.submit if threads > 1 else None
    )
    modules = [(names, load(_file([kernels[name] for name in names]))) for names in files]  # all begin before one ends
    for names, module in modules:
        loaded = module()
        scope.update((name, getattr(loaded, f"kernel_{i}")) for i, name in enumerate(names))


def _divided(kernels: dict[str, _Kernel], files: int) -> list[list[str]]:
    """The names of the kernels of each file, such that files have about as much to compile."""
    lengths, divided = [0] * files, [[] for _ in range(files)]
    for name in sorted(kernels, key=lambda n: len(kernels[n].source), reverse=True):
        least = lengths.index(min(lengths))
        divided[least].append(name)
        lengths[least] += len(kernels[name].source)
    return divided


def _file(kernels: Sequence[_Kernel]) -> str:
    """The source of a Python module whose functions kernel_0, kernel_1, ... are these kernels."""
    sources, functions, methods = [], [], []
    for i, kernel in enumerate(kernels):
        sources.append(re.sub(r"\bkernel\(", f"kernel_{i}(", kernel.source, count=1))
        given = ", ".join(f"pointer<{t.removeprefix('const ')}>(args[{n}])" for n, t in enumerate(kernel.types))
        functions.append(_FUNCTION.format(i=i, count=len(kernel.types), given=given))
        methods.append(f'{{"kernel_{i}", (PyCFunction)(void(*)(void))kernel_{i}_py, METH_FASTCALL, ""}},')
    return "\n".join([*sources, _HEAD, *functions, _MODULE.format(methods="\n    ".join(methods))])


# Inductor's own bindings for one kernel (torch._inductor.codecache), for several
_HEAD = """
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <cstdlib>
#include <stdexcept>

static void* (*data_of_tensor)(PyObject*);

template <typename T> static inline T pointer(PyObject* tensor) { return static_cast<T>(data_of_tensor(tensor)); }
"""
_FUNCTION = """
static PyObject* kernel_{i}_py(PyObject*, PyObject* const* args, Py_ssize_t count) {{
    if (count != {count}) {{
        PyErr_SetString(PyExc_RuntimeError, "requires {count} args");
        return nullptr;
    }}
    try {{
        kernel_{i}({given});
    }} catch (std::exception const& e) {{
        PyErr_SetString(PyExc_RuntimeError, e.what());
        return nullptr;
    }} catch (...) {{
        PyErr_SetString(PyExc_RuntimeError, "unhandled error");
        return nullptr;
    }}
    Py_RETURN_NONE;
}}
"""
_MODULE = """
static PyMethodDef methods[] = {{
    {methods}
    {{nullptr, nullptr, 0, nullptr}}}};

static struct PyModuleDef module = {{PyModuleDef_HEAD_INIT, "kernel", nullptr, -1, methods}};

PyMODINIT_FUNC PyInit_kernel(void) {{
    const char* address = std::getenv("_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR");
    if (address == nullptr) {{
        PyErr_SetString(PyExc_RuntimeError, "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR must be set");
        return nullptr;
    }}
    data_of_tensor = reinterpret_cast<decltype(data_of_tensor)>(std::strtoull(address, nullptr, 10));
    PyObject* made = PyModule_Create(&module);
#ifdef Py_GIL_DISABLED
    if (made != nullptr) {{
        PyUnstable_Module_SetGIL(made, Py_MOD_GIL_NOT_USED);
    }}
#endif
    return made;
}}
"""
