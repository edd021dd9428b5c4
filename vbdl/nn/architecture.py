"""The architecture of a network: everything but its parameters and buffers. Only networks of equal architecture stack.

Modules, settings, hooks and constants are compared: a stack runs member 0's module, so a tensor, an array, a scaler or
a closure that the network computes with and that is no buffer would be member 0's for every member.
"""

import array
import collections
import datetime
import decimal
import enum
import fractions
import functools
import hashlib
import itertools
import sys
import types
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vbdl.calling.copies import is_computed
from vbdl.calling.traversing import TABLES, is_cache, is_sparse, modules_of, state_of
from vbdl.types import State

_OF_EVERY_MODULE = TABLES | {"training"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_SCALARS = (bool, int, float, complex, str, bytes, type, range, slice, enum.Enum, torch.dtype, torch.device, np.generic)
_SCALARS += (decimal.Decimal, fractions.Fraction, datetime.date, datetime.time, datetime.timedelta)
# the origin of the weights, kept by networks of transformers, which changes no output
_OF_NO_EFFECT = ("_name_or_path", "_commit_hash", "_is_hf_initialized")
_MANY = 1000  # longer lists of numbers are compared by one digest
_DEEP = 40  # levels of nested objects to read; deeper ones are taken not to affect a forward


def stacks(states: Sequence[State], without: Collection[str] = ()) -> State:
    """Stack the entries of networks of one architecture into detached copies, (members, ...) each.

    The entries are removed from the states one after the other, which frees those that nobody else holds.
    without: names to leave out.
    """
    together = {}
    for name in list(states[0]):
        tensors = [state.pop(name) for state in states]
        if name not in without:
            together[name] = torch.stack([t.detach() for t in tensors])
    return together


def architecture(module: nn.Module) -> list[str]:
    """Describe a module's architecture in lines of text; modules with equal lines can be stacked."""
    modules = modules_of(module)
    lines = [f"{name}: {type(m).__qualname__}({m.extra_repr()})" for name, m in modules]
    # settings such as numbers of heads and rates, which show in no tensor and not in every extra_repr
    for name, m in modules:
        settings = {key: value for key, value in vars(m).items() if not key.startswith("_") and key != "training"}
        lines += [f"{name}.{key} = {value!r}" for key, value in sorted(settings.items()) if is_plain(value)]
    lines += [
        f"{name}: {tuple(t.shape)} {t.dtype}" if not is_sparse(t) else f"{name}: {_tensor(t)}"
        for name, t in state_of(module).items()
    ]  # sparse tensors cannot be stacked, only shared
    return [*lines, *(f"{name} = {value}" for name, value in sorted(constants(module).items()))]


_TABLES = (dict, collections.OrderedDict, set)


def are_alike(a: nn.Module, b: nn.Module) -> bool:
    """Whether two networks clearly have one architecture and the same frozen parameters, in less time than to describe.

    False if they differ, or hold anything but tensors and plain settings.
    """
    modules, others = modules_of(a), modules_of(b)
    if len(modules) != len(others):
        return False
    places: tuple[dict[int, int], dict[int, int]] = {}, {}  # the number of each tensor, by id
    compared: dict[tuple[int, int], bool] = {}
    for (name, m), (other_name, other) in zip(modules, others, strict=True):
        mine, its = vars(m), vars(other)
        if name != other_name or type(m) is not type(other) or list(mine) != list(its):
            return False
        for (key, value), it in zip(mine.items(), its.values(), strict=True):
            if value is it or (type(value) in _TABLES and type(value) is type(it) and not value and not it):
                continue
            if key in ("_parameters", "_buffers"):
                if list(value) != list(it) or not _are_tied_alike(value, it, places):
                    return False
            elif key == "_modules":
                if [(n, c is None) for n, c in value.items()] != [(n, c is None) for n, c in it.items()]:
                    return False
            elif key != "training" and not _are_equal(value, it, compared) and not is_cache(m, key):
                return False
    return True


def _are_equal(value: object, other: object, compared: dict[tuple[int, int], bool]) -> bool:
    """Whether two settings are described alike: plain ones, or objects of such, as the configurations of networks.

    compared: what is known of pairs of objects, by their ids.
    """
    of = type(value)
    if value is other or of is not type(other):
        return value is other
    if of is int or of is str or of is bool:
        return value == other
    if isinstance(value, tuple | list) and of in (tuple, list):
        assert isinstance(other, tuple | list)
        return len(value) == len(other) and all(map(_are_equal, value, other, itertools.repeat(compared)))
    if of is dict:
        assert isinstance(value, dict) and isinstance(other, dict)
        named = all(type(key) is str or type(key) is int for key in (*value, *other))
        return named and _have_equal_values(value, other, compared)
    if of is set:
        assert isinstance(value, set)
        return all(type(v) is str for v in value) and value == other
    if isinstance(value, _SCALARS) or is_plain(value):
        return repr(value) == repr(other)
    if not _has_only_attributes(of) or callable(value) or hasattr(value, "to_numpy") or hasattr(value, "__wrapped__"):
        return False
    pair = id(value), id(other)
    if pair not in compared:
        compared[pair] = True  # inside of itself it is as far as known
        compared[pair] = _have_equal_values(vars(value), vars(other), compared)
    return compared[pair]


def _have_equal_values(
    values: Mapping[Any, object], others: Mapping[Any, object], compared: dict[tuple[int, int], bool]
) -> bool:
    """Whether two tables have equal names in one order, and values that `_are_equal`."""
    return list(values) == list(others) and all(
        _are_equal(v, w, compared) for v, w in zip(values.values(), others.values(), strict=True)
    )


@functools.lru_cache(maxsize=256)
def _has_only_attributes(kind: type) -> bool:
    """Whether an object of this class holds nothing but its attributes."""
    libraries = {base.__module__.partition(".")[0] for base in kind.__mro__[:-1]}
    if libraries & {"builtins", "torch", "numpy"} or any("__slots__" in vars(base) for base in kind.__mro__[:-1]):
        return False
    if not kind.__dictoffset__:  # of a class that is written in C
        return False
    return _is_of_no_library(kind) and not issubclass(kind, (Mapping, Sequence))


def _are_tied_alike(
    tensors: Mapping[str, Tensor | None],
    others: Mapping[str, Tensor | None],
    places: tuple[dict[int, int], dict[int, int]],
) -> bool:
    """Whether tensors of two modules have equal shapes, dtypes and kinds, and are first seen at the same places."""
    for t, other in zip(tensors.values(), others.values(), strict=True):
        if t is None or other is None:
            if t is not other:
                return False
            continue
        if type(t) is not type(other) or t.requires_grad != other.requires_grad:
            return False
        if t.shape != other.shape or t.dtype != other.dtype or is_sparse(t) or is_sparse(other):
            return False
        mine, its = places
        if mine.setdefault(id(t), len(mine)) != its.setdefault(id(other), len(its)):
            return False
    return True


def is_plain(value: object) -> bool:
    """Whether a value is a number, a string, a type, or lists, tuples and dicts of only those."""
    if isinstance(value, tuple | list | dict):
        return all(is_plain(v) for v in (value.values() if isinstance(value, dict) else value))
    return isinstance(value, bool | int | float | str | type)


def difference(a: list[str], b: list[str]) -> str:
    """Describe the first difference of architecture b from a, that of member 0, for an error message."""
    for left, right in zip(a, b, strict=False):
        if left != right:
            return f"'{right}' where member 0 has '{left}'"
    longer, who = (a, "member 0 has") if len(a) > len(b) else (b, "it has")
    return f"{who} '{longer[min(len(a), len(b))]}' in addition"


def constants(module: nn.Module, code: bool = True) -> dict[str, str]:
    """Describe the constants of a network, those not parameters, buffers or plain settings, by path.

    An example of a path is `layer.scaler.mean_`. Tensors and arrays are described by a digest of their values,
    functions by the variables they close over. code: whether to describe a function by its code too, which differs
    between versions of Python.
    """
    reader = _Reader(module, code)
    for name, m in modules_of(module):
        for kind in type(m).__mro__[: type(m).__mro__.index(nn.Module)]:
            if not _is_named(kind):
                for key, value in vars(kind).items():
                    if not key.startswith("__") or key == "__call__":
                        reader.read(f"{name}.{key}" if name else key, value)
        found_by_running = getattr(m, "found_by_running", ())
        for key, value in vars(m).items():
            if key in _OF_EVERY_MODULE and not (value and key in _HOOKS) or key in found_by_running:
                continue
            path = f"{name}.{key}" if name else key
            if key in _HOOKS:
                for number, hook in enumerate(value.values()):
                    reader.read(f"{path}[{number}]", hook)
            elif key.startswith("_") or not is_plain(value):
                reader.read(path, value)
    return reader.described


def _is_named(kind: type) -> bool:
    """Whether a class can be found by its name in its module.

    False for a class defined in a function (its methods may use the function's variables), made by `type(...)`, or
    shadowed by a later class of that name.
    """
    named: object = sys.modules.get(kind.__module__)
    for part in kind.__qualname__.split("."):
        named = getattr(named, part, None)
    return named is kind


class _Reader:
    """Collects descriptions of values and the objects inside them in `described`, each object once."""

    def __init__(self, module: nn.Module, code: bool):
        self.described: dict[str, str] = {}
        self._code = code
        self._known = {id(t) for t in state_of(module).values()} | {id(m) for _, m in modules_of(module)}
        self._alive: list[object] = []  # objects that were read, kept alive so that no id is reused

    def read(self, path: str, value: object, depth: int = 0) -> None:
        if value is None or isinstance(value, _SCALARS):
            self._scalar(path, value)
            return
        if id(value) in self._known or isinstance(value, types.ModuleType) or depth > _DEEP:
            return
        self._known.add(id(value))
        self._alive.append(value)
        if isinstance(value, Tensor):
            if not is_computed(value):
                self.described[path] = _tensor(value)
        elif isinstance(value, np.ndarray):
            self.described[path] = _array(value)
        elif isinstance(value, nn.Module):
            for name, t in state_of(value).items():  # e.g. in a plain list: neither trained nor stacked
                self.read(f"{path}.{name}", t)
            for name, m in value.named_modules():
                for key, inner in vars(m).items():
                    if key not in _OF_EVERY_MODULE:
                        self.read(f"{path}.{name}.{key}" if name else f"{path}.{key}", inner, depth + 1)
        else:
            for part, inner in self._parts(path, value):
                self.read(f"{path}{part}", inner, depth + 1)

    def _scalar(self, path: str, value: object) -> None:
        if value is not None and path.rpartition(".")[2] not in _OF_NO_EFFECT:
            self.described[path] = getattr(value, "__qualname__", None) or repr(value)

    def _parts(self, path: str, value: object) -> Iterator[tuple[str, object]]:
        if isinstance(value, Mapping):
            # other keys may differ between runs, like the ids of hooks: such entries are known by their order
            for key, inner in value.items():
                yield f"[{key!r}]" if isinstance(key, str | int | bool | tuple) else "[.]", inner
        elif isinstance(value, list | tuple | collections.deque | array.array):
            if len(value) > _MANY and all(isinstance(v, _SCALARS) for v in value):
                self.described[path] = _digest(repr(value).encode())
            else:
                yield from ((f"[{number}]", inner) for number, inner in enumerate(value))
        elif isinstance(value, set | frozenset):
            self.described[path] = _digest(repr(sorted(map(repr, value))).encode())
        elif isinstance(value, torch.ScriptObject):  # such as the packed weights of a quantized layer
            try:
                yield "", value.__getstate__()
            except (RuntimeError, AttributeError):  # it cannot be saved: no two are known to be equal
                self.described[path] = f"{type(value).__qualname__} {id(value)}"
        elif isinstance(value, functools.partial):
            yield from (("", value.func), (".args", value.args), (".keywords", value.keywords))
        elif isinstance(value, types.MethodType):
            yield from (("", value.__func__), (".self", value.__self__))
        elif isinstance(value, types.FunctionType):
            yield from self._closed_over(path, value)
        elif callable(inner := getattr(value, "__wrapped__", None)):  # e.g. a cached function
            yield "", inner
        elif callable(value) and isinstance(name := getattr(value, "__name__", None), str):
            self.described[path] = name  # a builtin or an operator
        elif isinstance(array_of := _numbers(value), np.ndarray):  # a data frame or a series
            self.described[path] = _array(array_of)
        else:
            self.described[path] = type(value).__qualname__
            if _may_hold_numbers(value):
                yield from ((f".{key}", inner) for key, inner in _attributes(value))

    def _closed_over(self, path: str, function: types.FunctionType) -> Iterator[tuple[str, object]]:
        name = function.__qualname__
        self.described[path] = f"{name} {_digest(_code(function.__code__))}" if self._code else name
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                yield f".{name}", cell.cell_contents
            except ValueError:  # the cell is still empty
                continue
        yield from ((f".default[{i}]", inner) for i, inner in enumerate(function.__defaults__ or ()))
        yield from ((f".{key}", inner) for key, inner in (function.__kwdefaults__ or {}).items())


def _numbers(value: object) -> object:
    """The values of a data frame or a series as an array, or None for other objects."""
    convert = getattr(value, "to_numpy", None)
    try:
        return convert() if callable(convert) else None
    except Exception:
        return None


def _may_hold_numbers(value: object) -> bool:
    """Whether to read an object's attributes; False for loggers, locks and graphs, which do not affect outputs."""
    return _is_of_no_library(type(value)) and not type(value).__module__.startswith("torch.fx")


def _is_of_no_library(kind: type) -> bool:
    """Whether a class is not one of Python's own library."""
    return kind.__module__.partition(".")[0] not in sys.stdlib_module_names - {"types"}


def _attributes(value: object) -> list[tuple[str, object]]:
    named = dict(getattr(value, "__dict__", {}))
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        for key in [slots] if isinstance(slots, str) else slots:
            if key not in ("__dict__", "__weakref__") and hasattr(value, key):
                named.setdefault(key, getattr(value, key))
    return list(named.items())


def _code(code: types.CodeType) -> bytes:
    consts = [c if not isinstance(c, types.CodeType) else _code(c) for c in code.co_consts]
    return repr((code.co_code, code.co_names, code.co_varnames, consts)).encode()


def _tensor(t: Tensor) -> str:
    text = f"Tensor {tuple(t.shape)} {t.dtype}"
    if t.device.type == "meta":
        return text
    if t.is_quantized:
        return f"quantized {text} {_tensor(t.dequantize())}"
    if is_sparse(t):
        t = t.detach().to_sparse_coo().coalesce()
        return f"sparse {text} {_tensor(t.indices())} {_tensor(t.values())}"
    if t.layout != torch.strided:
        return text
    flat = t.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return f"{text} {_digest(flat.view(torch.uint8).numpy().tobytes())}"


def _array(values: np.ndarray) -> str:
    data = repr(values.tolist()).encode() if values.dtype.hasobject else np.ascontiguousarray(values).tobytes()
    return f"array {values.shape} {values.dtype} {_digest(data)}"


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()
