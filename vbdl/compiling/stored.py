"""Compiled calls on disk, which a later process loads without importing or running the compiler.

Inductor's own cache is asked with the graph that it has prepared: importing Inductor, preparing the graph and checking
the processor's instructions take seconds for a network that runs in milliseconds. Here a graph is looked up as it was
traced. What is found is the Python code that Inductor generated for it, and the libraries of its C++ kernels, in the
same folder as Inductor's cache and trusted like it.

A call is found only if nothing has changed that Inductor's code depends on: the graph, the shapes and layouts of its
arguments, the numbers of its constants, the versions of torch, vbdl and Python, the processor, the number of threads,
torch's global settings, and environment variables of torch. Where settings of the compiler were changed in Python,
nothing is stored or loaded, and neither are graphs with operators of other packages.
"""

import ast
import builtins
import dis
import functools
import hashlib
import importlib.util
import json
import logging
import operator
import os
import platform
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from vbdl.compiling import cache

logger = logging.getLogger("vbdl")

Direct = Callable[[list[Tensor]], Sequence[Tensor]]

_NAMESPACES = {"aten", "prims", "vbdl"}  # operators of torch and vbdl, which their versions describe
_CONFIGS = ("torch._inductor.config", "torch._functorch.config", "torch._dynamo.config")
_VARIABLES = ("TORCH", "PYTORCH", "ATEN", "CXX", "CC")  # how the names of environment variables begin
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


class _CannotStore(Exception):
    """The call depends on something that another process cannot be sure to have."""


# -- what a call is found by


