"""LSTM, GRU and RNN layer by layer: with dropout between them drawn from counters, and each layer as one operator."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_batchedtensor

from vbdl.calling.autograd import holds_tangent, is_differentiated, is_pushed_once
from vbdl.calling.graphs import FunctionMode
from vbdl.nn.masks import Masks
from vbdl.nn.recurrent_layer import KINDS, recurrent_layer
from vbdl.nn.recurrent_tangent import pushed
from vbdl.nn.scan import Packing

Outputs = tuple[Tensor, ...]  # the outputs of all steps, then the final h, of an LSTM also the final c


@dataclass(frozen=True)
class Recurrent:
    """A call of `torch.lstm`, `gru`, `rnn_tanh` or `rnn_relu`.

    input: (batch, steps, features), (steps, batch, features) or, packed, (entries, features).
    """

    func: Callable[..., Outputs]
    input: Tensor
    batch_sizes: Tensor | None  # (steps,) int64, the number of rows that have each step, if packed
    states: tuple[Tensor, ...]  # h, of an LSTM also c: (layers * directions, batch, hidden)
    weights: list[Tensor]
    biases: bool
    layers: int
    dropout: float
    training: bool
    bidirectional: bool
    batch_first: bool

    @classmethod
    def of(cls, func: Callable[..., Outputs], input: Tensor, *args: Any) -> "Recurrent":
        """Read the arguments of the function."""
        sizes, rest = None, list(args)
        if isinstance(rest[0], Tensor) and rest[0].dtype == torch.int64 and rest[0].ndim == 1:
            sizes = rest.pop(0)
        hidden, weights, biases, layers, dropout, training, bidirectional, *order = rest
        states = tuple(hidden) if isinstance(hidden, tuple | list) else (hidden,)
        first = any(order)
        return cls(func, input, sizes, states, list(weights), biases, layers, dropout, training, bidirectional, first)

    @property
    def drops(self) -> bool:
        """Whether torch's own dropout runs between the layers."""
        return self.training and self.dropout > 0 and self.layers > 1

    def call(self) -> Outputs:
        """Call the function, without dropout."""
        sizes = () if self.batch_sizes is None else (self.batch_sizes,)
        hidden = self.states if self.func.__name__ == "lstm" else self.states[0]
        options = (self.biases, self.layers, 0.0, False, self.bidirectional)
        order = (self.batch_first,) if self.batch_sizes is None else ()
        return self.func(self.input, *sizes, hidden, self.weights, *options, *order)

    def by_layers(
        self, run: Callable[["Recurrent"], Outputs], between: Callable[[Tensor], Tensor] | None = None
    ) -> Outputs:
        """Run one layer after the other. between: is applied to the outputs of every layer but the last."""
        directions, size = (2 if self.bidirectional else 1), len(self.weights) // self.layers
        input, finals = self.input, []
        for layer in range(self.layers):
            if layer and between is not None:
                input = between(input)
            states = tuple(s[layer * directions : (layer + 1) * directions] for s in self.states)
            weights = self.weights[layer * size : (layer + 1) * size]
            options = (self.biases, 1, 0.0, False, self.bidirectional, self.batch_first)
            input, *final = run(Recurrent(self.func, input, self.batch_sizes, states, weights, *options))
            finals.append(final)
        return (input, *(torch.cat(parts) for parts in zip(*finals, strict=True)))


def recurrent(masks: Masks, func: Callable[..., Outputs], input: Tensor, *args) -> Outputs:
    """`torch.lstm`, `gru`, `rnn_tanh` or `rnn_relu`, run layer by layer if there is dropout between the layers.

    The masks between layers of a packed sequence, (entries, features), are those of the padded one.
    """
    call = Recurrent.of(func, input, *args)
    if not call.training or call.layers == 1 or masks.p(call.dropout, masks.place()) == 0.0:
        return call.call()  # rate 0: torch would draw dropout from its own generator

    def between(x: Tensor) -> Tensor:
        if call.batch_sizes is not None:
            return masks.drop_steps(x, call.batch_sizes, call.dropout, func.__name__)
        return masks.drop(x, call.dropout, func.__name__)

    return call.by_layers(Recurrent.call, between)


