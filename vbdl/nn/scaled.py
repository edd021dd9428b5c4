"""Networks whose linear and convolutional layers have a factor on every input and output: W_m = W * s_m r_m^T.

A member that differs from others only in these factors shares the weights W. Under `vmap` they are not multiplied out
in a layer's own product, y = (x * r) W^T * s + b, so that x of all members is one batch for one product with W. A
member that runs alone multiplies what has fewer numbers, the weights or the inputs and outputs.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._pytree import tree_any, tree_map_only

from vbdl.calling.checks import check_chosen
from vbdl.calling.graphs import FunctionMode
from vbdl.calling.stacking import without_dots
from vbdl.calling.traversing import state_of
from vbdl.nn.drawn import READS
from vbdl.types import Arguments, Keywords, State

LAYERS = (nn.Linear, _ConvNd, nn.MultiheadAttention)


@dataclass(frozen=True)
class Layer:
    """A weight that can be scaled: that of a linear or convolutional layer, or of a projection in attention.

    name: of the weight in the network. bias: of the bias beside it, or None. path: of the module that holds it.
    inputs, outputs: numbers of features or channels. groups: blocks of channels that are not connected. transposed:
    whether the inputs are the weight's first axis.
    """

    name: str
    bias: str | None
    path: str
    inputs: int
    outputs: int
    groups: int = 1
    transposed: bool = False

    def scaled(self, weight: Tensor, r: Tensor | None, s: Tensor | None) -> Tensor:
        """The weight with its factors multiplied out, in the shape of the weight."""
        first, second = (self.inputs, self.outputs) if self.transposed else (self.outputs, self.inputs)
        blocks = weight.reshape(self.groups, first // self.groups, second // self.groups, -1)
        for factor, of_first in ((r, self.transposed), (s, not self.transposed)):
            if factor is not None:
                shape = (self.groups, -1, 1, 1) if of_first else (self.groups, 1, -1, 1)
                blocks = blocks * factor.to(weight.dtype).view(shape)
        return blocks.view(weight.shape)


def scalable(network: nn.Module) -> dict[str, Layer]:
    """The weights of a network that can be scaled, by name, in the order of its modules; a tied one appears once.

    Those of parametrized layers (weight_norm, spectral_norm) cannot: their weight is computed anew in every forward.
    """
    first = {id(t): name for name, t in state_of(network).items()}
    layers: dict[str, Layer] = {}
    for path, m in network.named_modules():
        if not isinstance(m, LAYERS) or is_parametrized(m):
            continue
        for leaf, bias, inputs, outputs in _weights(m):
            if not isinstance(weight := m._parameters.get(leaf), nn.Parameter):
                continue
            own = None if bias is None else m._parameters.get(bias)
            name, bias_name = first[id(weight)], None if own is None else first[id(own)]
            groups = m.groups if isinstance(m, _ConvNd) else 1
            layers.setdefault(
                name, Layer(name, bias_name, path, inputs, outputs, groups, isinstance(m, _ConvTransposeNd))
            )
    return layers


def _weights(m: nn.Module) -> Iterator[tuple[str, str | None, int, int]]:
    """(weight, bias, inputs, outputs) of each weight that a layer holds itself."""
    if isinstance(m, nn.MultiheadAttention):  # its output projection is a linear layer of its own
        width = m.embed_dim
        yield "in_proj_weight", "in_proj_bias", width, 3 * width
        for leaf, inputs in (("q_proj_weight", width), ("k_proj_weight", m.kdim), ("v_proj_weight", m.vdim)):
            yield leaf, "in_proj_bias", inputs, width
    elif isinstance(m, _ConvNd):
        yield "weight", "bias", m.in_channels, m.out_channels
    elif isinstance(m, nn.Linear):
        yield "weight", "bias", m.in_features, m.out_features


def choose_layers(network: nn.Module, chosen: Sequence[str | type[nn.Module]] | None) -> dict[str, Layer]:
    """The weights to scale, by name: of the modules of these names or types and of all inside them.

    None chooses all that are not frozen. Raises ValueError for a name or type without such a layer.
    """
    check_chosen("layers", chosen)
    layers = scalable(network)
    if chosen is None:
        parameters = dict(network.named_parameters())
        trained = {name: layer for name, layer in layers.items() if parameters[name].requires_grad}
        if not trained:
            raise ValueError(
                f"the network has no linear or convolutional layer that is trained, so its members cannot differ"
                f"{_parametrized(network)}: unfreeze some, or name the layers with layers="
            )
        return trained
    modules = dict(network.named_modules())
    names: set[str] = set()
    for one in chosen:
        if isinstance(one, str) and one not in modules:
            raise ValueError(f"there is no module {one!r}; there are {sorted(modules.keys() - {''})}")
        roots = [one] if isinstance(one, str) else [path for path, m in modules.items() if isinstance(m, one)]
        inside = {n for n, layer in layers.items() if any(_within(layer.path, root) for root in roots)}
        if not inside:
            what = repr(one) if isinstance(one, str) else one.__name__
            raise ValueError(f"layers={what} names no linear or convolutional layer{_parametrized(network)}")
        names |= inside
    return {name: layer for name, layer in layers.items() if name in names}


def _within(path: str, root: str) -> bool:
    return root == "" or path == root or path.startswith(f"{root}.")


def _parametrized(network: nn.Module) -> str:
    """A hint at the first layer whose weight is parametrized, or ""."""
    for path, m in network.named_modules():
        if isinstance(m, LAYERS) and is_parametrized(m):
            return (
                f" (module {path!r} has a parametrized weight, like weight_norm: call "
                f"torch.nn.utils.parametrize.remove_parametrizations on it first)"
            )
    return ""


class ScaledNetwork(nn.Module):
    """A network with factors on the inputs and outputs of layers: y = (x * r) W^T * s + b.

    Wherever else a weight is used (tied to an embedding, in attention, transposed), it is W * s r^T, multiplied out.

    inner: the user's network. layers: the weights that are scaled, by name.
    r, s: the factors of inputs and outputs by the weight's name, (inputs,) and (outputs,); a layer may lack either.
    trained: whether the factors are parameters, or else buffers.
    """

    def __init__(self, inner: nn.Module, layers: Mapping[str, Layer], r: State, s: State, trained: bool):
        super().__init__()
        self.inner, self.layers = inner, dict(layers)
        self.r, self.s = nn.Module(), nn.Module()
        for holder, factors in ((self.r, r), (self.s, s)):
            for name, t in factors.items():
                if trained:
                    holder.register_parameter(without_dots(name), nn.Parameter(t))
                else:
                    holder.register_buffer(without_dots(name), t)

    def forward(self, *args, **kwargs):
        with _Scaling(self._weights()):
            return self.inner(*args, **kwargs)

    def _weights(self) -> "dict[int, _Weight]":
        """The weights of this call, by the id of the tensor, which `functional_call` may have replaced."""
        weights = {}
        for name, layer in self.layers.items():
            owner, _, leaf = name.rpartition(".")
            tensor = getattr(self.inner.get_submodule(owner), leaf)
            own = without_dots(name)
            weights[id(tensor)] = _Weight(layer, tensor, getattr(self.r, own, None), getattr(self.s, own, None))
        return weights


@torch.no_grad()
def multiplied_out(layers: Mapping[str, Layer], state: State) -> State:
    """The state of the user's network whose weights are those of a scaled network with this state, by name."""
    inner = {name.removeprefix("inner."): t.detach() for name, t in state.items() if name.startswith("inner.")}
    for name, layer in layers.items():
        own = without_dots(name)
        inner[name] = layer.scaled(inner[name], state.get(f"r.{own}"), state.get(f"s.{own}"))
    return {name: t.clone() for name, t in inner.items()}


