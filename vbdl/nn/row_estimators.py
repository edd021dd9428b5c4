"""Estimators of mean-field training that draw for every row: local reparameterization and flipout.

With one draw of a weight W ~ N(M, S^2) for all rows of a batch, the gradient's noise is common to the rows, and does
not fall with their number. A layer with input x may draw for each row instead:

local      y = x M^T + sqrt(x^2 (S^2)^T) e            e normal, for every row and output
flipout    y = x M^T + ((x s) (S E)^T) r              E normal, of the draw; signs s, r for every row

A row's output is distributed as with a W of its own. Flipout's is that of one W for each row, however often the layer
acts on it. Local reparameterization draws every output, so it is exact where a layer acts once on one vector of a row;
in convolutions and over further axes it leaves out that outputs of a row share weights, and is approximate.

Kingma, Salimans and Welling, Variational Dropout and the Local Reparameterization Trick, NeurIPS 2015,
https://arxiv.org/abs/1506.02557; Wen, Vicol, Ba, Tran and Grosse, Flipout: Efficient Pseudo-Independent Weight
Perturbations on Mini-Batches, ICLR 2018, https://arxiv.org/abs/1803.04386
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from vbdl_kernels import normal, words
from vbdl_kernels.philox import ACTIVATION, SIGN

from vbdl.calling.graphs import FunctionMode
from vbdl.nn.drawn import noise
from vbdl.nn.drawn_uses import LAYERS, DrawnUses, Function, LayerCall, layer_arguments
from vbdl.types import Arguments, Keywords

Estimator = Literal["shared", "local", "flipout"]
ESTIMATORS: tuple[Estimator, ...] = ("shared", "local", "flipout")


@dataclass(frozen=True)
class RowLayer:
    """A weight whose layers draw for every row.

    bias: the name of the layers' bias, if that is drawn too. axis: the axis of the rows in the layers' inputs.
    exact: whether a row's outputs are distributed as with one draw of the weight for each row.
    """

    bias: str | None
    axis: int
    exact: bool


def row_layers(two: DrawnUses, three: DrawnUses, estimator: Estimator) -> dict[str, RowLayer]:
    """The weights whose layers can draw for every row, by what forwards on 2 and on 3 rows do with them.

    A weight must act in layers alone, with a bias that acts with it alone, on inputs with the rows as one axis; for
    local reparameterization once, since each call would draw anew.
    """
    found: dict[str, RowLayer] = {}
    others = two.others | three.others
    biases = [bias for calls in two.layers.values() for bias in {call.bias for call in calls} if bias is not None]
    for name, calls in two.layers.items():
        again = three.layers.get(name, [])
        of_bias = {call.bias for call in (*calls, *again)}
        axes = {_axis(a, b) for a, b in zip(calls, again, strict=False)}
        if name in others or of_bias & others or len(of_bias) != 1 or len(calls) != len(again):
            continue
        (bias,), axis = of_bias, axes.pop()
        if axis is None or axes or (bias is not None and biases.count(bias) > 1):
            continue
        if estimator == "local" and len(calls) != 1:
            continue
        exact = estimator == "flipout" or (calls[0].axes == 2 and calls[0].x.ndim == 2)
        found[name] = RowLayer(bias, axis, exact)
    return found


def _axis(two: LayerCall, three: LayerCall) -> int | None:
    """The axis of the rows in the inputs of a layer for 2 and for 3 rows, or None if it is not clear."""
    if two.x.ndim != three.x.ndim:
        return None
    grown = [axis for axis, (a, b) in enumerate(zip(two.x.shape, three.x.shape, strict=True)) if a != b]
    if len(grown) != 1 or (two.x.shape[grown[0]], three.x.shape[grown[0]]) != (2, 3):
        return None
    features = two.x.ndim - 1 if two.axes == 2 else two.x.ndim - two.axes + 1
    return grown[0] if grown[0] < features else None


# ---- drawing


@dataclass(frozen=True)
class Normal:
    """The std of every weight of a parameter, and the parameter's number in the counters."""

    std: Tensor
    layer: int


@dataclass(frozen=True)
class DrawnLayer:
    """What a layer draws from: its weight and bias (None: the bias is not drawn), and the axis of the rows."""

    weight: Normal
    bias: Normal | None
    axis: int


class RowNoise(FunctionMode):
    """A context in which layers draw for every row, from a key.

    layers: by the id of the mean weight, which is the weight that the layer's function gets.
    """

    def __init__(self, estimator: Estimator, key: Tensor, layers: Mapping[int, DrawnLayer]):
        super().__init__()
        self._draw = {"local": _local, "flipout": _flipout}[estimator]
        self._key, self._layers = key, layers

    def __torch_function__(
        self, func: Function, types: Sequence[type], args: Arguments = (), kwargs: Keywords | None = None
    ) -> object:
        kwargs = kwargs or {}
        if func in LAYERS:
            x, weight, bias, call = layer_arguments(*args, **kwargs)
            if (layer := self._layers.get(id(weight))) is not None:
                run = lambda x, w, b: call(func, x, w, b)
                return self._draw(run, x, weight, bias, layer, self._key.to(x.device))
        return func(*args, **kwargs)


def _local(run: Function, x: Tensor, weight: Tensor, bias: Tensor | None, layer: DrawnLayer, key: Tensor) -> Tensor:
    """The outputs of a layer, each drawn by its own mean and variance."""
    mean = run(x, weight, bias)
    of_bias = None if layer.bias is None else layer.bias.std.square()
    variance = run(x.square(), layer.weight.std.square(), of_bias)
    std = (variance + torch.finfo(variance.dtype).tiny).sqrt()  # so that inputs of zeros have a gradient
    rows = mean.shape[layer.axis]
    first = (rows, *(size for axis, size in enumerate(mean.shape) if axis != layer.axis))
    e = normal(key, layer.weight.layer, ACTIVATION, rows, mean.numel() // max(rows, 1))
    return mean + std * e.view(first).movedim(0, layer.axis).to(std.dtype)


def _flipout(run: Function, x: Tensor, weight: Tensor, bias: Tensor | None, layer: DrawnLayer, key: Tensor) -> Tensor:
    """The outputs of a layer with one deviation of the weights for all rows, whose signs each row draws."""
    mean = run(x, weight, bias)
    deviation = layer.weight.std * noise(key, layer.weight.layer, weight)
    of_bias = None
    if layer.bias is not None and bias is not None:
        of_bias = layer.bias.std * noise(key, layer.bias.layer, bias)
    features = x.ndim - 1 if weight.ndim == 2 else x.ndim - weight.ndim + 1  # the axis of features or channels
    inputs, outputs, rows = x.shape[features], weight.shape[0], x.shape[layer.axis]
    signs = random_signs(key, layer.weight.layer, rows, inputs + outputs).to(x.dtype)

    def placed(s: Tensor) -> Tensor:
        sizes = [1] * x.ndim
        sizes[layer.axis], sizes[features] = rows, s.shape[1]
        return s.reshape(sizes)

    before, after = signs[:, :inputs], signs[:, inputs:]
    return mean + placed(after) * run(x * placed(before), deviation, of_bias)


def random_signs(key: Tensor, layer: int, rows: int, columns: int) -> Tensor:
    """Draw -1 or 1 with equal probabilities, (rows, columns) int64, one for each bit of the counters' words."""
    drawn = words(key, layer, SIGN, rows, -(-columns // 32))
    bits = (drawn.unsqueeze(-1) >> torch.arange(32, device=drawn.device)) & 1
    return 2 * bits.flatten(-2)[:, :columns] - 1
