"""Many states, one module, one call: the only file that calls `vmap` and `functional_call`.

outputs = vmap(lambda state: functional_call(module, {**shared, **state}, inputs))(stacked)
"""

import contextlib
import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._subclasses import FakeTensor
from torch.func import functional_call, vmap
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._pytree import tree_leaves, tree_map

from vbdl.calling.autograd import activations_kept
from vbdl.calling.inputs import arguments as arguments
from vbdl.calling.inputs import flatten, rebuilt
from vbdl.calling.inputs import map_inputs as map_inputs
from vbdl.calling.inputs import rebuild as rebuild
from vbdl.calling.inputs import tensors as tensors
from vbdl.types import Inputs as Inputs
from vbdl.types import Likelihood, State


def check_network(module: Any, scripted: bool = False) -> None:
    """TypeError or ValueError for what cannot be called with other weights: no module, compiled, lazy, or scripted
    where the method has to look inside.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"a network is an nn.Module, got {type(module).__name__}")
    for name, m in module.named_modules():
        where = f"module '{name}'" if name else "the module"
        if hasattr(m, "_orig_mod"):
            raise ValueError(f"{where} is compiled already, and vbdl compiles by itself: give it what was compiled")
        if isinstance(m, torch.jit.ScriptModule) and not scripted:
            raise ValueError(f"{where} is a TorchScript module, which cannot be looked into: give the Python module")
        if any(isinstance(hook, WeightNorm) for hook in m._forward_pre_hooks.values()):
            raise ValueError(
                f"{where} has torch.nn.utils.weight_norm, which torch cannot copy: use "
                f"torch.nn.utils.parametrizations.weight_norm, which is the same"
            )
    if any(is_lazy(t) for t in state_of(module).values()):
        raise ValueError("the module has lazy layers without weights yet: call it on one batch first")


def parameter_hooks(module: nn.Module) -> tuple[str, ...]:
    """Names of the parameters with hooks of their gradients, which no copy carries."""
    return tuple(n for n, p in module.named_parameters() if p._backward_hooks)


def check_chosen(argument: str, chosen: Any) -> None:
    """TypeError for one name or type of modules where a list of them is wanted: a name would be read by letters."""
    if isinstance(chosen, str | type):
        one = repr(chosen) if isinstance(chosen, str) else chosen.__name__
        raise TypeError(f"{argument} is a list of module names or types, got {one}: write [{one}]")


def state_of(module: nn.Module) -> State:
    """Parameters and buffers by name; a tied one once, under its first name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def call(module: nn.Module, state: State, inputs: Any) -> Any:
    """The module's output with these entries in place of its own, which stay untouched.

    In training an entry that the forward assigns (`self.mean = 0.9 * self.mean + ...`) is changed as one that it
    writes to would be.
    """
    args, kwargs = arguments(inputs)
    # functional_call would put a tensor in place once for every name of it. A module that has two names is one place:
    # the second time the drawn tensor would be taken for the module's own, and be left there.
    places = places_of(module)
    used = {place: t for name, t in state.items() for place in places.get(name, ())}
    with activations_kept() if torch.is_grad_enabled() else contextlib.nullcontext():
        output = functional_call(module, used, args, kwargs, tie_weights=False, strict=False)
    if torch.is_grad_enabled():  # functional_call leaves in `used` what the entries have become
        for name, t in state.items():
            for place in places.get(name, ()):
                if used[place] is not t and used[place].shape == t.shape:
                    with torch.no_grad():
                        t.copy_(used[place])
                    break
    return output


def places_of(module: nn.Module) -> dict[str, list[str]]:
    """Where each parameter and buffer is registered, by its first name: once for every module that holds it."""
    first: dict[int, str] = {}
    places: dict[str, list[str]] = {}
    for kind in ("_parameters", "_buffers"):
        for prefix, owner in module.named_modules():  # a module that has two names comes once
            for leaf, t in vars(owner)[kind].items():
                if t is not None:
                    name = f"{prefix}.{leaf}" if prefix else leaf
                    places.setdefault(first.setdefault(id(t), name), []).append(name)
    return places


def call_stacked(
    module: nn.Module,
    stacked: State,  # (samples, ...) each
    shared: State,
    inputs: Any,
    randomness: str = "error",
    inputs_stacked: bool = False,
) -> Any:
    """Outputs of every sample on the same inputs, or on inputs of its own: (samples, batch, ...)."""

    flat = flatten(inputs)

    def one(state: State, leaves: list[Tensor]):
        return call(module, {**shared, **state}, rebuilt(flat.structure, leaves))

    in_dims = (0, 0 if inputs_stacked else None)
    return vmap(one, in_dims=in_dims, randomness=randomness)(stacked, list(flat.tensors))


def call_each(
    module: nn.Module,
    stacked: State,  # (samples, ...) each
    shared: State,
    inputs: Any,
    inputs_stacked: bool = False,
) -> Tensor:
    """`call_stacked` one sample after the other, for what vmap cannot take."""
    count = next(iter(stacked.values())).shape[0]
    outputs, flat = [], flatten(inputs)
    for index in range(count):
        own = flat.map(lambda t, index=index: t[index]).nested if inputs_stacked else inputs
        outputs.append(call(module, {**shared, **select(stacked, index)}, own))
    return torch.stack(outputs)


