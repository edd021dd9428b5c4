"""Classes of a user's own, one of each kind that `vbdl.register` opens; imported by name where it is trusted."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import vbdl
from vbdl.types import Calibrator, Posterior


@vbdl.register
class NoisyWeights(Posterior):
    """q(w) = N(w, spread^2) of one named weight; nothing is trained here."""

    def __init__(self, network: nn.Module, name: str, spread: float = 0.5):
        super().__init__()
        self.module, self.name, self.width = network, name, spread

    def config(self) -> dict:
        return {"name": self.name, "spread": self.width}

    def draws(self, numbers: Tensor, seed: int) -> dict[str, Tensor]:
        weight = self.module.get_parameter(self.name).detach()
        each = [torch.Generator().manual_seed(hash((seed, int(n)))) for n in numbers]
        noise = [torch.randn(weight.shape, generator=generator) for generator in each]
        return {self.name: weight + self.width * torch.stack(noise)}


@vbdl.register
class Halved(vbdl.Categorical):
    """A categorical likelihood of logits times a factor."""

    def __init__(self, factor: float = 0.5):
        super().__init__()
        self.factor = factor

    def forward(self, outputs: Tensor) -> Tensor:
        return super().forward(outputs * self.factor)


@vbdl.register
class Powered(Calibrator):
    """p^power, normalized; the power is the largest that leaves the mean confidence at or below the accuracy."""

    acts_on = "probs"
    power: Tensor

    def __init__(self, candidates: Sequence[float] = (0.5, 1.0, 2.0)):
        super().__init__()
        self.candidates = tuple(candidates)
        self.register_buffer("power", torch.ones((), dtype=torch.float64))

    def fit(self, probs: Tensor, y: Tensor) -> "Powered":
        accuracy = (probs.argmax(1) == y).double().mean()
        for power in self.candidates:
            self.power.fill_(power)
            if self(probs).amax(1).mean() > accuracy:
                break
        return self

    def forward(self, probs: Tensor) -> Tensor:
        raised = probs**self.power
        return (raised / raised.sum(-1, keepdim=True)).to(probs.dtype)


@vbdl.register
class Above(nn.Module):
    """1 where the uncertainty is above a level."""

    def __init__(self, level: float, kind: str = "total"):
        super().__init__()
        self.level, self.kind = level, kind

    def forward(self, prediction) -> Tensor:
        return (vars(prediction)[self.kind] > self.level).to(torch.int64)


@vbdl.register
class Shifted(nn.Module):
    """A layer that adds a learned vector."""

    def __init__(self, features: int):
        super().__init__()
        self.features = features
        self.shift = nn.Parameter(torch.randn(features))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


class NotOpened(vbdl.Categorical):
    """Nobody has registered this one."""


@vbdl.register
class Forgetful(vbdl.Categorical):
    """Keeps its argument under another name, so that it could not be made again."""

    def __init__(self, factor: float = 0.5):
        super().__init__()
        self.f = factor
