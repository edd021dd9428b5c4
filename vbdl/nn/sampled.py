"""Networks with an independent normal for every weight, which mean-field inference trains and predicts with.

The user's parameters are the means, under their own names; `log_std` holds the log of the stds. No layer is replaced:
the drawn weights take the place of the parameters for one call, so any module works.
"""

import functools
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vbdl.calling.stacking import call
from vbdl.nn.drawn import drawn, noise, once
from vbdl.nn.embedding import padding_rows
from vbdl.nn.frozen import hold_frozen
from vbdl.nn.keyed import KeyedNetwork
from vbdl.nn.priors import Normal, Prior, ScaleMixture, kl_normal, kl_scale_mixture
from vbdl.types import State

LOG_STD_BOUND = 30.0  # exp(2 * 30) is finite in float32


class LogStd(nn.Module):
    """The log of the std of every weight, one tensor per parameter."""

    def __init__(self, parameters: Mapping[str, Tensor], initial_std: float):
        super().__init__()
        self.initial = math.log(initial_std)
        for name, p in parameters.items():
            self.register_parameter(_key(name), nn.Parameter(torch.full_like(p, self.initial)))

    def __getitem__(self, name: str) -> Tensor:
        return getattr(self, _key(name))

    def reset_parameters(self) -> None:
        """Set every std to the initial one, as part of a new initialization of the network."""
        with torch.no_grad():
            for p in self.parameters():
                p.fill_(self.initial)


class SampledNetwork(KeyedNetwork):
    """A network that draws w = mean + exp(log_std) * noise(seed, layer, draw) for the chosen parameters.

    The padding row of an embedding is not drawn and not part of the KL.
    chosen: the prior of each parameter to draw; the others stay as they are.
    n_data: number of rows in the training set; the KL term of a row is kl_weight * KL / n_data.
    """

    kl_weight: Tensor

    draws_weights = True

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

    def train(self, mode: bool = True) -> "SampledNetwork":
        super().train(mode)
        if mode:
            hold_frozen(self.inner)
        return self

    def _mean(self, name: str) -> Tensor:
        owner, _, leaf = name.rpartition(".")
        return getattr(self.inner.get_submodule(owner), leaf)

    def normals(self) -> list[tuple[str, Tensor, Tensor]]:
        """(name, mean, log_std) of each chosen parameter."""
        return [(n, self._mean(n), self.log_std[n].clamp(-LOG_STD_BOUND, LOG_STD_BOUND)) for n in self.chosen]

    def weights(self) -> State:
        """The weights of the draw in `key`."""
        if self.kept:
            return {name: self.kept[name] for name in self.chosen}
        weights = {}
        for layer, (name, mean, log_std) in enumerate(self.normals(), start=self.first_layer):
            std = once("std", self.log_std[name], functools.partial(self._std, name, log_std))
            weights[name] = drawn(mean, std, self.key, layer)
        if self.kept is not None:
            self.kept.update(weights)
        return weights

    def _std(self, name: str, log_std: Tensor) -> Tensor:
        """The std of every weight of a parameter, 0 in a padding row."""
        if name not in self.padding:
            return log_std.exp()
        is_drawn = torch.arange(log_std.shape[0], device=log_std.device) != self.padding[name]
        return log_std.exp() * is_drawn.to(log_std.dtype).unsqueeze(-1)

    def _without_padding(self, name: str, t: Tensor) -> Tensor:
        """A tensor of the shape of a parameter without its padding row."""
        row = self.padding.get(name)
        return t if row is None else torch.cat([t[:row], t[row + 1 :]])

    def forward(self, *args, **kwargs):
        return call(self.inner, self.weights(), kwargs if kwargs else args)

    def kl(self, key: Tensor | None = None) -> Tensor:
        """KL(q || prior) in nats, summed over every weight: exact, or estimated at a draw for a scale mixture."""
        key = self.key if key is None else key
        total = self.kl_weight.new_zeros(())
        for layer, (name, mean, log_std) in enumerate(self.normals()):
            prior = getattr(self, f"prior_{layer}")
            weights = functools.partial(self._without_padding, name)
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


def _key(name: str) -> str:
    return name.replace(".", "/")  # torch refuses dots in registered names


def choose(
    module: nn.Module,
    parameters: tuple[str | type[nn.Module], ...] | None,
    prior: Prior | float | Mapping[str, Prior | float],
) -> dict[str, Prior]:
    """The prior of each parameter to sample, by name.

    parameters: modules by name or type, or names of parameters; a module includes everything inside it. By default all
        floating-point parameters that require a gradient.
    prior: one for all, or by name of a module or parameter.
    Raises ValueError for an entry that matches no trainable parameter.
    """
    owners = {name: module.get_submodule(name.rpartition(".")[0]) for name, _ in module.named_parameters()}
    names = [n for n, p in module.named_parameters() if p.requires_grad and p.is_floating_point()]
    if parameters is not None:
        wanted = [n for n in names if any(_fits(n, owners[n], one) for one in parameters)]
        for one in parameters:
            if not any(_fits(n, owners[n], one) for n in names):
                raise ValueError(f"no trainable parameter belongs to {one!r}; there are {names}")
        names = wanted
    if not names:
        raise ValueError("the module has no trainable floating-point parameter to put a posterior on")
    if isinstance(prior, Mapping):
        for one in prior:
            if not any(_fits(n, owners[n], one) for n in names):
                raise ValueError(f"the prior of {one!r} matches no sampled parameter; there are {names}")
        return {n: _as_prior(_most_specific(n, prior)) for n in names}
    return {n: _as_prior(prior) for n in names}


def _fits(name: str, owner: nn.Module, one: str | type[nn.Module]) -> bool:
    if isinstance(one, str):
        return one == "" or name == one or name.startswith(f"{one}.")
    return isinstance(owner, one)


def _most_specific(name: str, priors: Mapping[str, Prior | float]) -> Prior | float:
    fitting = [one for one in priors if one == "" or name == one or name.startswith(f"{one}.")]
    return priors[max(fitting, key=len)] if fitting else Normal(1.0)


def _as_prior(prior: Prior | float) -> Prior:
    return prior if isinstance(prior, Normal | ScaleMixture) else Normal(float(prior))
