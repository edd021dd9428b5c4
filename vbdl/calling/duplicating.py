"""Deep copies of modules, as `copy.deepcopy` makes them, several times faster.

A module has twenty tables of its own, most of them empty, and `copy.deepcopy` takes longer for those of a network than
the network takes for a row.
"""

import copy
import copyreg
from collections import OrderedDict
from types import BuiltinFunctionType, FunctionType, NoneType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

M = TypeVar("M", bound=nn.Module)

_ATOMS = frozenset(
    (NoneType, bool, int, float, str, bytes, type, FunctionType, BuiltinFunctionType, torch.dtype, torch.device)
)
_EMPTY = frozenset((dict, OrderedDict, set, list))
_TABLES = ("_modules", "_parameters", "_buffers")
# tables that each module makes anew, which no two modules share
_OF_HOOKS = frozenset(n for n, v in vars(nn.Module()).items() if type(v) in _EMPTY) - {*_TABLES}
_COMPILED = "_compiled_call_impl"  # nn.Module.__getstate__ leaves it out too
_MISSING = object()
# what these do in addition is to fill in attributes that modules of older versions lack
_SET_STATE = (nn.Module.__setstate__, _ConvNd.__setstate__, nn.MultiheadAttention.__setstate__)


def duplicate(module: M, memo: dict[int, Any]) -> M:
    """Copy a module deeply; memo: as of `copy.deepcopy`, the copies of objects that have one already, by id."""
    return _duplicated(module, memo, {})


def _duplicated(module: Any, memo: dict[int, Any], by_attributes: dict[type, bool]) -> Any:
    """`duplicate`; by_attributes: for each class, whether a copy of its attributes is a copy of an object."""
    found = memo.get(id(module), _MISSING)
    if found is not _MISSING:
        return found
    kind: Any = type(module)
    if kind not in by_attributes:
        by_attributes[kind] = _copies_by_attributes(kind)
    if not by_attributes[kind] or "__deepcopy__" in vars(module):
        return copy.deepcopy(module, memo)
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
                table[leaf] = _value(part, memo, by_attributes) if copied is _MISSING else copied
        elif of is Tensor:
            attributes[name] = _of_tensor(value, memo)
        elif of is tuple and _ATOMS.issuperset(map(type, value)):
            attributes[name] = value
        elif of is list and _ATOMS.issuperset(map(type, value)):
            attributes[name] = memo[id(value)] = value.copy()
        elif of is tuple and any(isinstance(v, nn.Module) for v in value):
            attributes[name] = memo[id(value)] = tuple(_value(v, memo, by_attributes) for v in value)
        elif name != _COMPILED:
            attributes[name] = copy.deepcopy(value, memo)
    attributes.pop(_COMPILED, None)
    return new


def _value(value: Any, memo: dict[int, Any], by_attributes: dict[type, bool]) -> Any:
    """The copy of a value in a table of a module."""
    if value is None:
        return None
    if isinstance(value, nn.Module):
        return _duplicated(value, memo, by_attributes)
    of = type(value)
    if of is nn.Parameter:
        return value.__deepcopy__(memo)
    return _of_tensor(value, memo) if of is Tensor else copy.deepcopy(value, memo)


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
        and kind.__setstate__ in _SET_STATE
        and kind not in copyreg.dispatch_table
        and not any(vars(base).get("__slots__") for base in kind.__mro__)
    )
