"""Copies of modules, which hold other tensors, and what forward passes leave in the attributes of modules."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from vbdl.calling.duplicating import duplicate
from vbdl.calling.stacking import is_of_a_trace
from vbdl.calling.traversing import TABLES, Modules, is_cache, modules_of, state_in
from vbdl.types import State

M = TypeVar("M", bound=nn.Module)


def copied(module: M) -> M:
    """A deep copy of a module. Tensors that a forward pass stored in attributes are detached, to be copied at all."""
    return holding(module, {})


def forget(module: nn.Module) -> None:
    """Detach tensors that forward passes stored in attributes, such as attention maps, so that a copy is possible.

    Such a tensor may hold the autograd graph of a training step. One from a finished trace is replaced by None.
    """
    for m in module.modules():
        for name, value in list(_attributes(m)):
            if any(map(is_computed, _leaves(name, value))):
                vars(m)[name] = tree_map(lambda t: _detached(t) if is_computed(t) else t, value)


def _attributes(module: nn.Module) -> list[tuple[str, object]]:
    """The attributes of a module that may hold tensors, by name; most of the others are torch's empty tables."""
    found = []
    for name, value in vars(module).items():
        of = type(value)
        if of in _ATOMS or name == "_modules" or (not value if of in _TABLE_TYPES else not _may_hold_tensors(value)):
            continue
        found.append((name, value))
    return found


def _leaves(name: str, value: Any) -> Iterable[Any]:
    """The leaves of an attribute."""
    return value.values() if name in ("_parameters", "_buffers") else tree_leaves(value)


def _may_hold_tensors(value: object) -> bool:
    if type(value) in _ATOMS:
        return False
    if isinstance(value, tuple | list):
        return any(map(_may_hold_tensors, value))
    if isinstance(value, dict):
        return bool(value)
    return not isinstance(value, _WITHOUT_TENSORS)


_ATOMS = frozenset((type(None), bool, int, float, str, set))
_NUMBERS = frozenset((bool, int, float))
_SILENT = _ATOMS - _NUMBERS
_TABLE_TYPES = frozenset((dict, OrderedDict))


_WITHOUT_TENSORS = (*_ATOMS, nn.Module)


def is_computed(value: object) -> bool:
    """True if a value is a tensor that a forward pass computed, with gradients or in a trace."""
    return isinstance(value, Tensor) and (not value.is_leaf or is_of_a_trace(value))


def _detached(t: Tensor) -> Tensor | None:
    return None if is_of_a_trace(t) else t.detach()


def kept_by(module: nn.Module) -> list[tuple]:
    """What the modules keep in attributes, apart from parameters and buffers: tensors and their versions, and numbers.

    Two lists are equal if nothing was kept, replaced or written to in between.
    """
    kept: list[tuple] = []
    for i, (_, m) in enumerate(modules_of(module)):
        on_purpose = getattr(type(m), "keeps_on_purpose", ())
        for name, value in vars(m).items():
            of = type(value)
            if of in _NUMBERS:
                kept.append((i, name, value))
                continue
            if of in _SILENT or name in TABLES or (of in _TABLE_TYPES and not value):
                continue
            if name in on_purpose or is_cache(m, name) or isinstance(value, str | set):
                continue
            if of in (tuple, list) and all(type(v) in _ATOMS for v in value):
                kept.append((i, name, tuple(value)))
                continue
            for leaf in (value,) if isinstance(value, int | float) else tree_leaves(value):
                if isinstance(leaf, Tensor):
                    kept.append((i, name, id(leaf), leaf._version))
                elif isinstance(leaf, (int, float)):
                    kept.append((i, name, leaf))
    return kept


def numbers_kept_by(module: nn.Module) -> list[tuple]:
    """Return the numbers that the modules keep in attributes, such as a count of calls."""
    return [kept for kept in kept_by(module) if len(kept) == 3]


def holding(module: M, state: State, kept: Sequence[Tensor] = ()) -> M:
    """A deep copy of a module with these tensors in place of those of the same names; tied tensors stay tied.

    kept: tensors in attributes of the module that the copy holds too.
    """
    modules = modules_of(module)
    tensors = state_in(modules) if state else {}
    return _holding(module, modules, [(t, state[name]) for name, t in tensors.items() if name in state], kept)


def _holding(module: M, modules: Modules, pairs: Sequence[tuple[Tensor, Tensor]], kept: Sequence[Tensor] = ()) -> M:
    """`holding`; modules: those of the module. pairs: its tensors, each with the one to hold in its place."""
    stored = [t for _, m in modules for n, v in _attributes(m) for t in _leaves(n, v) if is_computed(t)]
    memo: dict[int, Tensor | None] = {id(t): _detached(t) for t in stored} | {id(t): t for t in kept}
    for tensor, t in pairs:
        # a parameter that takes no gradient may be in several modules
        is_new = isinstance(tensor, nn.Parameter) and (t is not tensor or t.requires_grad)
        memo[id(tensor)] = nn.Parameter(t, tensor.requires_grad and not t.is_inference()) if is_new else t
    return duplicate(module, memo)


def blueprint(module: M) -> M:
    """A copy of a module's structure, without numbers: its parameters and buffers are on the meta device."""
    modules = modules_of(module)
    pairs = [(t, torch.empty_like(t, device="meta", requires_grad=False)) for t in state_in(modules).values()]
    return _holding(module, modules, pairs)
