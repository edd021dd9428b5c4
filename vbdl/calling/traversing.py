"""The modules and the tensors of a network in a list, as torch's generators yield them, several times faster.

torch's `named_modules` passes every module through as many generators as it is deep, and a prediction's first call asks
for the modules and tensors of a network dozens of times.
"""

from torch import Tensor, nn

from vbdl.types import State


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
    parameters: State = {}
    buffers: State = {}
    seen: set[int] = set()
    for prefix, owner in modules_of(module):
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
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for prefix, owner in modules_of(module):
        if not owner._parameters:
            continue
        for leaf, t in owner._parameters.items():
            if t is not None and id(t) not in seen:
                seen.add(id(t))
                found[f"{prefix}.{leaf}" if prefix else leaf] = t
    return found
