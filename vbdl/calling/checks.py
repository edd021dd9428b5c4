"""Checks of the networks that users give: whether a network can be called with replaced weights."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.weight_norm import WeightNorm

from vbdl.calling.adapters import check_adapters
from vbdl.calling.lending import only_reading
from vbdl.calling.traversing import is_sparse, modules_of, parameters_of, state_in, state_of


def check_network(module: object, scripted: bool = False) -> None:
    """Raise TypeError or ValueError if a network cannot be called with replaced weights.

    That is anything but an nn.Module, or one that is compiled, lazy, has torch's old weight_norm, idle adapters of
    peft, sparse tensors that torch cannot copy or, unless `scripted`, is a TorchScript module.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"a network must be an nn.Module, got {type(module).__name__}")
    modules = modules_of(module)
    for name, m in modules:
        where = f"module '{name}'" if name else "the module"
        if "_orig_mod" in m._modules or "_orig_mod" in vars(m):
            raise ValueError(
                f"{where} was returned by torch.compile: pass the module that you compiled, vbdl compiles it itself"
            )
        traced = isinstance(m, torch.jit.ScriptModule) and "_parameters" not in vars(m)
        if traced and scripted:
            raise ValueError(
                f"{where} is a TorchScript module that torch.jit.trace returned, whose weights vbdl cannot replace: "
                f"pass the Python module, or torch.jit.script(module)"
            )
        if isinstance(m, torch.jit.ScriptModule) and not scripted:
            raise ValueError(
                f"{where} is a TorchScript module, whose layers this method cannot replace: pass the Python module"
            )
        if m._forward_pre_hooks and any(isinstance(hook, WeightNorm) for hook in m._forward_pre_hooks.values()):
            raise ValueError(
                f"{where} has torch.nn.utils.weight_norm, which torch cannot copy: use "
                f"torch.nn.utils.parametrizations.weight_norm, which is the same"
            )
    check_adapters(modules)
    state = state_in(modules)
    for name, t in state.items():
        if is_sparse(t) and (t.layout != torch.sparse_coo or isinstance(t, nn.Parameter)):
            kind = "parameter" if isinstance(t, nn.Parameter) else "tensor"
            raise ValueError(
                f"'{name}' is a sparse {kind} of layout {t.layout}, which torch cannot copy: register it as a "
                f"buffer of layout torch.sparse_coo, as t.to_sparse_coo() is"
            )
    if any(is_lazy(t) for t in state.values()):
        raise ValueError("the module has lazy layers that have no weights yet: call it on one batch first")


def check_values(module: nn.Module) -> None:
    """Raise ValueError if a parameter or buffer is on the meta device, where it has a shape and no values."""
    with only_reading():
        state = state_of(module)
    for name, t in state.items():
        if t.is_meta:
            raise ValueError(
                f"'{name.replace('/', '.')}' is on the meta device and has no values: load the weights into the "
                f"network first, with load_state_dict(weights, assign=True)"
            )


def unwrapped(module: Any) -> Any:
    """Return the network that torch.compile, nn.DataParallel or DistributedDataParallel wraps; anything else as it is.

    It is compiled anew, together with its draws, and rows are not split over devices.
    """
    while isinstance(module, nn.Module):
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            module = module.module
        elif "_orig_mod" in module._modules:
            module = module._modules["_orig_mod"]
        else:
            break
    return module


def parameter_hooks(module: nn.Module) -> tuple[str, ...]:
    """The names of the parameters that have gradient hooks, which a copy of the module would lose."""
    return tuple(n for n, p in parameters_of(module).items() if p._backward_hooks)


def check_drawn(parameters: Mapping[str, Tensor]) -> None:
    """Refuse complex parameters, because the methods that draw weights draw real numbers."""
    for name, p in parameters.items():
        if p.is_complex():
            raise ValueError(
                f"parameter '{name}' is complex, and this method draws real weights only: keep it fixed with "
                f"requires_grad_(False), replace it by a real parameter of shape (..., 2) that the forward passes to "
                f"torch.view_as_complex, or use vbdl.DeepEnsemble or vbdl.MCDropout"
            )


def drawn_of_all(parameters: Mapping[str, Tensor]) -> list[str]:
    """Choose the parameters that a method draws by default, the real ones, and warn of complex ones; returns names."""
    complexes = [name for name, p in parameters.items() if p.is_complex()]
    if len(complexes) == len(parameters):
        check_drawn(parameters)
    if complexes:
        warnings.warn(
            f"complex parameters are trained and not drawn, so the predictions leave out what is unknown about them: "
            f"{', '.join(complexes)}. To draw them, hold real and imaginary parts in a real parameter of shape "
            f"(..., 2), and let the forward pass it to torch.view_as_complex",
            stacklevel=3,
        )
    return [name for name in parameters if name not in complexes]


def check_chosen(argument: str, chosen: object) -> None:
    """Raise TypeError for a single module name or type in place of a list: a name would be read letter by letter."""
    if isinstance(chosen, str | type):
        one = repr(chosen) if isinstance(chosen, str) else chosen.__name__
        raise TypeError(f"{argument} must be a list of module names or types, got {one}: write [{one}]")
