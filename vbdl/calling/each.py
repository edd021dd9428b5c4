"""Calls of one module with many states, one after the other, and the gradients of each before the next runs."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vbdl.calling.inputs import arguments, flatten, rebuilt
from vbdl.calling.stacking import call_in, is_of_a_trace, select, slots_of
from vbdl.types import Inputs, State

Turn = Callable[[int], contextlib.AbstractContextManager[None]]


def call_each(
    module: nn.Module,
    stacked: State,  # (samples, ...) each
    shared: State,
    inputs: Inputs,
    inputs_stacked: bool = False,
    turn: Turn = contextlib.nullcontext,
) -> Tensor:
    """`call_stacked` without vmap, one sample after the other, for modules that vmap cannot map.

    turn: the number of a sample -> a context in which it runs.
    """
    run = _one_of(module, [*stacked, *shared], shared, inputs, inputs_stacked)

    def one(index: int) -> Any:
        with turn(index):
            return run(index, select(stacked, index))

    return torch.stack([one(index) for index in range(_count(stacked))])


def losses_of_each(
    module: nn.Module,
    stacked: State,  # (members, ...) each
    shared: State,
    inputs: Inputs,
    inputs_stacked: bool = False,
    turn: Turn = contextlib.nullcontext,
) -> Tensor:
    """`call_each` for a module that returns a loss, (), each differentiated before the next member runs: (members,).

    So one member's activations are in memory at a time, and near the processor when its gradient needs them. The
    losses can be differentiated once.
    """
    entries = {**shared, **stacked}
    trained = [name for name, t in entries.items() if t.requires_grad]
    if not (trained and torch.is_grad_enabled()) or any(map(is_of_a_trace, entries.values())):
        return call_each(module, stacked, shared, inputs, inputs_stacked, turn)
    run = _one_of(module, list(entries), shared, inputs, inputs_stacked)
    parts = {name: t.detach().unbind(0) for name, t in stacked.items() if t.requires_grad}
    others = {name: t for name, t in stacked.items() if not t.requires_grad}

    def one(index: int) -> tuple[Tensor, Sequence[Tensor | None]]:
        """Compute a member's loss, and its gradients in the trained entries."""
        own = {n: (parts[n][index] if n in parts else entries[n].detach()).requires_grad_() for n in trained}
        with turn(index):
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
    slots, flat = slots_of(module, names), flatten(inputs)
    parts = [t.unbind(0) for t in flat.tensors] if inputs_stacked else []

    def one(index: int, state: State) -> Any:  # what the forward returns
        own = rebuilt(flat.structure, [part[index] for part in parts]) if inputs_stacked else inputs
        return call_in(slots, module, {**shared, **state}, *arguments(own))

    return one
