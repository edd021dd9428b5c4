"""A network that collects the moments of its weights in training, and draws from the normal distribution they give.

The moments are buffers of the network, so that those of an ensemble's members are stacked and saved like the weights.
"""

import math

import torch
from torch import Tensor, nn

from vbdl.calling.adapters import how_to_unfreeze
from vbdl.calling.checks import drawn_of_all
from vbdl.calling.stacking import call
from vbdl.nn.batch_statistics import measure_statistics, statistics_names
from vbdl.nn.embedding import padding_rows
from vbdl.nn.gaussian.low_rank import LowRank
from vbdl.nn.gaussian.network import GaussianNetwork
from vbdl.nn.keyed import KeyedNetwork
from vbdl.types import State, TrainingRows


class CollectedNetwork(GaussianNetwork):
    """A network whose trainable parameters are drawn from N(mean, C), C of low rank plus diagonal, once collected.

    In training it is the user's network, whose parameters move. `collect` adds them to the moments, and `finish` makes
    the mean the parameters of the user's network. With batch normalization each of `n_draws` draws has running
    statistics of its own, which `measure` computes.

    Buffers: `mean_<i>` and `squares_<i>`, mean and sum of squared deviations from it of parameter i of `chosen`;
    `collected`, how many weights these are of; `finished`, how many the distribution is of, 0 while it is collected;
    `scale`, by which `finish` multiplied the deviations; `statistics_<i>`, (n_draws, channels).
    """

    collected: Tensor
    finished: Tensor
    scale: Tensor

    def __init__(self, inner: nn.Module, rank: int, n_draws: int):
        parameters = {n: p for n, p in inner.named_parameters() if p.requires_grad}
        if not parameters:
            unfreeze = f"unfreeze some{how_to_unfreeze(inner)}"
            raise ValueError(f"the network has no trainable parameter, so nothing can be collected: {unfreeze}")
        parameters = {name: parameters[name] for name in drawn_of_all(parameters)}
        kinds: dict[tuple[torch.dtype, torch.device], dict[str, Tensor]] = {}  # a factor has one dtype and device
        for name, p in parameters.items():
            kinds.setdefault((p.dtype, p.device), {})[name] = p
        padding = padding_rows(inner)
        super().__init__(inner, [LowRank(group, rank, padding) for group in kinds.values()])
        self.rank, self.being_trained = rank, False
        for index, name in enumerate(self.chosen):
            self.register_buffer(f"mean_{index}", torch.zeros_like(parameters[name]).detach())
            self.register_buffer(f"squares_{index}", torch.zeros_like(parameters[name]).detach())
        device = self.key.device
        self.register_buffer("collected", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("finished", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("scale", torch.ones((), dtype=torch.float64, device=device))
        self.statistics = statistics_names(inner)
        self._measuring = False
        for index, name in enumerate(self.statistics):
            like = inner.get_buffer(name)
            self.register_buffer(f"statistics_{index}", like.detach().expand(n_draws, *like.shape).clone())

    def adopt(self, other: KeyedNetwork) -> None:
        assert isinstance(other, CollectedNetwork)
        self.being_trained = other.being_trained

    def forward(self, *args, **kwargs):
        inputs = kwargs if kwargs else args
        if self.training or self.being_trained:
            return call(self.inner, {}, inputs)
        return call(self.inner, {**self.weights(), **self._statistics_of_draw()}, inputs)

    def _statistics_of_draw(self) -> State:
        """The running statistics of the draw in `key`, by name."""
        if self._measuring:
            return {}
        number = self.key[1].reshape(1)
        stacks = {name: self.get_buffer(f"statistics_{index}") for index, name in enumerate(self.statistics)}
        return {name: t.index_select(0, number.to(t.device)).squeeze(0) for name, t in stacks.items()}

    # -- collecting

    def _parts(self) -> list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
        """(weight, mean, squares, std, deviations) of each parameter that is collected."""
        factors: dict[str, LowRank] = {n: f for f in self.factors for n in f.names if isinstance(f, LowRank)}
        parts = []
        for index, name in enumerate(self.chosen):
            mean, squares = self.get_buffer(f"mean_{index}"), self.get_buffer(f"squares_{index}")
            parts.append((self.mean(name), mean, squares, factors[name].std(name), factors[name].deviations(name)))
        return parts

    @torch.no_grad()
    def begin(self) -> None:
        """Go on collecting: the parameters are about to move away from the mean."""
        if int(self.finished):
            for _, _, _, _, deviations in self._parts():
                deviations /= self.scale.to(deviations.dtype)
            self.scale.fill_(1.0)
            self.finished.zero_()

    @torch.no_grad()
    def collect(self) -> None:
        """Add the weights to the moments (Welford's formulas) and keep their deviation from the mean so far."""
        place, count = int(self.collected) % self.rank, int(self.collected) + 1
        for weight, mean, squares, _, deviations in self._parts():
            before = weight - mean
            mean += before / count
            deviations[place] = weight - mean
            squares += before * deviations[place]
        self.collected.fill_(count)

    @torch.no_grad()
    def finish(self) -> None:
        """Make the mean the network's parameters, and the moments its covariance."""
        count = int(self.collected)
        used = min(count, self.rank)
        # the factor divides by rank - 1; those of fewer weights are divided by their number - 1
        scale = math.sqrt((self.rank - 1) / (used - 1)) if used > 1 else 1.0
        for weight, mean, squares, std, deviations in self._parts():
            weight.copy_(mean)
            std.copy_((squares / count).clamp_min(0).sqrt())  # rounding can leave a sum of squares below 0
            deviations *= scale
        self.scale.fill_(scale)
        self.finished.fill_(count)

    def measure(self, keys: Tensor, data: TrainingRows) -> None:
        """Compute the running statistics of every draw by one pass over the rows; keys: (n_draws, 2)."""
        names = [f"inner.{name}" for name in self.statistics]
        self._measuring = True
        try:
            found = measure_statistics(self, {"key": keys.to(self.key.device)}, names, data)
        finally:
            self._measuring = False
        for index, name in enumerate(names):
            self.get_buffer(f"statistics_{index}").copy_(found[name])
