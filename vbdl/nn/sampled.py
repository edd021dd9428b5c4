"""Networks with an independent normal for every weight, which mean-field inference trains and predicts with.

The user's parameters are the means, under their own names; `log_std` holds the log of the stds. No layer is replaced:
the drawn weights take the place of the parameters for one call, so any module works.
"""

import functools
import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from vbdl.calling.adapters import how_to_unfreeze
from vbdl.calling.checks import check_drawn, drawn_of_all
from vbdl.calling.closures import check_held
from vbdl.calling.stacking import call, without_dots
from vbdl.nn.drawn import drawn, noise, once
from vbdl.nn.embedding import padding_rows
from vbdl.nn.gaussian.diagonal import Independent
from vbdl.nn.gaussian.network import FactoredNetwork
from vbdl.nn.keyed import KeyedNetwork
from vbdl.nn.priors import Normal, Prior, ScaleMixture, kl_normal, kl_scale_mixture
from vbdl.nn.row_estimators import DrawnLayer, Estimator, RowLayer, RowNoise
from vbdl.nn.row_estimators import Normal as Drawn
from vbdl.types import Inputs

LOG_STD_BOUND = 30.0  # exp(2 * 30) is finite in float32


class LogStd(nn.Module):
    """The log of the std of every weight, one tensor per parameter."""

    def __init__(self, parameters: Mapping[str, Tensor], initial_std: float):
        super().__init__()
        self.initial = math.log(initial_std)
        for name, p in parameters.items():
            self.register_parameter(without_dots(name), nn.Parameter(torch.full_like(p, self.initial)))

    def __getitem__(self, name: str) -> Tensor:
        return getattr(self, without_dots(name))

    def reset_parameters(self) -> None:
        """Set every std to the initial one, as part of a new initialization of the network."""
        with torch.no_grad():
            for p in self.parameters():
                p.fill_(self.initial)


class StdFactor(Independent):
    """The factor of a SampledNetwork: independent normals whose stds are exp(log_std), the network's own parameters."""

    def __init__(self, network: "SampledNetwork"):
        super().__init__({name: network.log_std[name] for name in network.chosen}, network.padding)
        self._hidden = (network.log_std,)  # not a submodule, so that its tensors keep their names in artifacts

    def std(self, name: str) -> Tensor:
        """The std of every weight of a parameter, in its shape; computed once for draws together."""
        log_std = self._hidden[0][name]
        of_draws = lambda: self.masked(name, log_std.clamp(-LOG_STD_BOUND, LOG_STD_BOUND).exp())
        return once("std", log_std, of_draws)


class SampledNetwork(FactoredNetwork):
    """A network that draws w = mean + exp(log_std) * noise(seed, layer, draw) for the chosen parameters.

    The padding row of an embedding is not drawn and not part of the KL.
    chosen: the prior of each parameter to draw; the others stay as they are.
    n_data: number of rows in the training set; the KL term of a row is kl_weight * KL / n_data.
    row_estimator: how layers draw in training. row_layers: the weights whose layers draw for every row, which follow
        from running the network.
    """

    kl_weight: Tensor
    row_estimator: Estimator = "shared"
    row_layers: Mapping[str, RowLayer] = {}
    found_by_running = (*FactoredNetwork.found_by_running, "row_layers")

    def __init__(
        self,
        inner: nn.Module,
        chosen: Mapping[str, Prior],
        initial_std: float,
        n_data: int,
    ):
        super().__init__()
        self.inner = inner
        self.n_data = n_data
        self.first_layer = 0  # the layer number in the counters of the first chosen parameter
        parameters = dict(inner.named_parameters())
        check_held(inner, chosen)
        self.chosen = tuple(chosen)
        self.padding = {name: row for name, row in padding_rows(inner).items() if name in chosen}
        self.log_std = LogStd({n: parameters[n].detach() for n in self.chosen}, initial_std)
        self.mixtures = tuple(isinstance(chosen[n], ScaleMixture) for n in self.chosen)
        for index, name in enumerate(self.chosen):
            first = parameters[name]
            constants = torch.tensor(chosen[name].constants(), dtype=torch.float32, device=first.device)
            self.register_buffer(f"prior_{index}", constants)
        device = next(iter(parameters.values())).device
        self.register_buffer("kl_weight", torch.ones((), device=device))
        self.register_buffer("key", torch.zeros(2, dtype=torch.int64, device=device), persistent=False)

    @property
    def factors(self) -> tuple["StdFactor"]:  # type: ignore[override]
        """The one factor of all chosen parameters; it has no tensors of its own."""
        return (StdFactor(self),)

    def adopt(self, other: KeyedNetwork) -> None:
        assert isinstance(other, SampledNetwork)
        self.row_layers = other.row_layers

    def forward(self, *args, **kwargs):
        inputs = kwargs if kwargs else args
        if self.training and self.row_layers and self.recorded is None:
            return self._drawing_rows(inputs)
        return super().forward(*args, **kwargs)

    def _drawing_rows(self, inputs: Inputs) -> Any:  # what the user's network returns
        """Run the network with layers that draw for every row; other parameters are drawn once."""
        (factor,) = self.factors
        numbers = {name: self.first_layer + number for number, name in enumerate(self.chosen)}
        of = lambda name: Drawn(factor.std(name), numbers[name])
        biases = {layer.bias for layer in self.row_layers.values()}
        weights, layers = {}, {}
        for name in self.chosen:
            weights[name] = mean = self.mean(name)
            if (layer := self.row_layers.get(name)) is not None:
                layers[id(mean)] = DrawnLayer(of(name), None if layer.bias is None else of(layer.bias), layer.axis)
            elif name not in biases:
                weights[name] = drawn(mean, factor.std(name), self.key, numbers[name])
        with RowNoise(self.row_estimator, self.key, layers):
            return call(self.inner, weights, inputs)

    def normals(self) -> list[tuple[str, Tensor, Tensor]]:
        """(name, mean, log_std) of each chosen parameter."""
        return [(n, self.mean(n), self.log_std[n].clamp(-LOG_STD_BOUND, LOG_STD_BOUND)) for n in self.chosen]

    def kl(self, key: Tensor | None = None) -> Tensor:
        """KL(q || prior) in nats, summed over every weight: exact, or estimated at a draw for a scale mixture."""
        key = self.key if key is None else key
        total, (factor,) = self.kl_weight.new_zeros(()), self.factors
        for layer, (name, mean, log_std) in enumerate(self.normals()):
            prior = getattr(self, f"prior_{layer}")
            weights = functools.partial(factor.without_padding, name)
            if self.mixtures[layer]:
                weight = mean + log_std.exp() * noise(key, self.first_layer + layer, mean)
                total = total + kl_scale_mixture(weights(weight), weights(mean), weights(log_std), prior)
            else:
                of_layer = functools.partial(kl_normal, weights(mean), weights(log_std), prior)
                total = total + once("kl", self.log_std[name], of_layer)
        return total

    def regularization(self, key: Tensor) -> Tensor:
        """The KL term in the loss of a row, in nats."""
        return self.kl_weight * self.kl(key) / self.n_data


