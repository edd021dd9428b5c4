"""Deep copies of modules, as `copy.deepcopy` makes them, several times faster.

A module has twenty tables of its own, most of them empty, and `copy.deepcopy` takes longer for those of a network than
the network takes for a row.
"""

import copy
import copyreg
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from types import BuiltinFunctionType, FunctionType, NoneType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.hooks import RemovableHandle

from vbdl.calling.closures import Rebuilt, functions_in, held_in
from vbdl.calling.traversing import modules_of

M = TypeVar("M", bound=nn.Module)

_ATOMS = frozenset((NoneType, bool, int, float, str, bytes, type, BuiltinFunctionType, torch.dtype, torch.device))
_EMPTY = frozenset((dict, OrderedDict, set, list))
_TABLES = ("_modules", "_parameters", "_buffers")
# tables that each module makes anew, which no two modules share
_OF_HOOKS = frozenset(n for n, v in vars(nn.Module()).items() if type(v) in _EMPTY) - {*_TABLES}
_COMPILED = "_compiled_call_impl"  # nn.Module.__getstate__ leaves it out too
_MISSING = object()
# what these do in addition is to fill in attributes that modules of older versions lack
_SET_STATE = (nn.Module.__setstate__, _ConvNd.__setstate__, nn.MultiheadAttention.__setstate__)


def duplicate(module: M, memo: dict[int, Any]) -> M:
    """Copy a module deeply; memo: as of `copy.deepcopy`, the copies of objects that have one already, by id.

    Unlike there, functions that the module holds and that read modules inside it read the copies of these.
    """
    return _Duplicate(module, memo).made()


class _Duplicate:
    """A deep copy of a module in the making; memo: as of `duplicate`."""

    def __init__(self, module: Any, memo: dict[int, Any]):
        self._module, self._memo = module, memo
        self._by_attributes: dict[type, bool] = {}  # whether a copy of its attributes is a copy of an object, by class
        self._remembers_hooks = False  # whether the copies of the tables of hooks are in the memo
        self._functions: Rebuilt | None = None  # made once there is a function that may read modules

    def made(self) -> Any:
        """Return the copy."""
        made = self._of_module(self._module)
        if self._functions is not None:
            self._functions.fill(self._of_value)
        return made

    def _of_module(self, module: Any) -> Any:
        memo = self._memo
        found = memo.get(id(module), _MISSING)
        if found is not _MISSING:
            return found
        kind: Any = type(module)
        if kind not in self._by_attributes:
            self._by_attributes[kind] = _copies_by_attributes(kind)
        if not self._by_attributes[kind] or "__deepcopy__" in vars(module):
            return self._deep(module)
        new = memo[id(module)] = kind.__new__(kind)
        attributes = vars(new)
        for name, value in vars(module).items():
            of = type(value)
            if of in _ATOMS:
                attributes[name] = value
            elif name in _OF_HOOKS and of in _EMPTY and not value:
                attributes[name] = of()
            elif (copied := memo.get(id(value), _MISSING)) is not _MISSING:
                attributes[name] = copied
            elif of in _EMPTY and not value:
                attributes[name] = memo[id(value)] = of()  # objects that share a table still do
            elif of is dict and name in _TABLES:
                attributes[name] = table = memo[id(value)] = {}
                for leaf, part in value.items():
                    copied = memo.get(id(part), _MISSING)
                    table[leaf] = self._of_value(part) if copied is _MISSING else copied
            elif of is Tensor:
                attributes[name] = _of_tensor(value, memo)
            elif of is tuple and _ATOMS.issuperset(map(type, value)):
                attributes[name] = value
            elif of is list and _ATOMS.issuperset(map(type, value)):
                attributes[name] = memo[id(value)] = value.copy()
            elif of is tuple and any(isinstance(v, nn.Module) for v in value):
                attributes[name] = memo[id(value)] = tuple(map(self._of_value, value))
            elif of is weakref.ref:
                attributes[name] = self._of_reference(value)
            elif name != _COMPILED:
                attributes[name] = self._deep(value)
        attributes.pop(_COMPILED, None)
        return new

    def _of_value(self, value: Any) -> Any:
        """The copy of a value in a table of a module."""
        if value is None:
            return None
        if isinstance(value, nn.Module):
            return self._of_module(value)
        of = type(value)
        if of is nn.Parameter:
            return value.__deepcopy__(self._memo)
        return _of_tensor(value, self._memo) if of is Tensor else self._deep(value)

    def _of_reference(self, reference: weakref.ref) -> weakref.ref:
        """A weak reference to the copy of a module, if the network has it; others stay as they are."""
        target: Any = reference()
        if not isinstance(target, nn.Module) or not any(target is m for m in _all_modules(self._module)):
            return reference
        return weakref.ref(self._of_module(target))

    def _deep(self, value: Any) -> Any:
        """The copy of a value that `copy.deepcopy` makes, but for functions in it that read modules."""
        inside = (
            (v for m in _all_modules(value) for v in vars(m).values()) if isinstance(value, nn.Module) else (value,)
        )
        for part in inside:
            for held in held_in(part, (FunctionType, RemovableHandle, torch.jit.ScriptFunction)):
                if isinstance(held, RemovableHandle):
                    self._remember_hooks()
                elif isinstance(held, torch.jit.ScriptFunction):  # torch cannot copy it, and nothing in it is trained
                    self._memo[id(held)] = held
                elif functions_in(held):
                    if self._functions is None:
                        self._functions = Rebuilt(_owned_by(self._module, self._memo), self._memo)
                    self._functions.add(held)
        return copy.deepcopy(value, self._memo)

    def _remember_hooks(self) -> None:
        """Make copies of handles remove the hooks of the copied modules; once is enough for all handles."""
        if self._remembers_hooks:
            return
        self._remembers_hooks = True
        for m in _all_modules(self._module):
            new = vars(self._of_module(m))
            self._memo |= {id(vars(m)[name]): new[name] for name in _OF_HOOKS & vars(m).keys() & new.keys()}


