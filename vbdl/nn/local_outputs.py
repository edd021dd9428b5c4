"""Layers with normal weights that draw their outputs, in a network that runs as it is and is not traced.

    y = m + sqrt(v) noise,   m = x mean^T + bias_mean,   v = x^2 (std^2)^T + bias_std^2

The layers, the formula and the draws are those of the graph (`vbdl/compiling/rewrite/local.py`), so that the network as
it is can answer while the graph is being traced. Which layers they are follows from two runs on other rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from vbdl_kernels import normal
from vbdl_kernels.philox import ACTIVATION

from vbdl.calling.graphs import FunctionMode
from vbdl.nn.drawn_uses import DrawnUses, Function, layer_arguments
from vbdl.types import Arguments, Keywords


def local_layers(first: DrawnUses, second: DrawnUses, rows: int) -> dict[str, str | None] | None:
    """The weights of the layers that draw outputs, each with its bias if that is drawn too; None if it is not clear.

    first, second: what two forwards on other rows do. rows: the rows of the first.

    A layer draws outputs if it acts once on one vector of every row, and its input depends on the rows.
    """
    if (first.unused and first.by_values) or (second.unused and second.by_values):
        return None  # other rows may use other parameters
    local: dict[str, str | None] = {}
    biases = [call.bias for calls in first.layers.values() for call in calls if call.bias is not None]
    for name, calls in first.layers.items():
        if calls[0].axes != 2:
            continue
        if name in first.others or len(calls) != 1 or len(second.layers.get(name, [])) != 1:
            return None
        x, bias, other = calls[0].x, calls[0].bias, second.layers[name][0].x
        if x.ndim < 2 or (x.ndim == 2 and x.shape[0] < rows):
            return None  # it gets some of the rows, or one after the other, and may get others next time
        if x.ndim != 2 or x.shape[0] != rows:
            continue
        if torch.equal(other, x[:1].expand_as(other)):
            return None  # a constant, or rows that are equal
        if bias is not None and (bias in first.others or biases.count(bias) > 1):
            return None
        local[name] = bias
    return local


@dataclass(frozen=True)
class Moments:
    """The moments of a layer's weight (outputs, inputs) and bias (outputs,), and its number in the counters.

    The bias has no variance if it is not drawn.
    """

    mean: Tensor
    variance: Tensor
    layer: int
    bias_variance: Tensor | None


class DrawnOutputs(FunctionMode):
    """A context in which these layers draw their outputs.

    key: (2,) int64, or (draws, 2) for rows that repeat the batch once for each draw.
    moments: of each layer, by the id of its mean weight, which is the weight that `F.linear` gets.
    """

    def __init__(self, key: Tensor, moments: Mapping[int, Moments]):
        super().__init__()
        self._key, self._moments = key, moments

    def __torch_function__(
        self, func: Function, types: Sequence[type], args: Arguments = (), kwargs: Keywords | None = None
    ) -> object:
        kwargs = kwargs or {}
        if func is F.linear:
            x, weight, bias, _ = layer_arguments(*args, **kwargs)
            if (moments := self._moments.get(id(weight))) is not None:
                return self._drawn(x, bias, moments)
        return func(*args, **kwargs)

    def _drawn(self, x: Tensor, bias: Tensor | None, moments: Moments) -> Tensor:
        noise: Any = normal(self._key.to(x.device), moments.layer, ACTIVATION, 1, len(moments.mean)).to(x.dtype)
        if noise.ndim == 3:
            noise = noise.expand(-1, x.shape[0] // len(noise), -1).flatten(0, 1)
        variance = F.linear(x.square(), moments.variance, moments.bias_variance)
        return F.linear(x, moments.mean, bias) + variance.sqrt() * noise