class WholeLayers(FunctionMode):
    """A torch function mode in which each layer of an LSTM, GRU or RNN is one `recurrent_layer`, which vmap maps.

    In a forward-mode product, `recurrent_tangent` is beside it; inside another transform of torch.func it is torch's
    own layer, because the operator would lose the tangents without a word.

    Sequences that differ between samples under vmap, or have tangents, are packed and padded by other operations.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in _PACKING and not kwargs and (is_batchedtensor(args[0]) or holds_tangent(args[0])):
            return _PACKING[name](*args)
        if name in KINDS and not kwargs:
            call = Recurrent.of(func, *args)
            if is_differentiated() or any(map(holds_tangent, (call.input, *call.states, *call.weights))):
                return call.by_layers(_pushed) if is_pushed_once() and not call.drops else call.func(*args)
            if not call.drops:
                return call.by_layers(_whole)
        return func(*args, **(kwargs or {}))


def _pack(padded: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
    """`torch._pack_padded_sequence` of a sequence that vmap maps; lengths: (batch,) int64, falling, of all samples."""
    sizes = (lengths > torch.arange(int(lengths[0])).unsqueeze(1)).sum(1)
    steps = (padded.transpose(0, 1) if batch_first else padded)[: len(sizes)]
    return Packing(sizes).pack(steps.unsqueeze(0)).squeeze(0), sizes


def _pad(data: Tensor, sizes: Tensor, batch_first: bool, value: float, total: int | None) -> tuple[Tensor, Tensor]:
    """`torch._pad_packed_sequence` of a sequence that vmap maps."""
    packing = Packing(sizes)
    padded = packing.pad(data.unsqueeze(0)).squeeze(0)
    there = packing.there.view(*packing.there.shape, *[1] * (padded.ndim - 2))
    padded = torch.where(there, padded, value)
    if total is not None and total > len(sizes):
        padded = torch.cat([padded, torch.full_like(padded[:1], value).expand(total - len(sizes), *padded.shape[1:])])
    return (padded.transpose(0, 1) if batch_first else padded), packing.lengths


_PACKING = {"_pack_padded_sequence": _pack, "_pad_packed_sequence": _pad}


def _whole(call: Recurrent) -> Outputs:
    """One layer as one operator."""
    stacked = [False] * (1 + len(call.states) + len(call.weights))
    return _by_steps(call, lambda *arguments: recurrent_layer(*arguments, stacked))


def _pushed(call: Recurrent) -> Outputs:
    """One layer and its tangent as two operators."""
    return _by_steps(call, pushed)


def _by_steps(call: Recurrent, run: Callable[..., Outputs]) -> Outputs:
    """Run one layer with the steps as first axis."""
    x = call.input.transpose(0, 1) if call.batch_first else call.input
    options = (call.func.__name__, call.biases, call.bidirectional)
    out, *finals = run(x, call.batch_sizes, list(call.states), call.weights, *options)
    return (out.transpose(0, 1) if call.batch_first else out, *finals[: len(call.states)])


class CarriedStates(FunctionMode):
    """A torch function mode in which recurrent layers go on from the states that they ended with in the last forward.

    states: the final states of each call of a recurrent layer, in the order of the calls; empty before the first
        forward, and replaced by those of this one.
    """

    def __init__(self, states: list[tuple[Tensor, ...]]):
        super().__init__()
        self.states = states
        self.calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") not in KINDS or kwargs:
            return func(*args, **(kwargs or {}))
        call = Recurrent.of(func, *args)
        if call.bidirectional:
            raise ValueError(
                "a bidirectional layer reads a sequence from its end too, which a stream has not: predict the whole "
                "sequence, or use layers of one direction"
            )
        if call.batch_sizes is not None:
            raise ValueError(
                "a stream takes parts of one length, whose rows go on in the next part, and this network packs its "
                "sequences: pass it parts without padding, in a network that does not pack them"
            )
        place, self.calls = self.calls, self.calls + 1
        if place < len(self.states):
            call = dataclasses.replace(call, states=self.states[place])
        out, *finals = call.call()
        self.states[place : place + 1] = [tuple(t.detach() for t in finals)]
        return (out, *finals)


def runs_whole_layers(network: nn.Module, device: torch.device) -> bool:
    """Whether a network has recurrent layers that `WholeLayers` runs; on an accelerator torch's own are faster."""
    return device.type == "cpu" and any(isinstance(m, nn.RNNBase) for m in network.modules())
