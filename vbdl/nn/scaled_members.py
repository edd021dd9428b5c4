"""Posteriors whose members share the weights of a network and differ in factors on the inputs and outputs of layers."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vbdl.calling.copies import blueprint
from vbdl.calling.stacking import without_dots
from vbdl.calling.traversing import state_of
from vbdl.nn.frozen import frozen_names
from vbdl.nn.initialization import fresh, reset_parameters
from vbdl.nn.members import StackedPosterior
from vbdl.nn.normalization import NORMALIZATION_LAYERS
from vbdl.nn.objective import take_network
from vbdl.nn.scaled import Layer, ScaledNetwork, multiplied_out
from vbdl.types import Output, State, is_posterior

_WITH_SCALES = (*NORMALIZATION_LAYERS, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


class ScaledPosterior(StackedPosterior):
    """The base of methods whose members share weights; a subclass calls `_begin`, then `_scale`."""

    def _begin(self, module: nn.Module, n_members: int, seed: int, output: Output) -> nn.Module:
        """Check the arguments and set the attributes that every method has; returns the network."""
        name = type(self).__name__
        network = take_network(self, module, output)
        if is_posterior(module):
            raise TypeError(f"{name} takes a network, got the posterior {type(module).__name__}: pass its network")
        if n_members < 1:
            raise ValueError(f"n_members must be at least 1, got {n_members}")
        self.n_members = self.n_draws = n_members
        self.seed = seed
        return network

    def _scale(
        self,
        network: nn.Module,
        layers: Mapping[str, Layer],
        r: State,
        s: State,
        own: Mapping[str, Tensor | None],
        trained: bool,
    ) -> None:
        """Hold the network's tensors once, and those in which members differ stacked.

        r, s: (members, inputs) and (members, outputs) by the weight's name. own: other tensors that differ, by their
        names in the network, (members, ...) each; None: copies of the network's.
        """
        structure = ScaledNetwork(
            network, layers, {n: t[0].clone() for n, t in r.items()}, {n: t[0].clone() for n, t in s.items()}, trained
        )
        factors = {f"{kind}.{without_dots(n)}": t for kind, of in (("r", r), ("s", s)) for n, t in of.items()}
        stacked, shared = {}, {}
        for name, t in state_of(structure).items():
            inner = name.removeprefix("inner.")
            if name in factors:
                stacked[name] = factors[name]
            elif inner in own:
                given = own[inner]
                stacked[name] = t.detach().expand(self.n_members, *t.shape).clone() if given is None else given
            else:
                shared[name] = t
        gradients = {name for name, p in structure.named_parameters() if p.requires_grad}
        self._hold(blueprint(structure), stacked, shared, gradients)

    @property
    def scaled(self) -> Mapping[str, Layer]:
        """The weights that have factors, by their names in the network."""
        return self._structure[0].layers

    @property
    def user_network(self) -> nn.Module:
        return self._structure[0].inner

    @property
    def undecayed(self) -> frozenset[str]:
        """The factors, which decay to 0 would switch off."""
        names = (n for n in self._parameter_names if not n.startswith("inner."))
        return frozenset(f"stacked_parameters.{without_dots(n)}" for n in names)

    def member(self, index: int) -> State:
        """A copy of one member's state dict, its factors multiplied out, to load into a plain network."""
        if not 0 <= index < self.n_members:
            raise IndexError(f"there is no member {index} of {self.n_members}: count from 0")
        entries: dict[str, Any] = {name: t[index] for name, t in self.stacked().items()}
        return multiplied_out(self.scaled, {**self.shared(), **entries})


def normalization_names(network: nn.Module, scales: bool) -> list[str]:
    """The names of the buffers of normalization layers that are not frozen, and of their parameters if `scales`.

    Their running statistics are those of a member's own activations.
    """
    first = {id(t): name for name, t in state_of(network).items()}
    frozen = frozen_names(network)
    names: dict[str, None] = {}
    for m in network.modules():
        if isinstance(m, NORMALIZATION_LAYERS):
            names.update(dict.fromkeys(first[id(b)] for b in m.buffers(recurse=False)))
        if scales and isinstance(m, _WITH_SCALES):
            names.update(dict.fromkeys(first[id(p)] for p in m.parameters(recurse=False)))
    return [name for name in names if name not in frozen]


def names_inside(network: nn.Module, chosen: Iterable[str]) -> dict[str, list[str]]:
    """The names of all parameters and buffers of each of these modules, or of the parameter or buffer itself.

    Raises ValueError for a name that the network does not have.
    """
    first = {id(t): name for name, t in state_of(network).items()}
    modules = dict(network.named_modules())
    inside: dict[str, list[str]] = {}
    for name in chosen:
        if name in modules:
            inside[name] = [first[id(t)] for t in state_of(modules[name]).values()]
        elif name in first.values():
            inside[name] = [name]
        else:
            raise ValueError(
                f"own={name!r} is no module, parameter or buffer; there are the modules {sorted(modules.keys() - {''})}"
            )
    return inside


def fresh_copies(network: nn.Module, path: str, n_members: int, seed: int) -> State:
    """New initializations of a layer for all members, (members, ...) each, by their names in the network.

    Member m's is that of torch's generator at seed + m; the generator is left unchanged.
    """
    layer = network.get_submodule(path)
    copies = [state_of(fresh(layer, seed + m, reset_parameters)) for m in range(n_members)]
    first = {id(t): name for name, t in state_of(network).items()}
    own = {name: first[id(t)] for name, t in state_of(layer).items()}
    return {own[name]: torch.stack([c[name].detach() for c in copies]) for name in own}
