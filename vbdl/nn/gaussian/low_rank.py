"""The factor of independent parameters plus directions that all parameters share.

Maddox, Garipov, Izmailov, Vetrov and Wilson, A Simple Baseline for Bayesian Uncertainty in Deep Learning, NeurIPS 2019,
https://arxiv.org/abs/1902.02476
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from vbdl.nn.drawn import noise
from vbdl.nn.gaussian.factor import Factor
from vbdl.nn.gaussian.operators import low_rank_noise
from vbdl.types import State


class LowRank(Factor):
    """A normal distribution with C = diag(std^2) / 2 + sum_k D_k D_k^T / (2 (rank - 1)).

        w = mean + std * noise / sqrt(2) + sum_k D_k e_k / sqrt(2 (rank - 1))

    The `rank` normals e are the same for all parameters of the factor. Each parameter has a layer number of its own,
    and e has the last one.

    Buffers, each by the order of `names`: `std_0`, `std_1`, ..., in the shape of the parameter, initially 0;
    `deviations_0`, `deviations_1`, ..., (rank, *shape), initially 0.

    rank: the number of directions, at least 2. Raises ValueError for fewer.
    """

    def __init__(self, parameters: Mapping[str, Tensor], rank: int, padding: Mapping[str, int] | None = None):
        super().__init__(parameters, padding)
        if rank < 2:
            raise ValueError(f"a low-rank covariance needs a rank of at least 2, got {rank}: use Diagonal for none")
        self.rank = rank
        for index, p in enumerate(parameters.values()):
            self.register_buffer(f"std_{index}", torch.zeros_like(p).detach())
            self.register_buffer(f"deviations_{index}", p.detach().new_zeros(rank, *p.shape))

    @property
    def layers(self) -> int:  # type: ignore[override]
        return len(self.names) + 1

    def std(self, name: str) -> Tensor:
        """The std of every weight of a parameter in the diagonal part, in its shape; halved in C."""
        return self.get_buffer(f"std_{self.names.index(name)}")

    def deviations(self, name: str) -> Tensor:
        """The deviations D of a parameter from its mean, (rank, *shape)."""
        return self.get_buffer(f"deviations_{self.names.index(name)}")

    def _parts(self, name: str) -> tuple[Tensor, Tensor]:
        """The std of the independent part, in the parameter's shape, and the directions, (rank, weights), scaled."""
        std, directions = self.std(name) / math.sqrt(2), self.deviations(name) / math.sqrt(2 * (self.rank - 1))
        if name in self.padding:
            rows = torch.arange(std.shape[0], device=std.device) != self.padding[name]
            is_drawn = rows.to(std.dtype).view(-1, *[1] * (std.ndim - 1))
            std, directions = std * is_drawn, directions * is_drawn
        return std, directions.flatten(1)

    def deviation(self, key: Tensor, layer: int) -> State:
        last, deviations = layer + len(self.names), {}
        for number, name in enumerate(self.names, start=layer):
            std, directions = self._parts(name)
            shared = low_rank_noise(directions, key.to(std.device), last).view(std.shape)
            deviations[name] = std * noise(key, number, std) + shared
        return deviations

    def log_det(self) -> Tensor:
        """The log of the determinant of C, (), in nats; -inf if a variance of the diagonal part is 0.

        By the matrix determinant lemma, from a (rank, rank) matrix.
        """
        total, inner = (
            0.0,
            torch.eye(self.rank, dtype=self.std(self.names[0]).dtype, device=self.std(self.names[0]).device),
        )
        for name in self.names:
            std, directions = self._parts(name)
            std = self.without_padding(name, std).flatten()
            directions = torch.stack(
                [self.without_padding(name, d.view(self.shapes[name])).flatten() for d in directions]
            )
            total = total + 2 * std.log().sum()
            inner = inner + (directions / std) @ (directions / std).mT
        return total + torch.linalg.slogdet(inner).logabsdet

    def variances(self) -> State:
        parts = {name: self._parts(name) for name in self.names}
        return {n: s.square() + d.square().sum(0).view(s.shape) for n, (s, d) in parts.items()}
