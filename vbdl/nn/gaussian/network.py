"""A network whose chosen parameters are drawn from a normal distribution N(mean, C), or that is linear in them."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import jvp
from torch.utils._pytree import tree_flatten, tree_unflatten

from vbdl.calling.closures import check_held
from vbdl.calling.graphs import without_fused_attention
from vbdl.calling.stacking import call
from vbdl.calling.traversing import buffers_of
from vbdl.nn.drawn import drawn
from vbdl.nn.drawn_uses import DrawnUses
from vbdl.nn.functions_tangent import TraceableTangents
from vbdl.nn.gaussian.diagonal import Independent
from vbdl.nn.gaussian.factor import Factor
from vbdl.nn.keyed import KeyedNetwork
from vbdl.nn.local_outputs import DrawnOutputs, Moments
from vbdl.nn.recurrent import WholeLayers
from vbdl.nn.value_reads import ValueReads
from vbdl.types import Inputs, State

# torch counts the levels of forward mode once for all threads: one that ends in a thread takes away another's
_forward_mode = threading.RLock()


class CannotLinearize(NotImplementedError):
    """The network has an operation without a forward-mode derivative."""


class FactoredNetwork(KeyedNetwork):
    """The base of networks whose chosen parameters are drawn by factors: w = mean + deviation.

    A subclass sets `inner`, `key`, `chosen` and `factors`. Factor i uses the layer numbers of the counters after those
    of factor i - 1.

    local: the weights of the layers that draw their outputs in this network as it is, each with its bias if that is
        drawn too; {} if all weights are drawn.
    recorded: what each forward does with the drawn parameters is added to this list, if there is one.
    """

    draws_weights = True
    numbers_places = False
    linearized: bool = False
    local: Mapping[str, str | None] = {}
    recorded: list[DrawnUses] | None = None
    found_by_running = ("local", "recorded")
    first_layer: int = 0  # the layer number of the first factor
    chosen: tuple[str, ...]
    factors: Sequence[Factor]

    def mean(self, name: str) -> Tensor:
        """The mean of a parameter: the parameter of the user's network."""
        owner: Any = self.inner
        *path, leaf = name.split(".")
        for part in path:  # several times faster than `get_submodule`
            owner = owner._modules[part]
        return getattr(owner, leaf)

    def numbered(self) -> Iterator[tuple[int, Factor]]:
        """Yield the first layer number of each factor, and the factor."""
        layer = self.first_layer
        for factor in self.factors:
            yield layer, factor
            layer += factor.layers

    def weights(self) -> State:
        """The parameters of the draw in `key`, by name."""
        return self._of_draw(
            lambda layer, factor: factor.draw({n: self.mean(n) for n in factor.names}, self.key, layer)
        )

    def deviations(self) -> State:
        """What the parameters of the draw in `key` differ from their means, by name."""
        return self._of_draw(lambda layer, factor: factor.deviation(self.key, layer))

    def _of_draw(self, draw: Callable[[int, Factor], State]) -> State:
        """Collect draw(layer, factor) of all factors, or what `kept` has of this draw."""
        if self.kept:
            return {name: self.kept[name] for name in self.chosen}
        values: State = {}
        for layer, factor in self.numbered():
            values |= draw(layer, factor)
        if self.kept is not None:
            self.kept.update(values)
        return values

    def forward(self, *args, **kwargs):
        outputs = self._outputs(kwargs if kwargs else args)
        if self.kept and any(t._version for t in self.kept.values()):  # the forward wrote to what was drawn
            self.kept.clear()
        return outputs

    def _outputs(self, inputs: Inputs) -> Any:  # what the user's network returns
        """Run the network with the draw in `key`."""
        if self.linearized:
            return self._linear(inputs)
        if self.local:
            return self._drawing_outputs(inputs)
        if self.recorded is None:
            return call(self.inner, self.weights(), inputs)
        weights = self.weights()
        with ValueReads() as reads, DrawnUses(weights) as uses:
            outputs = call(self.inner, weights, inputs)
        if reads.followed.read:
            self.reads_values = True
        self.recorded.append(uses)
        return outputs

    @property
    def may_draw_outputs(self) -> bool:
        """Whether layers may draw outputs here: all parameters are independent and enter as they are."""
        return not self.linearized and all(isinstance(factor, Independent) for factor in self.factors)

    @property
    def takes_many_keys(self) -> bool:
        return bool(self.local) and set(self.chosen) == {*self.local, *self.local.values()} - {None}

    def _drawing_outputs(self, inputs: Inputs) -> Any:  # what the user's network returns
        """Run the network with layers that draw their outputs."""
        biases = {bias for bias in self.local.values() if bias is not None}
        weights, moments, kept = {}, {}, self.kept if self.kept is not None else {}
        for first, factor in self.numbered():
            assert isinstance(factor, Independent)
            for number, name in enumerate(factor.names, start=first):
                weights[name] = mean = self.mean(name)
                if name in self.local:
                    bias = self.local[name]
                    of_bias = None if bias is None else self._std(bias).square()
                    moments[id(mean)] = Moments(mean, factor.std(name).square(), number, of_bias)
                elif name not in biases:
                    if name not in kept:
                        kept[name] = drawn(mean, factor.std(name), self.key, number)
                    weights[name] = kept[name]
        with DrawnOutputs(self.key, moments):
            return call(self.inner, weights, inputs)

    def _std(self, name: str) -> Tensor:
        """The std of every weight of a parameter that an independent factor draws."""
        factor = next(factor for factor in self.factors if name in factor.names)
        assert isinstance(factor, Independent)
        return factor.std(name)

    def _linear(self, inputs: Inputs) -> Any:  # what the user's network returns
        """The outputs of the network that is linear in the drawn parameters, in the structure of the network's own."""
        deviations = self.deviations()
        means = {name: self.mean(name) for name in deviations}
        structure: list[Any] = []

        def outputs(weights: State) -> tuple[list[Tensor], list[Tensor]]:
            # copies, because a forward may write to buffers, and a transform of torch.func refuses to
            buffers = {name: b.clone() for name, b in buffers_of(self.inner).items()}
            leaves, spec = tree_flatten(call(self.inner, {**buffers, **weights}, inputs))
            structure[:] = leaves, spec
            tensors = [t for t in leaves if isinstance(t, Tensor)]
            return [t for t in tensors if t.is_floating_point()], [t for t in tensors if not t.is_floating_point()]

        # autocast runs recurrent layers in other dtypes than their states, which torch's own layers see to
        casts = torch.is_autocast_enabled(self.key.device.type)
        with (
            _forward_mode,
            without_fused_attention(),
            TraceableTangents(),
            contextlib.nullcontext() if casts else WholeLayers(),
        ):
            pushed: Any = jvp(outputs, (means,), (deviations,), has_aux=True)
        at_mean, tangents, others = pushed
        linear, rest = iter([f + d for f, d in zip(at_mean, tangents, strict=True)]), iter(others)
        leaves, spec = structure
        filled = [t if not isinstance(t, Tensor) else next(linear if t.is_floating_point() else rest) for t in leaves]
        return tree_unflatten(filled, spec)