def choose(
    module: nn.Module,
    parameters: tuple[str | type[nn.Module], ...] | None,
    prior: Prior | float | Mapping[str, Prior | float],
) -> dict[str, Prior]:
    """The prior of each parameter to sample, by name.

    parameters: modules by name or type, or names of parameters; a module includes everything inside it. A name may be
        a pattern with *, ? and [...], like "*.lora_A.*". By default all that require a gradient.
    prior: one for all, or by name of a module or parameter, or by pattern.
    Raises ValueError for an entry that matches no trainable parameter, and for one that is complex.
    """
    owners = {name: module.get_submodule(name.rpartition(".")[0]) for name, _ in module.named_parameters()}
    trainable = {n: p for n, p in module.named_parameters() if p.requires_grad}
    names = list(trainable)
    if not names:
        raise ValueError(
            f"the module has no trainable parameter to put a posterior on: call requires_grad_(True) on "
            f"some{how_to_unfreeze(module)}"
        )
    if parameters is not None:
        wanted = [n for n in names if any(_fits(n, owners[n], one) for one in parameters)]
        for one in parameters:
            if not any(_fits(n, owners[n], one) for n in names):
                raise ValueError(f"no trainable parameter belongs to {one!r}; there are {names}")
        names = wanted
        check_drawn({n: trainable[n] for n in names})
    else:
        names = drawn_of_all(trainable)
    if isinstance(prior, Mapping):
        for one in prior:
            if not any(_fits(n, owners[n], one) for n in names):
                raise ValueError(f"the prior of {one!r} matches no sampled parameter; there are {names}")
        return {n: _as_prior(_most_specific(n, prior)) for n in names}
    return {n: _as_prior(prior) for n in names}


def _fits(name: str, owner: nn.Module, one: str | type[nn.Module]) -> bool:
    return _named(name, one) if isinstance(one, str) else isinstance(owner, one)


def _named(name: str, one: str) -> bool:
    """Whether a parameter has this name, is inside the module of this name, or of one that fits it as a pattern."""
    if one == "" or name == one or name.startswith(f"{one}."):
        return True
    return any(c in one for c in "*?[") and (fnmatchcase(name, one) or fnmatchcase(name, f"{one}.*"))


def _most_specific(name: str, priors: Mapping[str, Prior | float]) -> Prior | float:
    fitting = [one for one in priors if _named(name, one)]
    return priors[max(fitting, key=len)] if fitting else Normal(1.0)


def _as_prior(prior: Prior | float) -> Prior:
    return prior if isinstance(prior, Normal | ScaleMixture) else Normal(float(prior))