def _owned_by(module: nn.Module, memo: dict[int, Any]) -> set[int]:
    """The ids of the modules and parameters of a network that its copy has too, those in the memo only with numbers."""
    owned = set()
    for m in _all_modules(module):
        owned.add(id(m))
        held = vars(m)["_parameters"]  # lent ones are not asked for here; those of scripted modules are in no dict
        parameters = [p for p in (dict.values(held) if isinstance(held, dict) else held.values()) if p is not None]
        owned |= {id(p) for p in parameters if (p if memo.get(id(p)) is None else memo[id(p)]).device.type != "meta"}
    return owned


def _all_modules(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules of a network, also those that it holds in tuples and lists, which are not registered."""
    waiting, seen = [module], set()
    while waiting:
        for _, m in modules_of(waiting.pop()):
            if id(m) not in seen:
                seen.add(id(m))
                yield m
                held = (v for value in vars(m).values() if isinstance(value, tuple | list) for v in value)
                waiting += [v for v in held if isinstance(v, nn.Module)]


def _of_tensor(t: Tensor, memo: dict[int, Any]) -> Tensor:
    """The copy of a tensor; tensors of one storage still share one."""
    if (
        t.device.type not in ("cpu", "cuda") or t.layout != torch.strided or t.is_quantized or not t.is_leaf
        or not t.is_contiguous() or t.is_conj() or t.is_neg() or t.requires_grad or vars(t)
    ):  # fmt: skip
        return copy.deepcopy(t, memo)
    storage, storages = t.untyped_storage(), memo.setdefault("torch", {})  # type: ignore[call-overload]
    if storage._cdata in storages or storage.nbytes() != t.nbytes:
        return copy.deepcopy(t, memo)
    memo[id(t)] = new = t.detach().clone()
    storages[storage._cdata] = new.untyped_storage()
    return new


def _copies_by_attributes(kind: type) -> bool:
    """Return whether a new object with copies of the attributes is a deep copy of an object of this class."""
    return (
        issubclass(kind, nn.Module)
        and not hasattr(kind, "__deepcopy__")
        and kind.__reduce_ex__ is object.__reduce_ex__
        and kind.__reduce__ is object.__reduce__
        and getattr(kind, "__getstate__", None) is getattr(nn.Module, "__getstate__", None)
        and (kind.__setstate__ in _SET_STATE or kind.__setstate__ is nn.Module.__setstate__)  # Dynamo replaces torch's
        and kind not in copyreg.dispatch_table
        and not any(vars(base).get("__slots__") for base in kind.__mro__)
    )
