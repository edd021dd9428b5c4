"""Functions of networks in a forward-mode product for which torch's own rules cannot be traced or mapped."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from vbdl.calling.autograd import holds_tangent, innermost_is_forward_mode
from vbdl.calling.graphs import FunctionMode

# the place of the scale among the arguments of a normalization, before that of the shift
_PLACES = {F.batch_norm: 3, F.instance_norm: 3, F.group_norm: 2, F.layer_norm: 2}
_NAMES = ("weight", "bias")


class TraceableTangents(FunctionMode):
    """A torch function mode in which functions with a tangent are computed by others, whose tangents can be traced.

    A normalization with a frozen scale or shift is scaled and shifted by operations of its own: torch's rule makes
    tangents of zeros for them, which a trace takes for tensors of another device. The tangents of Mish and of gated
    linear units have no batching rule. Weight normalization has no tangent.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _PLACES:
            return _normalized(func, args, kwargs)
        if func in _ACTIVATIONS and holds_tangent(args[0] if args else kwargs["input"]):
            return _ACTIVATIONS[func](*args, **kwargs)
        if func is torch._weight_norm and any(map(holds_tangent, (*args, *kwargs.values()))):
            return _weight_norm(*args, **kwargs)
        return func(*args, **kwargs)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """g * v / |v|, with a norm for each place along `dim`, or one for all if it is -1."""
    others = [axis for axis in range(v.ndim) if axis != dim]
    return v * (g / v.square().sum(others, keepdim=True).sqrt())


def _mish(input: Tensor, inplace: bool = False) -> Tensor:
    """`F.mish`, whose tangent is one product, as the propagation of moments needs it."""
    if not innermost_is_forward_mode():  # the network's own transform
        return input * torch.tanh(F.softplus(input))
    x, tangent = forward_ad.unpack_dual(input)
    assert tangent is not None  # it was asked for
    inside = torch.tanh(F.softplus(x))
    return forward_ad.make_dual(x * inside, tangent * (inside + x * (1 - inside * inside) * torch.sigmoid(x)))


def _glu(input: Tensor, dim: int = -1) -> Tensor:
    value, gate = input.chunk(2, dim)
    return value * torch.sigmoid(gate)


_ACTIVATIONS = {F.mish: _mish, F.glu: _glu}


def _normalized(func: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """A normalization of these arguments, scaled and shifted apart if one of both has no tangent, and a value has."""
    place = _PLACES[func]
    weight, bias = (args[place + i] if len(args) > place + i else kwargs.get(n) for i, n in enumerate(_NAMES))
    moves = [holds_tangent(t) for t in (weight, bias) if t is not None]
    if all(moves) or not (any(moves) or holds_tangent(args[0] if args else kwargs["input"])):
        return func(*args, **kwargs)
    without = [None if place <= i < place + 2 else a for i, a in enumerate(args)]
    normal = func(*without, **{n: a for n, a in kwargs.items() if n not in _NAMES})
    of = lambda t: t if func is F.layer_norm else t.view(-1, *[1] * (normal.ndim - 2))
    scaled = normal if weight is None else normal * of(weight)
    return scaled if bias is None else scaled + of(bias)
