"""Layers whose weights a network's own forward draws, found by running it, so that they can draw their outputs instead.

A weight mean + std * noise, however the forward writes it, is the mean under noise 0, and std follows from a run under
a larger noise. With the noise 0, the layer gets its mean weight, and the noise of its outputs is added to what it
computes. Formula and draws are those of the graph (`vbdl/compiling/rewrite/local.py`).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vbdl.calling.graphs import FunctionMode
from vbdl.nn.local_outputs import DrawnOutputs, Moments
from vbdl.nn.noise import RandomCall
from vbdl.types import Arguments, Keywords

LARGE = 1024.0  # the noise of the run that tells std; a power of two, far above mean / std of most weights
CHECKED = (-LARGE, -1 / 16)  # under which std is the same, unless noise turns a weight's noise on or off, or its sign
_APART = 1e-5  # relative to the terms of the sum: some roundings of float32
_NORMAL = ("randn", "randn_like", "normal", "normal_")  # functions of standard normal numbers


@dataclass
class Linear:
    """One call of `F.linear` in a forward."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class LocalLayer:
    """A call of `F.linear` that draws its outputs.

    call: the call's number among those of the forward. number: of the weight's noise among the random calls.
    variance: of the weight, (outputs, inputs). of_bias: the number of the bias's noise, and the variance, (outputs,).
    """

    call: int
    number: int
    variance: Tensor
    of_bias: tuple[int, Tensor] | None

    @property
    def noises(self) -> set[int]:
        """The numbers of the random calls that only this layer uses."""
        return {self.number, *(() if self.of_bias is None else self.of_bias[:1])}


class Linears(FunctionMode):
    """A context that records the calls of `F.linear`. given: the weight and bias to use in place of those of a call."""

    def __init__(self, given: Mapping[int, Linear] | None = None):
        super().__init__()
        self.calls: list[Linear] = []
        self._given = given or {}

    def __torch_function__(
        self, func: Callable[..., object], types: Sequence[type], args: Arguments = (), kwargs: Keywords | None = None
    ) -> object:
        if func is not F.linear:
            return func(*args, **(kwargs or {}))
        call = _linear(*args, **(kwargs or {}))
        if (other := self._given.get(len(self.calls))) is not None:
            call = Linear(call.x, other.weight, other.bias)
        # the forward may draw into its tensors again
        bias = None if call.bias is None else call.bias.detach().clone()
        self.calls.append(Linear(call.x.detach().clone(), call.weight.detach().clone(), bias))
        return func(call.x, call.weight, call.bias)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Linear:
    return Linear(input, weight, bias)


class OwnOutputs(DrawnOutputs):
    """A context in which these calls of `F.linear`, whose weights are drawn with noise 0, draw their outputs."""

    def __init__(self, key: Tensor, layers: Sequence[LocalLayer]):
        super().__init__(key, {})
        self._layers = {layer.call: layer for layer in layers}
        self._count = 0

    def __torch_function__(
        self, func: Callable[..., object], types: Sequence[type], args: Arguments = (), kwargs: Keywords | None = None
    ) -> object:
        if func is F.linear:
            number, self._count = self._count, self._count + 1
            if (layer := self._layers.get(number)) is not None:
                call = _linear(*args, **(kwargs or {}))
                of_bias = None if layer.of_bias is None else layer.of_bias[1]
                return self._drawn(call.x, call.bias, Moments(call.weight, layer.variance, layer.number, of_bias))
        return func(*args, **(kwargs or {}))


@dataclass
class Pass:
    """What one forward did: its calls of `F.linear`, its outputs, and the normal noise of each random call."""

    linears: list[Linear]
    outputs: Any
    calls: Sequence[RandomCall]
    normals: dict[int, Tensor] = field(default_factory=dict)


def local_layers(drawn: Pass, at_zero: Pass, at_large: Pass, others: Pass, rows: int) -> tuple[LocalLayer, ...] | None:
    """The layers that draw outputs, or None if it is not clear.

    drawn: a forward under noise. at_zero, at_large: the same with 0 and `LARGE` as the normal numbers of every random
    call that has no batch axis. others: one on other rows. rows: the rows of the first three.
    """
    count = len(drawn.linears)
    if any(len(p.linears) != count for p in (at_zero, at_large, others)):
        return None
    layers, used = [], set()
    for number, (call, zero, large, other) in enumerate(
        zip(drawn.linears, at_zero.linears, at_large.linears, others.linears, strict=True)
    ):
        if torch.equal(zero.weight, large.weight):
            continue  # an unknown bias alone does not draw outputs
        if call.x.ndim != 2 or call.x.shape[0] != rows or call.weight.ndim != 2:
            continue
        if not any(math.prod(c.shape) == call.weight.numel() for c in drawn.calls):
            continue  # noise of another shape than the weight's, such as of rank one
        if torch.equal(other.x, call.x[:1].expand_as(other.x)):
            return None  # a constant, or rows that are equal
        of_weight = _affine(call.weight, zero.weight, large.weight, drawn)
        if of_weight is None:
            return None
        of_bias = None
        if call.bias is not None and zero.bias is not None and large.bias is not None:
            of_bias = _affine(call.bias, zero.bias, large.bias, drawn)
            if of_bias is None and not torch.equal(zero.bias, large.bias):
                return None
        layer = LocalLayer(number, of_weight[0], of_weight[1].square(), of_bias and (of_bias[0], of_bias[1].square()))
        if layer.noises & used or (of_bias is not None and len(layer.noises) < 2):
            return None
        used |= layer.noises
        layers.append(layer)
    return tuple(layers)


def only_normal(calls: Sequence[RandomCall]) -> bool:
    """Whether all noise that rows share, which could enter a weight's std, is an array of normal numbers."""
    return all(c.kind in _NORMAL and len(c.shape) > 0 for c in calls if c.axis is None)


def are_as_found(layers: Sequence[LocalLayer], at_zero: Pass, at_value: Pass, value: float) -> bool:
    """Whether the weights and biases of layers are mean + std * value under this value as the noise."""
    if len(at_value.linears) != len(at_zero.linears):
        return False
    for layer in layers:
        zero, found = at_zero.linears[layer.call], at_value.linears[layer.call]
        parts = [(zero.weight, found.weight, layer.variance)]
        if layer.of_bias is not None and zero.bias is not None and found.bias is not None:
            parts.append((zero.bias, found.bias, layer.of_bias[1]))
        for mean, weight, variance in parts:
            deviation = value * variance.sqrt()
            if bool(((weight - mean).abs() - deviation.abs()).abs().gt(_APART * (mean.abs() + deviation.abs())).any()):
                return False
    return True


def _affine(value: Tensor, zero: Tensor, large: Tensor, drawn: Pass) -> tuple[int, Tensor] | None:
    """The number of the noise with which a value is zero + std * noise, and std; None if there is none."""
    if torch.equal(zero, large):
        return None
    std = (large - zero) / LARGE
    for number, noise in drawn.normals.items():
        call = drawn.calls[number]
        if call.kind in _NORMAL and call.axis is None and call.shape == value.shape and noise.dtype == value.dtype:
            deviation = std * noise
            if bool(((value - zero - deviation).abs() <= _APART * (zero.abs() + deviation.abs())).all()):
                return number, std
    return None
