"""Calls of one module with many states (parameters and buffers), at once by `vmap` or one after the other.

    outputs = vmap(lambda state: call(module, {**shared, **state}, inputs))(stacked)

No other file calls `vmap`.
"""

import contextlib
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._subclasses import FakeTensor
from torch.autograd.function import once_differentiable
from torch.func import vmap
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._pytree import tree_leaves, tree_map

from vbdl.calling.adapters import check_adapters
from vbdl.calling.autograd import activations_kept, with_gradients_if_needed
from vbdl.calling.duplicating import duplicate
from vbdl.calling.graphs import in_words, recorded
from vbdl.calling.inputs import arguments, flatten, rebuilt
from vbdl.calling.traversing import modules_of, parameters_of
from vbdl.calling.traversing import state_of as state_of
from vbdl.types import Inputs, Likelihood, State

M = TypeVar("M", bound=nn.Module)


def check_network(module: object, scripted: bool = False) -> None:
    """Raise TypeError or ValueError if a network cannot be called with replaced weights.

    That is anything but an nn.Module, or one that is compiled, lazy, has torch's old weight_norm, idle adapters of peft
    or, unless `scripted`, is a TorchScript module.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"a network must be an nn.Module, got {type(module).__name__}")
    for name, m in modules_of(module):
        where = f"module '{name}'" if name else "the module"
        if hasattr(m, "_orig_mod"):
            raise ValueError(
                f"{where} was returned by torch.compile: pass the module that you compiled, vbdl compiles it itself"
            )
        if isinstance(m, torch.jit.ScriptModule) and not scripted:
            raise ValueError(
                f"{where} is a TorchScript module, whose layers this method cannot replace: pass the Python module"
            )
        if any(isinstance(hook, WeightNorm) for hook in m._forward_pre_hooks.values()):
            raise ValueError(
                f"{where} has torch.nn.utils.weight_norm, which torch cannot copy: use "
                f"torch.nn.utils.parametrizations.weight_norm, which is the same"
            )
    check_adapters(module)
    if any(is_lazy(t) for t in state_of(module).values()):
        raise ValueError("the module has lazy layers that have no weights yet: call it on one batch first")


def without_data_parallel(module: nn.Module) -> nn.Module:
    """The network inside nn.DataParallel or DistributedDataParallel, which only split rows over devices."""
    while isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        module = module.module
    return module


def parameter_hooks(module: nn.Module) -> tuple[str, ...]:
    """The names of the parameters that have gradient hooks, which a copy of the module would lose."""
    return tuple(n for n, p in parameters_of(module).items() if p._backward_hooks)


def check_chosen(argument: str, chosen: object) -> None:
    """Raise TypeError for a single module name or type in place of a list: a name would be read letter by letter."""
    if isinstance(chosen, str | type):
        one = repr(chosen) if isinstance(chosen, str) else chosen.__name__
        raise TypeError(f"{argument} must be a list of module names or types, got {one}: write [{one}]")


def without_dots(name: str) -> str:
    """The name of a parameter or buffer as one that torch lets a module register, which has no dots."""
    return name.replace(".", "/")


def call(module: nn.Module, state: State, inputs: Inputs) -> Any:  # what the forward returns
    """Call a module with these parameters and buffers in place of its own, which stay unchanged.

    With gradients enabled, an entry that the forward pass assigns (`self.mean = 0.9 * self.mean + ...`) is updated in
    `state`, as if the forward pass had written into it.
    """
    args, kwargs = arguments(inputs)
    if not state:
        with activations_kept() if torch.is_grad_enabled() else contextlib.nullcontext():
            return with_gradients_if_needed(lambda: module(*args, **kwargs))
    return _call_in(_slots(module, state), module, state, args, kwargs)


def caller(module: nn.Module, names: Collection[str]) -> Callable[[State, Inputs], Any]:
    """`call` of one module for several states of tensors with these names, whose places are looked up once."""
    slots = _slots(module, names)
    return lambda state, inputs: _call_in(slots, module, state, *arguments(inputs))


# a place of a parameter or buffer: the dict of the module that registers it, its name there, and its name in a state
_Slot = tuple[dict[str, Any], str, str]


def _slots(module: nn.Module, names: Collection[str]) -> list[_Slot]:
    """All places of the parameters and buffers with these names."""
    return [(tensors, leaf, name) for name, _, tensors, leaf in _registered(module) if name in names]


def _call_in(slots: Sequence[_Slot], module: nn.Module, state: State, args: tuple, kwargs: dict[str, Any]) -> Any:
    """`call` with the tensors of a state in these places."""
    before = [tensors[leaf] for tensors, leaf, _ in slots]
    for tensors, leaf, name in slots:
        tensors[leaf] = state[name]
    training = torch.is_grad_enabled()
    try:
        with activations_kept() if training else contextlib.nullcontext():
            output = with_gradients_if_needed(lambda: module(*args, **kwargs))
        if training:
            for tensors, leaf, name in slots:
                now, t = tensors.get(leaf), state[name]
                if now is not t and now is not None and now.shape == t.shape:  # the forward assigned it
                    with torch.no_grad():
                        t.copy_(now)
    finally:
        for (tensors, leaf, _), t in zip(slots, before, strict=True):
            tensors[leaf] = t
    return output


def call_with_buffer(module: nn.Module, name: str, value: Tensor, inputs: Inputs) -> Any:  # what the forward returns
    """`call` with one buffer, which the module itself registers and no other module has, without a search for it."""
    before = module._buffers[name]
    module._buffers[name] = value
    try:
        return call(module, {}, inputs)
    finally:
        module._buffers[name] = before


def places_of(module: nn.Module) -> dict[str, list[str]]:
    """All names under which each parameter and buffer is registered, by its first name, one for each owning module."""
    places: dict[str, list[str]] = {}
    for name, place, _, _ in _registered(module):
        places.setdefault(name, []).append(place)
    return places


def _registered(module: nn.Module) -> Iterator[tuple[str, str, dict[str, Any], str]]:
    """Yield each place of a parameter or buffer: its first name, this name, and the owner's dict and its name there."""
    first: dict[int, str] = {}
    owners = modules_of(module)  # a module that has two names once
    for kind in ("_parameters", "_buffers"):
        for prefix, owner in owners:
            tensors = vars(owner)[kind]
            for leaf, t in tensors.items():
                if t is not None:
                    place = f"{prefix}.{leaf}" if prefix else leaf
                    yield first.setdefault(id(t), place), place, tensors, leaf


