"""A new initialization of a network, by what its classes offer for it.

Each submodule's `reset_parameters` comes first. A network may offer more for all modules inside it: `init_weights()` of
timm and torch, `_init_weights(module)` of Hugging Face, the initialization of peft's adapters. A parametrized tensor
(weight_norm, spectral_norm) is initialized as the layer's own, and its originals are set to give that value. What only
the constructor of an untrained network has set is read from its numbers (`vbdl/nn/constructed.py`).
"""

import inspect
import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized, type_before_parametrizations
from torch.nn.utils.spectral_norm import SpectralNorm

from vbdl.calling.adapters import how_to_unfreeze, reset_adapters, with_frozen_of
from vbdl.calling.copies import copied
from vbdl.nn.constructed import again, differs, is_constant, is_untrained
from vbdl.types import is_posterior

logger = logging.getLogger("vbdl")


def fresh(module: nn.Module, seed: int, initialize: Callable[[nn.Module], object]) -> nn.Module:
    """Copy a module and initialize the copy with this seed; torch's global generator is left unchanged.

    Frozen parameters are not copied: they are those of the module.
    """
    copy = copied(module)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if initialize is reset_parameters:
            reset_parameters(copy, module)
        else:
            initialize(copy)
    return with_frozen_of(copy, module)


def reset_parameters(module: nn.Module, original: nn.Module | None = None) -> None:
    """Initialize a network or a posterior's network anew, and restore frozen parameters and buffers afterwards.

    original: the module that it is a copy of, which holds the frozen tensors; by default they are copied meanwhile.
    Raises ValueError if nothing initializes one of its trainable parameters, or if all parameters are frozen.
    """
    network = module.user_network if is_posterior(module) else module
    if not any(p.requires_grad for p in network.parameters()):
        raise ValueError(
            f"every parameter is frozen, so all members would be equal: call requires_grad_(True) on the parameters to "
            f"train{how_to_unfreeze(network)}, or give DeepEnsemble a list of trained modules"
        )
    # a submodule's initialization may change other submodules, so frozen tensors are restored after it
    kept = _frozen_values(network, original)
    waiting = {p: (name, owner) for name, owner, p in _without_own_initialization(network)}
    constructed = _constructed(network) if is_untrained(network) else {}
    before = {p: p.detach().clone() for p in waiting}
    with torch.no_grad():
        for p in before:  # what is not a number afterwards was not initialized
            p.fill_(math.nan)
        for path, m in network.named_modules():
            _reset(path, m)
        offered = _reset_by_offers(network)
        for t, value in kept.items():  # adapters may start from the base weights
            t.copy_(value)
        offered |= reset_adapters(network)
        taken = _as_constructed(network, offered, constructed)
        for p, (name, owner) in waiting.items():
            if not p.isnan().any():
                continue
            if owner not in offered or not is_constant(before[p]):
                raise ValueError(_uninitialized(name, owner))
            p.copy_(before[p])  # as the constructor set it
        for t, value in kept.items():
            t.copy_(value)
    if taken:
        logger.info(
            "a member of %s gets %s from the given network, whose constructor set it: constants as they are, other "
            "numbers in a new random order",
            type(network).__name__,
            ", ".join(taken),
        )


def _frozen_values(network: nn.Module, original: nn.Module | None) -> dict[Tensor, Tensor]:
    """The values of frozen tensors: the original's own ones, or copies."""
    if original is None:
        return {t: t.detach().clone() for m in network.modules() for t in _frozen(m)}
    source = original.user_network if is_posterior(original) else original
    pairs = zip(network.modules(), source.modules(), strict=True)
    return {t: value.detach() for m, o in pairs for t, value in zip(_frozen(m), _frozen(o), strict=True)}


def _constructed(network: nn.Module) -> dict[nn.Parameter, Tensor]:
    """The numbers of an untrained network's trainable parameters that are not parametrized."""
    inside = {p for m in network.modules() if is_parametrized(m) for p in m.parameters()}
    return {p: p.detach().clone() for p in network.parameters() if p.requires_grad and _has_nan(p) and p not in inside}


def _as_constructed(network: nn.Module, offered: set[nn.Module], constructed: dict[nn.Parameter, Tensor]) -> list[str]:
    """Set what nothing initializes, or a constructor clearly initialized otherwise, to another draw of its numbers.

    offered: modules that a class initializes itself. Returns the names of the parameters that were set.
    """
    taken = []
    for path, m in network.named_modules():
        for leaf, p in m.named_parameters(recurse=False):
            if m in offered or p not in constructed:
                continue
            value = constructed[p]
            if (bool(p.isnan().any()) or differs(value, p.detach())) and (other := again(value)) is not None:
                p.copy_(other)
                taken.append(f"{path}.{leaf}" if path else leaf)
    return taken


def _uninitialized(name: str, owner: nn.Module) -> str:
    path, _, leaf = name.rpartition(".")
    return (
        f"module '{path}' ({type(owner).__name__}) holds the parameter '{leaf}' and has no reset_parameters(): pass a "
        f"function that initializes a copy in place, DeepEnsemble(module, n_members, initialize=...), or write\n"
        f"    members = [make_network() for _ in range(n_members)]\n"
        f"    q = vbdl.DeepEnsemble(members)"
    )


def _own_reset(module: nn.Module) -> Callable[[], object] | None:
    """The `reset_parameters` of a module's class, or `_reset_parameters` as some of torch's layers call it."""
    for name in ("reset_parameters", "_reset_parameters"):
        if callable(reset := getattr(module, name, None)):
            return reset
    return None