def key_of(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> str | None:
    """The name under which the compiled call of a graph at these inputs is stored; None if it cannot be."""
    return key_of_kinds(graph, lambda: map(_described, inputs))


def key_of_kinds(graph: fx.GraphModule, kinds: Callable[[], Iterable[str]]) -> str | None:
    """The name as of `key_of`, from descriptions of the inputs as `kinds_of` gives them."""
    return named(lambda: (*kinds(), *_lines(graph)))


def kinds_of(inputs: Sequence[Tensor]) -> list[str]:
    """Descriptions of types, shapes and layouts of inputs of a stored call."""
    return [_described(t) for t in inputs]


def named(lines: Callable[[], Iterable[str]]) -> str | None:
    """A name for what depends on these lines and on what compiled code depends on; None if nothing may be stored."""
    off = (os.environ.get("TORCHINDUCTOR_FORCE_DISABLE_CACHES"), os.environ.get("TORCHINDUCTOR_FX_GRAPH_CACHE"))
    if off[0] == "1" or off[1] == "0":
        return None
    try:
        if any(_is_changed(name) for name in _CONFIGS):
            return None
        digest = hashlib.sha256()
        for line in (*_surroundings(), *lines()):
            digest.update(f"{line}\n".encode())
        return digest.hexdigest()
    except (_CannotStore, AttributeError):  # AttributeError: another torch keeps its settings in another way
        return None


def _is_changed(name: str) -> bool:
    """Whether a module of the compiler's settings is imported and has other values than a new process would give it."""
    config = sys.modules.get(name)
    return config is not None and any(_is_overridden(entry) for entry in config._config.values())


def _is_overridden(entry: Any) -> bool:
    value = entry.user_override
    value = value.get() if isinstance(value, ContextVar) else value
    if type(value) is object:  # not set
        return False
    given = entry.env_value_default
    return bool(value != (entry.default if type(given) is object else given))


@functools.cache
def _fixed() -> tuple[str, ...]:
    """What stays as it is as long as the process runs."""
    digest = hashlib.sha256()
    for package in ("vbdl", "vbdl_kernels"):
        for file in sorted(Path(str(sys.modules[package].__file__)).parent.rglob("*.py")):
            digest.update(file.read_bytes())
    return (digest.hexdigest(), torch.__version__, str(torch.version.git_version), sys.version, *_processor())


def _processor() -> Iterator[str]:
    yield from (platform.machine(), platform.processor(), torch.backends.cpu.get_cpu_capability())
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return
    for name in ("model name", "flags", "Features"):
        yield next((line for line in lines if line.startswith(name)), "")


def _surroundings() -> Iterator[str]:
    """What the code that Inductor generates depends on, besides the graph."""
    yield from _fixed()
    for name, value in sorted(os.environ.items()):
        if name.startswith(_VARIABLES) and name != cache.VARIABLE:
            yield f"{name}={value}"
    yield repr(
        (
            torch.get_num_threads(),
            torch.get_default_dtype(),
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
            torch.get_float32_matmul_precision(),
            torch.backends.mkldnn.is_available(),
            torch.backends.mkldnn.enabled,
            torch.backends.mkl.is_available(),
        )
    )


def _described(t: Tensor) -> str:
    """A tensor's type, shape and layout."""
    if type(t) not in (Tensor, torch.nn.Parameter) or t.device.type != "cpu" or t.layout != torch.strided:
        raise _CannotStore
    return repr((t.dtype, tuple(t.shape), t.stride(), t.is_conj(), t.is_neg(), t.requires_grad))


def _lines(graph: fx.GraphModule) -> Iterator[str]:
    """A graph as text that is equal for equal graphs alone, whatever the names of their values are."""
    numbers: dict[fx.Node, int] = {}
    for node in graph.graph.nodes:
        arguments = _written((node.args, node.kwargs), numbers)
        numbers[node] = len(numbers)
        if node.op == "get_attr":
            constant: Any = functools.reduce(getattr, str(node.target).split("."), graph)
            yield f"constant {_described(constant)} {_digest(constant)}"
        elif node.op in ("placeholder", "output"):
            yield f"{node.op} {arguments if node.op == 'output' else ''}"
        else:
            yield f"{_name(node)} {arguments}"


def _name(node: fx.Node) -> str:
    target = node.target
    if node.op == "call_function" and isinstance(target, OpOverload) and target.namespace in _NAMESPACES:
        return str(target)
    if node.op == "call_function" and target is operator.getitem:
        return "getitem"
    raise _CannotStore


def _written(value: object, numbers: dict[fx.Node, int]) -> str:
    if isinstance(value, fx.Node):
        return f"%{numbers[value]}"
    if type(value) in _PLAIN:
        return repr(value)
    if isinstance(value, (list, tuple)):  # a list that fx made is one of its own
        return f"[{', '.join(_written(v, numbers) for v in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name}: {_written(v, numbers)}' for name, v in value.items())}}}"
    if isinstance(value, slice):
        return f"slice{_written((value.start, value.stop, value.step), numbers)}"
    raise _CannotStore


def _digest(t: Tensor) -> str:
    """The digest of a tensor's numbers, bit for bit."""
    numbers = t.detach().resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8).numpy()
    return hashlib.sha256(numbers.tobytes()).hexdigest()


# -- loading and storing


def load(key: str) -> Direct | None:
    """The call that is stored under this key, as a function of the list of its arguments; None if there is none."""
    try:
        return _loaded(file(key))
    except FileNotFoundError:
        return None
    except Exception as error:  # a file that was cut off, or a kernel that is gone
        logger.debug("a compiled call could not be loaded, so it is compiled again: %s", error)
        return None