def can_map(module: nn.Module) -> bool:
    """Whether vmap has a rule for every layer, as far as is known of torch's own: it has none for recurrent ones and
    for the power iterations of a spectral norm.
    """
    layers = (nn.RNNBase, _SpectralNorm, SpectralNorm)
    return not any(isinstance(m, layers) for own in module.modules() for m in (own, *own._forward_pre_hooks.values()))


def why_not_mapped(
    module: nn.Module, stacked: State, shared: State, inputs: Any, inputs_stacked: bool = False
) -> str | None:
    """None where `call_stacked` gives what `call_each` gives, in value and gradient, on these inputs; else the reason.

    `vmap` has no rule for some operations, and rules that leave out part of what the operation does for others. Nothing
    that is passed is changed, and neither is torch's generator. A module with noise of its own is taken at its word.
    """
    if not can_map(module):
        return "recurrent layers and power iterations have no batching rule"

    def run(execute: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        own = {n: t.detach().clone().requires_grad_(t.requires_grad) for n, t in stacked.items()}
        rest = {n: t.detach().clone() for n, t in shared.items()}
        extra = {"randomness": "different"} if execute is call_stacked else {}
        with torch.set_grad_enabled(any(t.requires_grad for t in own.values())), warnings.catch_warnings():
            warnings.filterwarnings("error", ".*batching rule.*")  # torch would loop, inside, and only warn
            # what a step writes to must not be what is differentiated
            outputs = execute(module, dict(own), rest, inputs, inputs_stacked=inputs_stacked, **extra)
            trained = [t for t in own.values() if t.requires_grad]
            gradients = ()
            if outputs.requires_grad:
                gradients = torch.autograd.grad(outputs.sum(), trained, allow_unused=True, materialize_grads=True)
        written = [t.detach() for t in own.values() if not t.requires_grad and t.is_floating_point()]
        return (outputs.detach(), *gradients, *written)

    device = next(iter(stacked.values())).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        before = torch.get_rng_state()
        try:
            together = run(call_stacked)
        except Exception as error:  # what vmap cannot take, it says in many ways
            return (str(error).strip() or type(error).__name__).splitlines()[0]
        if not torch.equal(before, torch.get_rng_state()):
            return None
        for a, b in zip(together, run(call_each), strict=True):
            scale = float(b.abs().nan_to_num(posinf=0.0).max()) if b.numel() else 0.0
            if not torch.allclose(a, b, rtol=_APART, atol=_APART * scale, equal_nan=True):
                return "mapped together they compute other numbers than one after the other"
    return None


_APART = 1e-3  # of the largest number: far beyond rounding, far below what a wrong rule does


def select(stacked: State, index: int) -> State:
    """One sample of a stacked state."""
    return {name: t[index] for name, t in stacked.items()}


def copied(module: nn.Module) -> nn.Module:
    """A copy; what a forward has kept in an attribute, which torch does not copy, is detached."""
    return holding(module, {})


def forget(module: nn.Module) -> None:
    """Detach what forwards have kept in attributes, like an attention map: it holds the graph of a step of training,
    or is a tensor of a trace that is over, which becomes None. Either would be in the way of a copy.
    """
    for m in module.modules():
        for name, value in list(vars(m).items()):
            if any(map(is_computed, tree_leaves(value))):
                vars(m)[name] = tree_map(lambda t: _detached(t) if is_computed(t) else t, value)


def is_computed(found: Any) -> bool:
    """Whether a forward has made this tensor and left it in an attribute."""
    return isinstance(found, Tensor) and (not found.is_leaf or _of_a_trace(found))


def _of_a_trace(t: Tensor) -> bool:
    return isinstance(t, FakeTensor) or is_functorch_wrapped_tensor(t)


def _detached(t: Tensor) -> Tensor | None:
    return None if _of_a_trace(t) else t.detach()


def holding(module: nn.Module, state: State) -> nn.Module:
    """A copy with these tensors in place of its own of those names; tied ones stay tied."""
    kept = [t for m in module.modules() for t in tree_leaves(vars(m)) if is_computed(t)]
    memo: dict[int, Any] = {id(t): _detached(t) for t in kept}
    for name, own in state_of(module).items():
        if name in state:
            is_parameter = isinstance(own, nn.Parameter)
            memo[id(own)] = nn.Parameter(state[name], own.requires_grad) if is_parameter else state[name]
    return copy.deepcopy(module, memo)


def blueprint(module: nn.Module) -> nn.Module:
    """A copy that holds structure only: its parameters and buffers are on the meta device."""
    return holding(module, {name: t.detach().to("meta") for name, t in state_of(module).items()})


def replicate(likelihood: Likelihood, n_members: int) -> None:
    """Give every parameter of a likelihood a leading members axis, in place: each member learns its own.

    Marked by `n_members`; one that is marked already is left as it is.
    """
    have = likelihood.n_members
    if have == n_members or not any(True for _ in likelihood.parameters()):
        return
    if have is not None:
        raise ValueError(f"the likelihood belongs to {have} members already, not to {n_members}: use a new one")
    for owner in likelihood.modules():
        for name, p in list(owner.named_parameters(recurse=False)):
            copies = p.detach().unsqueeze(0).repeat(n_members, *[1] * p.ndim)
            setattr(owner, name, nn.Parameter(copies, requires_grad=p.requires_grad))
    likelihood.n_members = n_members