def _without_own_initialization(network: nn.Module) -> list[tuple[str, nn.Module, nn.Parameter]]:
    """(name, owner, parameter) of the trainable floating-point parameters whose owner has no `reset_parameters`."""
    waiting = []
    parametrizations = {m for m in network.modules() if isinstance(m, ParametrizationList)}
    for path, m in network.named_modules():
        if m in parametrizations or _own_reset(m) is not None:
            continue
        for leaf, p in m.named_parameters(recurse=False):
            if p.requires_grad and _has_nan(p):
                waiting.append((f"{path}.{leaf}" if path else leaf, m, p))
    return waiting


def _reset(path: str, module: nn.Module) -> None:
    """Call a module's own `reset_parameters`, with its parametrized tensors in their plain form."""
    if isinstance(module, ParametrizationList):  # the parametrized layer sets its originals
        return
    if is_parametrized(module):
        _reset_parametrized(path, module)
        return
    hooks = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, SpectralNorm)]
    # torch's old spectral_norm computes an attribute of this name from an original, in each forward
    computed = {hook.name: vars(module)[hook.name] for hook in hooks}
    for name, t in computed.items():
        setattr(module, name, t.detach().clone())
    if (reset := _own_reset(module)) is not None:
        reset()
    for name, t in computed.items():
        getattr(module, f"{name}_orig").copy_(getattr(module, name))
        setattr(module, name, t)


def _reset_parametrized(path: str, module: nn.Module) -> None:
    """Reset a layer with parametrized tensors: reset its plain form, and set the originals to give the same values."""
    plain = nn.Module.__new__(type_before_parametrizations(module))
    vars(plain).update(vars(module))
    names = [name for name, _ in module.get_submodule("parametrizations").named_children()]
    parameters = {name: nn.Parameter(getattr(module, name).detach().clone()) for name in names}
    vars(plain)["_parameters"] = {**module._parameters, **parameters}
    if (reset := _own_reset(plain)) is None:
        if not any(p.requires_grad for p in module.parameters()):
            return
        raise ValueError(_uninitialized(f"{path}.{names[0]}", module))
    reset()
    for name, value in parameters.items():
        parametrizations = module.get_submodule(f"parametrizations.{name}")
        for p in parametrizations.children():
            if isinstance(p, _SpectralNorm):
                _restart(p, value)
        if all(callable(getattr(p, "right_inverse", None)) for p in parametrizations.children()):
            setattr(module, name, value.detach())
        else:  # the original is what the layer was built with
            parametrizations.get_parameter("original").copy_(value)


def _restart(norm: _SpectralNorm, weight: Tensor) -> None:
    """Begin the power iteration of a spectral norm anew, as its constructor does."""
    if weight.ndim > 1:
        for vector in (norm._u, norm._v):
            vector.copy_(nn.functional.normalize(torch.randn_like(vector), dim=0, eps=norm.eps))
        norm._power_method(norm._reshape_weight_to_matrix(weight), 15)


def _reset_by_offers(network: nn.Module) -> set[nn.Module]:
    """Call what classes offer to initialize all modules inside them; returns the modules that are inside one."""
    offered: set[nn.Module] = set()
    for m in network.modules():
        if m not in offered and (_takes(m, "init_weights", 0) or _takes(m, "_init_weights", 1)):
            offered.update(m.modules())
            _initialize_by(m)
    return offered


def _initialize_by(model: nn.Module) -> None:
    """Let a model initialize all modules inside it; what it leaves unchanged keeps its value.

    Its `init_weights()` comes first. Hugging Face's does nothing for a model that it initialized once, so its
    `_init_weights(module)` follows where numbers are missing.
    """
    originals = {p for m in model.modules() if isinstance(m, ParametrizationList) for p in m.parameters()}
    trainable = [p for p in model.parameters() if p.requires_grad and _has_nan(p) and p not in originals]
    before = {p: p.detach().clone() for p in trainable}
    for p in before:
        p.fill_(math.nan)
    if _takes(model, "init_weights", 0):
        model.init_weights()  # type: ignore[operator]
    if _takes(model, "_init_weights", 1) and any(p.isnan().any() for p in before):
        _initialize_inside(model, model)
    for p, value in before.items():
        p.copy_(torch.where(p.isnan(), value, p))


def _initialize_inside(model: nn.Module, module: nn.Module) -> None:
    for child in module.children():
        _initialize_inside(child if _takes(child, "_init_weights", 1) else model, child)
    if not isinstance(module, ParametrizationList) and not is_parametrized(module):
        model._init_weights(module)  # type: ignore[operator]


def _takes(module: nn.Module, method: str, count: int) -> bool:
    """Whether the module's class has a method of this name that can be called with `count` arguments."""
    function = getattr(type(module), method, None)
    if not inspect.isfunction(function):
        return False
    try:
        inspect.signature(function).bind(module, *[None] * count)
    except TypeError:
        return False
    return True


def _has_nan(t: Tensor) -> bool:
    """Whether the dtype of a tensor can mark numbers as missing."""
    return t.is_floating_point() or t.is_complex()


def _frozen(module: nn.Module) -> list[Tensor]:
    """A module's own frozen parameters, and its buffers (running statistics) too if all its parameters are frozen."""
    parameters = list(module.parameters(recurse=False))
    frozen: list[Tensor] = [p for p in parameters if not p.requires_grad]
    return [*frozen, *module.buffers(recurse=False)] if frozen and len(frozen) == len(parameters) else frozen
