"""The modules and the tensors of a network in a list, as torch's generators yield them, several times faster.

torch's `named_modules` passes every module through as many generators as it is deep, and a prediction's first call asks
for the modules and tensors of a network dozens of times.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vbdl.types import State

Modules = Sequence[tuple[str, nn.Module]]


def modules_of(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules of a network by name, as `list(module.named_modules())`."""
    found: list[tuple[str, nn.Module]] = []
    seen: set[int] = set()
    waiting: list[tuple[str, nn.Module]] = [("", module)]
    while waiting:
        name, m = waiting.pop()
        if id(m) in seen:
            continue
        if type(m).named_modules is not nn.Module.named_modules:  # of a class that lists others
            return list(module.named_modules())
        seen.add(id(m))
        found.append((name, m))
        if children := m._modules:
            start = f"{name}." if name else ""
            waiting += [(start + leaf, child) for leaf, child in reversed(children.items()) if child is not None]
    return found


def state_of(module: nn.Module) -> State:
    """The parameters and buffers of a module by name; a tied one appears once, under its first name."""
    return state_in(modules_of(module))


def state_in(modules: Modules) -> State:
    """`state_of` a module whose `modules_of` these are."""
    parameters: State = {}
    buffers: State = {}
    seen: set[int] = set()
    for prefix, owner in modules:
        for of_kind, tensors in ((parameters, owner._parameters), (buffers, owner._buffers)):
            if not tensors:
                continue
            for leaf, t in tensors.items():
                if t is not None and id(t) not in seen:
                    seen.add(id(t))
                    of_kind[f"{prefix}.{leaf}" if prefix else leaf] = t
    return parameters | buffers


def parameters_of(module: nn.Module) -> dict[str, Tensor]:
    """The parameters of a module by name, as `dict(module.named_parameters())`."""
    return _named(module, "_parameters")


def buffers_of(module: nn.Module) -> dict[str, Tensor]:
    """The buffers of a module by name, as `dict(module.named_buffers())`."""
    return _named(module, "_buffers")


def _named(module: nn.Module, kind: str) -> dict[str, Tensor]:
    """The tensors in the tables of this kind; a tied one appears once, under its first name."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for prefix, owner in modules_of(module):
        if not (tensors := getattr(owner, kind)):
            continue
        for leaf, t in tensors.items():
            if t is not None and id(t) not in seen:
                seen.add(id(t))
                found[f"{prefix}.{leaf}" if prefix else leaf] = t
    return found


def device_of(module: nn.Module) -> torch.device:
    """The device of a module's first tensor; its buffers are asked first, which are held in plain dicts."""
    for t in module._buffers.values():
        if t is not None:
            return t.device
    tables = (getattr(m, kind) for kind in ("_buffers", "_parameters") for _, m in modules_of(module))
    return next(t.device for table in tables for t in table.values() if t is not None)


# the attributes of every module but `training`: its tensors, its modules and its hooks
TABLES = frozenset(vars(nn.Module())) - {"training"}


def is_cache(module: nn.Module, name: str) -> bool:
    """Whether torch keeps the parameters of a recurrent layer in this attribute, which it renews when they change."""
    return name in ("_flat_weights", "_flat_weight_refs") and isinstance(module, nn.RNNBase)


def is_sparse(t: Tensor) -> bool:
    """Whether a tensor holds only its numbers other than 0, and their places; nested tensors have other layouts."""
    return t.layout in _SPARSE


_SPARSE = {torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc}
