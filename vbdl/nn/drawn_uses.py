"""A record of what a forward does with drawn parameters: which layers it calls with them, and where else they go."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from vbdl.calling.graphs import FunctionMode
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


class DrawnUses(FunctionMode):
    """A context that records what a forward does with drawn parameters.

    weights: the drawn parameters by name. layers: the calls of layers with each weight, by its name. others: the names
    of the parameters that go anywhere else. unused: those of the parameters that nothing uses. by_values: whether the
    forward looked at values, or chose entries by them, so that other rows may use other parameters.
    """

    def __init__(self, weights: Mapping[str, Tensor]):
        super().__init__()
        self._names = {id(t): name for name, t in weights.items()}
        self.layers: dict[str, list[LayerCall]] = {}
        self.others: set[str] = set()
        self.unused = set(weights)
        self.by_values = False

    def __torch_function__(
        self, func: Function, types: Sequence[type], args: Arguments = (), kwargs: Keywords | None = None
    ) -> object:
        kwargs = kwargs or {}
        if func in READS:
            return func(*args, **kwargs)
        self.by_values |= getattr(func, "__name__", "") in _BY_VALUES or _chooses_by_flags(func, args)
        inside = {self._names[id(value)] for value in tree_leaves((args, kwargs)) if id(value) in self._names}
        self.unused -= inside
        if inside and func in LAYERS:
            x, weight, bias, _ = layer_arguments(*args, **kwargs)
            name = self._names.get(id(weight))
            if name is not None and weight.ndim == LAYERS[func] and x.is_floating_point():
                of_bias = self._names.get(id(bias))
                self.layers.setdefault(name, []).append(LayerCall(x.detach(), of_bias, weight.ndim))
                inside -= {name, of_bias} - {self._names.get(id(x))}
        self.others |= inside
        return func(*args, **kwargs)


_BY_VALUES = frozenset(
    """__bool__ __int__ __float__ __complex__ __index__ __contains__ __array__ item tolist numpy nonzero argwhere
    masked_select unique unique_consecutive equal allclose is_nonzero repeat_interleave""".split()
)


def _chooses_by_flags(func: Function, args: Arguments) -> bool:
    """Whether a function indexes a tensor by flags, or asks where they are."""
    if func in (torch.where, Tensor.where) and len(args) < 2:
        return True
    if func is not Tensor.__getitem__ or len(args) < 2:
        return False
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    return any(isinstance(i, Tensor) and i.dtype == torch.bool for i in index)


def layer_arguments(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *rest: Any, **options: Any
) -> tuple[Tensor, Tensor, Tensor | None, Callable[[Function, Tensor, Tensor, Tensor | None], Tensor]]:
    """(input, weight, bias) of a layer, and a function that calls it with others: (function, input, weight, bias)."""
    return input, weight, bias, lambda func, x, w, b: func(x, w, b, *rest, **options)