class _Weight:
    """A weight of a running forward, with its factors."""

    def __init__(self, layer: Layer, weight: Tensor, r: Tensor | None, s: Tensor | None):
        self.layer, self.weight, self.r, self.s = layer, weight, r, s
        self._scaled: Tensor | None = None

    def scaled(self) -> Tensor:
        """The weight with its factors multiplied out, once a forward."""
        if self._scaled is None:
            self._scaled = self.layer.scaled(self.weight, self.r, self.s)
        return self._scaled

    def apply(self, func: Callable[..., Tensor], x: Tensor, bias: Tensor | None, rest: Arguments, named: Keywords):
        """The output of the layer: func(x * r, weight) * s + bias."""
        if self._is_cheaper_scaled(x):
            return func(x, self.scaled(), bias, *rest, **named)
        after = [1] * (self.weight.ndim - 2)  # the axes after that of features or channels
        if self.r is not None:
            x = x * self.r.to(x.dtype).view(-1, *after)
        if self.s is None:
            return func(x, self.weight, bias, *rest, **named)
        y = func(x, self.weight, None, *rest, **named)
        y = y * self.s.to(y.dtype).view(-1, *after)
        return y if bias is None else y + bias.to(y.dtype).view(-1, *after)

    def _is_cheaper_scaled(self, x: Tensor) -> bool:
        """Whether the weight has fewer numbers to multiply than the layer's inputs x and its outputs."""
        factors = [f for f in (self.r, self.s) if f is not None]
        if any(map(is_functorch_wrapped_tensor, factors)):  # mapped: all members share one product
            return False
        positions = x.numel() // self.layer.inputs  # rows, times places of an image
        of_x = self.layer.inputs * (self.r is not None) + self.layer.outputs * (self.s is not None)
        return len(factors) * self.weight.numel() < positions * of_x

    def embed(self, index: Tensor, rest: Arguments, named: Keywords) -> Tensor:
        """The rows of an embedding tied to a linear layer: row i of W * s r^T."""
        rows = F.embedding(index, self.weight, *rest, **named)
        if self.s is not None:
            rows = rows * F.embedding(index, self.s.to(rows.dtype).unsqueeze(1))
        return rows if self.r is None else rows * self.r.to(rows.dtype)


_PRODUCTS = {F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d}


class _Scaling(FunctionMode):
    """A context in which functions get these weights with their factors."""

    def __init__(self, weights: Mapping[int, _Weight]):
        super().__init__()
        self._weights = weights

    def _is_weight(self, value: object) -> bool:
        return isinstance(value, Tensor) and id(value) in self._weights

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Arguments = (),
        kwargs: Keywords | None = None,
    ) -> object:
        kwargs = dict(kwargs or {})
        if func in READS or not tree_any(self._is_weight, (args, kwargs)):
            return func(*args, **kwargs)
        if func in _PRODUCTS and (output := self._product(func, *args, **kwargs)) is not None:
            return output
        if func is F.embedding and (output := self._embedding(*args, **kwargs)) is not None:
            return output
        replace = lambda t: self._weights[id(t)].scaled() if id(t) in self._weights else t
        return func(*tree_map_only(Tensor, replace, args), **tree_map_only(Tensor, replace, kwargs))

    def _product(
        self, func: Callable[..., object], input: Tensor, weight: Tensor, bias: Tensor | None = None, *rest, **named
    ) -> object:
        if not self._is_weight(weight) or self._is_weight(input) or self._is_weight(bias):
            return None
        return self._weights[id(weight)].apply(func, input, bias, rest, named)  # type: ignore[arg-type]

    def _embedding(self, input: Tensor, weight: Tensor, *rest, **named) -> object:
        return self._weights[id(weight)].embed(input, rest, named) if self._is_weight(weight) else None
