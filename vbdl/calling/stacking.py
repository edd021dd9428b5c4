"""Calls of one module with many states (parameters and buffers), at once by `vmap`.

    outputs = vmap(lambda state: call(module, {**shared, **state}, inputs))(stacked)

No other file calls `vmap`.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._subclasses import FakeTensor
from torch.func import vmap

from vbdl.calling.autograd import activations_kept, with_gradients_if_needed
from vbdl.calling.graphs import recorded
from vbdl.calling.inputs import arguments, flatten, rebuilt
from vbdl.calling.traversing import modules_of
from vbdl.types import Inputs, State


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
    return call_in(slots_of(module, state), module, state, args, kwargs)


def caller(module: nn.Module, names: Collection[str]) -> Callable[[State, Inputs], Any]:
    """`call` of one module for several states of tensors with these names, whose places are looked up once."""
    slots = slots_of(module, names)
    return lambda state, inputs: call_in(slots, module, state, *arguments(inputs))


# a place of a parameter or buffer: the dict of the module that registers it, its name there, and its name in a state
_Slot = tuple[dict[str, Any], str, str]


def slots_of(module: nn.Module, names: Collection[str] | None = None) -> list[_Slot]:
    """Find all places of the parameters and buffers with these names; None: of all."""
    return [(tensors, leaf, n) for n, _, tensors, leaf in _registered(module) if names is None or n in names]


def call_in(slots: Sequence[_Slot], module: nn.Module, state: State, args: tuple, kwargs: dict[str, Any]) -> Any:
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
                # the dictionaries of scripted modules have no `get`
                now, t = tensors[leaf] if leaf in tensors else None, state[name]  # noqa: SIM401
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


def select(stacked: State, index: int) -> State:
    """The state of one sample: (samples, ...) entries -> (...) entries."""
    return {name: t[index] for name, t in stacked.items()}


def is_of_a_trace(t: Tensor) -> bool:
    """True if a tensor stands for values in a trace or a transform of torch.func."""
    return isinstance(t, FakeTensor) or is_functorch_wrapped_tensor(t)
