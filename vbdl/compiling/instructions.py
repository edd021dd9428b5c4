"""The processor's instructions that Inductor compiles for, found by fewer and smaller trials.

Before its first kernel of a machine, Inductor compiles and loads small programs for each set of instructions that the
processor has, and then uses the first set that works: with AVX-512 six programs, which takes seconds. Here the trials
end with that first set, unless a setting asks for another one, and do without torch's headers, which the compiler reads
for three seconds. The generated code is the same.

They begin on a thread of their own, as does the compilation of the headers of all kernels: both take seconds where the
cache is empty, and need nothing of the graph, which is lowered meanwhile.
"""

import contextlib
import functools
import os
import platform
import sys
import threading
from collections.abc import Iterator
from typing import Any

# Like Inductor's, a function of torch's library for vectors of this size. Inductor's needs torch's headers
# besides, which every compiler reads that knows the version of C++ that Inductor asks for.
_TRIAL = """
#if defined(CPU_CAPABILITY_AVX512)
#define WIDTH 64
#define EXP Sleef_expf16_u10
#else
#define WIDTH 32
#define EXP Sleef_expf8_u10
#endif
typedef float vector __attribute__((vector_size(WIDTH)));
extern "C" vector EXP(vector);
vector result;
extern "C" void trial() { result = EXP(result); }
"""

_trials = threading.Lock()


@contextlib.contextmanager
def tried_once() -> Iterator[None]:
    """A context in which Inductor tries no further sets of instructions after the first that works."""
    from torch._inductor import config, cpu_vec_isa

    isa: Any = cpu_vec_isa
    expected = ("valid_vec_isa_list", "supported_vec_isa_list", "x86_isa_checker")  # another torch may lack them
    if (
        sys.platform != "linux" or platform.machine() != "x86_64" or config.cpp.simdlen is not None
        or "ATEN_CPU_CAPABILITY" in os.environ or not all(hasattr(isa, name) for name in expected)
        or not hasattr(isa.VecISA, "_avx_code")
    ):  # fmt: skip
        yield
        return
    every = isa.valid_vec_isa_list
    isa.valid_vec_isa_list = _first
    _begin()
    try:
        yield
    finally:
        isa.valid_vec_isa_list = every


@functools.cache
def _first() -> list[Any]:
    """The first set of instructions that the processor has and the compiler can use, as a list; [] if there is none."""
    from torch._inductor import cpu_vec_isa

    isa: Any = cpu_vec_isa
    has = isa.x86_isa_checker()
    each = (s for s in isa.supported_vec_isa_list if all(flag in has for flag in str(s).split()) and s)
    with _trials:  # a set remembers its trial, so a thread that waited here tries nothing again
        inductors, isa.VecISA._avx_code = isa.VecISA._avx_code, _TRIAL
        try:
            first = next(each, None)
        finally:
            isa.VecISA._avx_code = inductors
    return [] if first is None else [first]


@functools.cache
def _begin() -> None:
    """Begin the trials and the headers on another thread, once, if there is a processor for it."""
    if len(os.sched_getaffinity(0)) > 1:
        threading.Thread(target=_ahead, name="vbdl-instructions", daemon=True).start()


def _ahead() -> None:
    """Find the instructions, and compile the headers as for a kernel, which itself is not compiled."""
    with contextlib.suppress(Exception):  # the compiler does the same, and says what is wrong
        _first()
        from torch._inductor.codecache import CppPythonBindingsCodeCache

        CppPythonBindingsCodeCache.load_pybinding_async(["float*"], 'extern "C" void kernel(float* unused) {}')
