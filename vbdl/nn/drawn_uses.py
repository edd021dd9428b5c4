"""A record of what a forward does with drawn parameters: which layers it calls with them, and where else they go."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from vbdl.nn.drawn import READS
from vbdl.types import Arguments, Keywords

Function = Callable[..., Any]

LAYERS: dict[Function, int] = {F.linear: 2, F.conv1d: 3, F.conv2d: 4, F.conv3d: 5}
"""The functions of layers, with the number of axes of their weight."""


@dataclass(frozen=True)
class LayerCall:
    """A call of a layer's function with a drawn weight.

    x: the layer's input. bias: the name of its bias, if that is drawn too. axes: of the weight.
    """

    x: Tensor
    bias: str | None
    axes: int


class DrawnUses(TorchFunctionMode):
    """A context that records what a forward does with drawn parameters.

    weights: the drawn parameters by name. layers: the calls of layers with each weight, by its name. others: the names
    of the parameters that go anywhere else.
    """

    def __init__(self, weights: Mapping[str, Tensor]):
        super().__init__()
        self._names = {id(t): name for name, t in weights.items()}
        self.layers: dict[str, list[LayerCall]] = {}
        self.others: set[str] = set()

    def __torch_function__(
        self, func: Function, types: Sequence[type], args: Arguments = (), kwargs: Keywords | None = None
    ) -> object:
        kwargs = kwargs or {}
        if func in READS:
            return func(*args, **kwargs)
        inside = {self._names[id(value)] for value in tree_leaves((args, kwargs)) if id(value) in self._names}
        if inside and func in LAYERS:
            x, weight, bias, _ = layer_arguments(*args, **kwargs)
            name = self._names.get(id(weight))
            if name is not None and weight.ndim == LAYERS[func] and x.is_floating_point():
                of_bias = self._names.get(id(bias))
                self.layers.setdefault(name, []).append(LayerCall(x.detach(), of_bias, weight.ndim))
                inside -= {name, of_bias} - {self._names.get(id(x))}
        self.others |= inside
        return func(*args, **kwargs)


def layer_arguments(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *rest: Any, **options: Any
) -> tuple[Tensor, Tensor, Tensor | None, Callable[[Function, Tensor, Tensor, Tensor | None], Tensor]]:
    """(input, weight, bias) of a layer, and a function that calls it with others: (function, input, weight, bias)."""
    return input, weight, bias, lambda func, x, w, b: func(x, w, b, *rest, **options)