def store(key: str, call: Direct, is_right: Callable[[Direct], bool]) -> None:
    """Store a call that Inductor generated, if another process can load it.

    is_right: tries out what is loaded; whether it computes what the call does.
    """
    place = file(key)
    temporary = place.with_name(f"{place.name}.{os.getpid()}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        torch.save(_parts(call), temporary)
        if is_right(_loaded(temporary)):
            os.replace(temporary, place)
    except Exception as error:  # then the next process compiles, or finds Inductor's own cache
        logger.debug("a compiled call is not stored: %s", error)
    finally:
        temporary.unlink(missing_ok=True)


def load_kinds(key: str) -> list[list[str]]:
    """What the parts of this graph were called with, as of `kinds_of`, in order; [] if it is not known."""
    try:
        kinds = json.loads(file(f"{key}.parts").read_text())
        return [[str(kind) for kind in of_part] for of_part in kinds]
    except (OSError, ValueError, TypeError):
        return []


def store_kinds(key: str, kinds: Sequence[Sequence[str]]) -> None:
    """Store what the parts of a graph were called with."""
    try:
        write(file(f"{key}.parts"), json.dumps(kinds))
    except OSError as error:  # then the next process runs the parts to find out
        logger.debug("what the parts of a graph are called with is not stored: %s", error)


def write(place: Path, text: str) -> None:
    """Write a file at once, so that no other process reads a part of it."""
    temporary = place.with_name(f"{place.name}.{os.getpid()}")
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text(text)
    os.replace(temporary, place)


def file(key: str) -> Path:
    """The file of this name. Raises FileNotFoundError if there is no folder of compiled code."""
    folder = cache.folder()
    if folder is None:
        raise FileNotFoundError("there is no folder of compiled code")
    return Path(folder) / "vbdl" / key[:2] / key


def _loaded(place: Path) -> Direct:
    parts = torch.load(place, weights_only=True)
    modules = {path: _module(Path(path)) for path, _ in parts["kernels"].values()}
    space: dict[str, Any] = {name: getattr(modules[path], own) for name, (path, own) in parts["kernels"].items()}
    space["extern_kernels"] = types.SimpleNamespace(**{name: getattr(torch, name) for name in parts["products"]})
    exec(compile(parts["code"], str(place), "exec"), space)
    return space["call"]


def _module(library: Path) -> types.ModuleType:
    """The module of compiled kernels, loaded as Inductor loads it."""
    os.environ["_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"] = str(
        torch._C._dynamo.guards._torchinductor_pyobject_tensor_data_ptr  # type: ignore[attr-defined]
    )
    spec = importlib.util.spec_from_file_location(f"{library.stem}.kernel", library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _parts(call: Any) -> dict[str, Any]:
    """What another process needs to build this call, in types that torch.load takes for harmless."""
    space = call.__func__.__globals__
    kept, kernels = [], []
    for statement in ast.parse(Path(space["__file__"]).read_text()).body:
        match statement:
            case ast.Assign(
                targets=[ast.Name(id=name)],
                value=ast.Call(func=ast.Attribute(value=ast.Name(id="async_compile"), attr="cpp_pybinding")),
            ):
                kernels.append(name)
            case ast.ImportFrom(module=str(module)) if module.startswith("torch._inductor"):
                pass  # what it imports is checked for below
            case (
                ast.Assign(targets=[ast.Name(id="async_compile")]) | ast.Delete(targets=[ast.Name(id="async_compile")])
            ):
                pass
            case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id="async_compile"), attr="wait"))):
                pass
            case ast.FunctionDef(name="get_args" | "benchmark_compiled_module") | ast.If():
                pass
            case _:
                kept.append(statement)
    code = ast.Module(kept, [])
    products = sorted(
        {
            n.attr
            for n in ast.walk(code)
            if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == "extern_kernels"
        }
    )
    if any(getattr(space["extern_kernels"], name) is not getattr(torch, name, None) for name in products):
        raise _CannotStore("it calls a kernel of Inductor itself")
    read, written = _global_names(compile(code, "code", "exec"))
    unknown = read - written - {*kernels, *dir(builtins), "extern_kernels"}
    if unknown:
        raise _CannotStore(f"it needs {', '.join(sorted(unknown))}")
    return {
        "code": ast.unparse(code),
        "kernels": {name: (str(space[name].__self__.__file__), space[name].__name__) for name in kernels},
        "products": products,
    }


def _global_names(code: types.CodeType) -> tuple[set[str], set[str]]:
    """Find the global names that a module's code reads, in functions too, and those that it defines."""
    read, written = set(), set()
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            read.add(step.argval)
        elif step.opname == "STORE_NAME":
            written.add(step.argval)
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            read |= _global_names(inner)[0]
    return read, written