class GaussianNetwork(FactoredNetwork):
    """A network that draws w = mean + deviation for the parameters of its factors; the others stay as they are.

    inner: the user's network, whose parameters are the means.
    factors: the factors, each of other parameters.
    linearized: predict with f(x; mean) + J(x) (w - mean), the network linear in the drawn parameters, J its Jacobian at
        the mean; one forward-mode product for each draw. Parameters that enter the output linearly, such as those of a
        last layer, give the same outputs either way. Khan et al. 2019; Immer, Korzepa and Bauer, Improving Predictions
        of Bayesian Neural Nets via Local Linearization, AISTATS 2021, https://arxiv.org/abs/2008.08400

    Raises ValueError for a name that is no parameter of the network, one of another shape, or one in two factors.
    """

    def __init__(self, inner: nn.Module, factors: Sequence[Factor], linearized: bool = False):
        super().__init__()
        self.inner = inner
        _check(inner, factors)
        self.factors = cast(Sequence[Factor], nn.ModuleList(factors))
        self.chosen = tuple(name for factor in factors for name in factor.names)
        check_held(inner, self.chosen)
        self.linearized = linearized
        device = next(inner.parameters()).device
        self.register_buffer("key", torch.zeros(2, dtype=torch.int64, device=device), persistent=False)

    def log_det(self) -> Tensor:
        """The log of the determinant of C, (), in nats."""
        return torch.stack([factor.log_det() for factor in self.factors]).sum()

    def variances(self) -> State:
        """The variance of each drawn parameter, by name, in its shape."""
        return {name: v for factor in self.factors for name, v in factor.variances().items()}


def _check(inner: nn.Module, factors: Sequence[Factor]) -> None:
    """Raise ValueError for factors that do not fit the parameters of a network."""
    shapes = {name: p.shape for name, p in inner.named_parameters()}
    seen: set[str] = set()
    for factor in factors:
        for name in factor.names:
            if name not in shapes:
                raise ValueError(
                    f"a factor draws {name!r}, which is no parameter of the network; there are {list(shapes)}"
                )
            if factor.shapes[name] != shapes[name]:
                raise ValueError(
                    f"a factor draws {name!r} with shape {tuple(factor.shapes[name])}, but the parameter has shape "
                    f"{tuple(shapes[name])}: make the factor from the network's parameters"
                )
            if name in seen:
                raise ValueError(f"two factors draw {name!r}: leave it out of one of them")
            seen.add(name)
    if not seen:
        raise ValueError("the network has no factor, so nothing would be drawn: give at least one")