def call_stacked(
    module: nn.Module,
    stacked: State,  # (samples, ...) each
    shared: State,
    inputs: Inputs,
    randomness: str = "error",
    inputs_stacked: bool = False,
) -> Tensor:
    """Call a module once with every sample's state, mapped together by vmap; returns (samples, batch, ...).

    stacked: the entries in which samples differ. shared: all others. inputs: (batch, ...), the same for every sample,
    or (samples, batch, ...) with inputs_stacked.
    """

    flat = flatten(inputs)

    def one(state: State, leaves: list[Tensor]):
        return call(module, {**shared, **state}, rebuilt(flat.structure, leaves))

    in_dims = (0, 0 if inputs_stacked else None)
    with recorded():
        return vmap(one, in_dims=in_dims, randomness=randomness)(stacked, list(flat.tensors))


def along_last(function: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """Apply a function of tensors to every slice t[..., k], mapped together by vmap; the last axis stays the last."""
    return vmap(function, in_dims=-1, out_dims=-1)(t)


def call_each(
    module: nn.Module,
    stacked: State,  # (samples, ...) each
    shared: State,
    inputs: Inputs,
    inputs_stacked: bool = False,
) -> Tensor:
    """`call_stacked` without vmap, one sample after the other, for modules that vmap cannot map."""
    run = _one_of(module, [*stacked, *shared], shared, inputs, inputs_stacked)
    return torch.stack([run(index, select(stacked, index)) for index in range(_count(stacked))])


def losses_of_each(
    module: nn.Module,
    stacked: State,  # (members, ...) each
    shared: State,
    inputs: Inputs,
    inputs_stacked: bool = False,
) -> Tensor:
    """`call_each` for a module that returns a loss, (), each differentiated before the next member runs: (members,).

    So one member's activations are in memory at a time, and near the processor when its gradient needs them. The
    losses can be differentiated once.
    """
    entries = {**shared, **stacked}
    trained = [name for name, t in entries.items() if t.requires_grad]
    if not (trained and torch.is_grad_enabled()) or any(map(is_of_a_trace, entries.values())):
        return call_each(module, stacked, shared, inputs, inputs_stacked)
    run = _one_of(module, list(entries), shared, inputs, inputs_stacked)
    parts = {name: t.detach().unbind(0) for name, t in stacked.items() if t.requires_grad}
    others = {name: t for name, t in stacked.items() if not t.requires_grad}

    def one(index: int) -> tuple[Tensor, Sequence[Tensor | None]]:
        """Compute a member's loss, and its gradients in the trained entries."""
        own = {n: (parts[n][index] if n in parts else entries[n].detach()).requires_grad_() for n in trained}
        loss = run(index, {**select(others, index), **own})
        return loss.detach(), torch.autograd.grad(loss, list(own.values()), allow_unused=True)

    of_each = [name in parts for name in trained]
    losses: Tensor = _Differentiated.apply(one, _count(stacked), of_each, *[entries[name] for name in trained])
    return losses


class _Differentiated(torch.autograd.Function):
    """Losses of members whose gradients are computed together with them, one member after the other."""

    @staticmethod
    def forward(
        ctx: Any,
        one: Callable[[int], tuple[Tensor, Sequence[Tensor | None]]],
        count: int,
        of_each: Sequence[bool],
        *trained: Tensor,
    ) -> Tensor:
        """one: a member's loss and its gradients in the trained tensors. of_each: which have a leading members axis."""
        with torch.enable_grad():
            losses, gradients = zip(*map(one, range(count)), strict=True)
        ctx.of_each, ctx.gradients = of_each, [list(g) for g in zip(*gradients, strict=True)]
        return torch.stack(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weights: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None  # held once, they become the parameters' gradients as they are
        plain = weights.device.type == "cpu" and bool((weights == 1).all())
        parts = [_together(g, own, None if plain else weights) for g, own in zip(gradients, ctx.of_each, strict=True)]
        return None, None, None, *parts


def _together(gradients: list[Tensor | None], of_each: bool, weights: Tensor | None) -> Tensor | None:
    """The gradient in an entry from those of the members' losses, times the weights of the losses.

    of_each: whether the entry has a leading members axis; the gradients in a shared one are added up.
    """
    like = next((g for g in gradients if g is not None), None)
    if like is None:
        return None
    stack = torch.stack([torch.zeros_like(like) if g is None else g for g in gradients])
    if weights is not None:
        stack = stack * weights.view(-1, *[1] * like.ndim)
    return stack if of_each else stack.sum(0)


def _count(stacked: State) -> int:
    return next(iter(stacked.values())).shape[0]


def _one_of(
    module: nn.Module, names: Sequence[str], shared: State, inputs: Inputs, inputs_stacked: bool
) -> Callable[[int, State], Any]:
    """Make a function that calls a module with one sample's state, (index, state) -> output; names: of all entries."""
    slots, flat = _slots(module, names), flatten(inputs)
    parts = [t.unbind(0) for t in flat.tensors] if inputs_stacked else []

    def one(index: int, state: State) -> Any:  # what the forward returns
        own = rebuilt(flat.structure, [part[index] for part in parts]) if inputs_stacked else inputs
        return _call_in(slots, module, {**shared, **state}, *arguments(own))

    return one


def can_map(module: nn.Module) -> bool:
    """False if the module has one of torch's layers that vmap has no rule for: recurrent layers and spectral norm."""
    layers = (nn.RNNBase, _SpectralNorm, SpectralNorm)
    return not any(isinstance(m, layers) for sub in module.modules() for m in (sub, *sub._forward_pre_hooks.values()))


def why_not_mapped(
    module: nn.Module,
    stacked: State,
    shared: State,
    inputs: Inputs,
    inputs_stacked: bool = False,
    watch: contextlib.AbstractContextManager[object] | None = None,
) -> str | None:
    """The reason why `call_stacked` must not replace `call_each`, or None if both agree in values and gradients.

    Both run on these inputs: vmap has no rule for some operations, and incomplete rules for others. The arguments and
    torch's generator stay unchanged. For a module that draws random numbers the two are not compared: returns None.

    watch: a context in which the module is called mapped together.
    """
    if not can_map(module):
        return "recurrent layers and power iterations have no batching rule"
    training = torch.is_grad_enabled()

    def run(execute: Callable[..., Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        copies = {n: t.detach().clone().requires_grad_(t.requires_grad) for n, t in stacked.items()}
        shared_copies = {n: t.detach().clone().requires_grad_(t.requires_grad and training) for n, t in shared.items()}
        extra = {"randomness": "different"} if execute is call_stacked else {}
        trained = [t for t in (*copies.values(), *shared_copies.values()) if t.requires_grad]
        with torch.set_grad_enabled(bool(trained)), warnings.catch_warnings():
            warnings.filterwarnings("error", ".*batching rule.*")  # otherwise torch warns, and loops inside vmap
            # a new dict, because the tensors to differentiate must not be replaced in `copies`
            with watch if watch is not None and execute is call_stacked else contextlib.nullcontext():
                outputs = execute(
                    module, dict(copies), dict(shared_copies), inputs, inputs_stacked=inputs_stacked, **extra
                )
            gradients = ()
            if outputs.requires_grad:
                gradients = torch.autograd.grad(outputs.sum(), trained, allow_unused=True, materialize_grads=True)
        written = [t.detach() for t in copies.values() if not t.requires_grad and t.is_floating_point()]
        return (outputs.detach(), *written), gradients

    device = next(iter(stacked.values())).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        before = torch.get_rng_state()
        try:
            together = run(call_stacked)
        except Exception as error:  # vmap raises errors of many types
            return in_words(error)
        if not torch.equal(before, torch.get_rng_state()):
            return None
        values, gradients = run(call_each)
        # a gradient that is zero but for rounding, like that of a bias before batch normalization, is exact enough
        rounding = _ROUNDING * max(map(_largest, gradients), default=0.0)
        least = [0.0] * len(values) + [rounding] * len(gradients)
        for a, b, zero in zip((*together[0], *together[1]), (*values, *gradients), least, strict=True):
            if not torch.allclose(a, b, rtol=_APART, atol=max(_APART * _largest(b), zero), equal_nan=True):
                return "mapped together they compute other numbers than one after the other"
    return None


def _largest(t: Tensor) -> float:
    """The largest magnitude of finite numbers, 0 if there are none."""
    return float(t.abs().nan_to_num(posinf=0.0).max()) if t.numel() else 0.0


_APART = 1e-3  # relative to the largest number: far above rounding errors, far below the effect of a wrong rule
_ROUNDING = 1e-5  # relative to the largest gradient: what cancellation leaves of a gradient that is zero


def select(stacked: State, index: int) -> State:
    """The state of one sample: (samples, ...) entries -> (...) entries."""
    return {name: t[index] for name, t in stacked.items()}


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
    return [
        (name, value)
        for name, value in vars(module).items()
        if type(value) not in _ATOMS and name != "_modules" and _may_hold_tensors(value)
    ]


def _leaves(name: str, value: Any) -> Iterable[Any]:
    """The leaves of an attribute."""
    return value.values() if name in ("_parameters", "_buffers") else tree_leaves(value)


def _may_hold_tensors(value: object) -> bool:
    if isinstance(value, tuple | list):
        return any(map(_may_hold_tensors, value))
    if isinstance(value, dict):
        return bool(value)
    return not isinstance(value, _WITHOUT_TENSORS)


_ATOMS = frozenset((type(None), bool, int, float, str, set))
_WITHOUT_TENSORS = (*_ATOMS, nn.Module)


def is_computed(value: object) -> bool:
    """True if a value is a tensor that a forward pass computed, with gradients or in a trace."""
    return isinstance(value, Tensor) and (not value.is_leaf or is_of_a_trace(value))


def is_of_a_trace(t: Tensor) -> bool:
    """True if a tensor stands for values in a trace or a transform of torch.func."""
    return isinstance(t, FakeTensor) or is_functorch_wrapped_tensor(t)


def _detached(t: Tensor) -> Tensor | None:
    return None if is_of_a_trace(t) else t.detach()


_TABLES = frozenset(vars(nn.Module())) - {"training"}  # of every module: its tensors, its modules and its hooks


def is_cache(module: nn.Module, name: str) -> bool:
    """Whether torch keeps the parameters of a recurrent layer in this attribute, which it renews when they change."""
    return name in ("_flat_weights", "_flat_weight_refs") and isinstance(module, nn.RNNBase)


def kept_by(module: nn.Module) -> list[tuple]:
    """What the modules keep in attributes, apart from parameters and buffers: tensors and their versions, and numbers.

    Two lists are equal if nothing was kept, replaced or written to in between.
    """
    kept: list[tuple] = []
    for i, (_, m) in enumerate(modules_of(module)):
        for name, value in vars(m).items():
            if value is None or name in _TABLES or is_cache(m, name):
                continue
            if isinstance(value, str | set) or (isinstance(value, dict) and not value):
                continue
            for leaf in (value,) if isinstance(value, int | float) else tree_leaves(value):
                if isinstance(leaf, Tensor):
                    kept.append((i, name, id(leaf), leaf._version))
                elif isinstance(leaf, (int, float)):
                    kept.append((i, name, leaf))
    return kept


def holding(module: M, state: State, kept: Sequence[Tensor] = ()) -> M:
    """A deep copy of a module with these tensors in place of those of the same names; tied tensors stay tied.

    kept: tensors in attributes of the module that the copy holds too.
    """
    stored = [t for _, m in modules_of(module) for n, v in _attributes(m) for t in _leaves(n, v) if is_computed(t)]
    memo: dict[int, Tensor | None] = {id(t): _detached(t) for t in stored} | {id(t): t for t in kept}
    for name, tensor in state_of(module).items():
        if name in state:
            is_parameter = isinstance(tensor, nn.Parameter)
            t = state[name]
            memo[id(tensor)] = nn.Parameter(t, tensor.requires_grad and not t.is_inference()) if is_parameter else t
    return duplicate(module, memo)


def blueprint(module: M) -> M:
    """A copy of a module's structure, without numbers: its parameters and buffers are on the meta device."""
    return holding(module, {name: t.detach().to("meta") for name, t in state_of(module).items()})


def replicate(likelihood: Likelihood, n_members: int) -> None:
    """Give every parameter of a likelihood a leading members axis, in place, so that each member learns its own.

    Sets `likelihood.n_members`; a likelihood that has this number already stays as it is. Raises ValueError if it has
    another.
    """
    current = likelihood.n_members
    if current == n_members or not any(True for _ in likelihood.parameters()):
        return
    if current is not None:
        raise ValueError(f"the likelihood belongs to {current} members already, not to {n_members}: use a new one")
    for owner in likelihood.modules():
        for name, p in list(owner.named_parameters(recurse=False)):
            copies = p.detach().unsqueeze(0).repeat(n_members, *[1] * p.ndim)
            setattr(owner, name, nn.Parameter(copies, requires_grad=p.requires_grad))
    likelihood.n_members = n_members


def of_members(likelihood: Likelihood, members: range) -> Likelihood:
    """A likelihood of these members alone, whose parameters are parts of this one's: training it trains them.

    A likelihood whose parameters all members share is returned as it is.
    """
    if likelihood.n_members is None:
        return likelihood
    of_each = {id(p) for layer in _with_members(likelihood) for p in layer.parameters()}
    named = likelihood.named_parameters()
    parts = {n: p.detach()[members.start : members.stop] if id(p) in of_each else p for n, p in named}
    part: Likelihood = holding(likelihood, parts | dict(likelihood.named_buffers()))
    for layer in _with_members(part):
        layer.n_members = len(members)
    return part


def _with_members(likelihood: Likelihood) -> Iterator[Likelihood]:
    """Yield the layers that training set n_members on: those that it was given, inside calibrations made later."""
    layer: Likelihood | None = likelihood
    while layer is not None:
        if "n_members" in vars(layer):
            yield layer
        layer = layer.wrapped
