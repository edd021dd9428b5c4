"""Factors of independent parameters: every weight has its own variance."""

from collections.abc import Mapping

import torch
from torch import Tensor

from vbdl.nn.drawn import drawn, noise
from vbdl.nn.gaussian.factor import Factor, common
from vbdl.types import State


class Independent(Factor):
    """The base of factors with an independent normal for every weight: a subclass defines `std`.

    Each parameter has a layer number of its own.
    """

    @property
    def layers(self) -> int:  # type: ignore[override]
        return len(self.names)

    def std(self, name: str) -> Tensor:
        """The std of every weight of a parameter, in its shape; 0 in a padding row."""
        raise NotImplementedError(f"{type(self).__name__} does not define std(name)")

    def masked(self, name: str, std: Tensor) -> Tensor:
        """A std of every weight of a parameter with 0 in its padding row."""
        if name not in self.padding:
            return std
        is_drawn = torch.arange(std.shape[0], device=std.device) != self.padding[name]
        return std * is_drawn.to(std.dtype).view(-1, *[1] * (std.ndim - 1))

    def deviation(self, key: Tensor, layer: int) -> State:
        stds = {name: self.std(name) for name in self.names}
        return {name: s * noise(key, number, s) for number, (name, s) in enumerate(stds.items(), start=layer)}

    def draw(self, means: State, key: Tensor, layer: int) -> State:
        """Draw w = mean + std * noise by parameter name; `Drawn` tensors where a kernel draws them when used."""
        return {
            name: drawn(means[name], self.std(name), key, number) for number, name in enumerate(self.names, start=layer)
        }

    def log_det(self) -> Tensor:
        return torch.stack([2 * self.without_padding(n, self.std(n)).log().sum() for n in self.names]).sum()

    def variances(self) -> State:
        return {name: self.std(name).square() for name in self.names}


class Diagonal(Independent):
    """Independent normals with variances 1 / (curvature + prior precision), one curvature per weight.

    Buffers: `curvature_0`, `curvature_1`, ..., in the shape of each parameter, in the order of `names`, initially 0;
    `prior_precision`, (), initially 1.

        factor = Diagonal(dict(network.named_parameters()))
        factor.curvature("head.weight").copy_(squared_gradients)
        factor.prior_precision.fill_(10.0)
    """

    prior_precision: Tensor

    def __init__(self, parameters: Mapping[str, Tensor], padding: Mapping[str, int] | None = None):
        super().__init__(parameters, padding)
        for index, p in enumerate(parameters.values()):
            self.register_buffer(f"curvature_{index}", torch.zeros_like(p).detach())
        self.register_buffer("prior_precision", common(parameters).new_ones(()))

    def curvature(self, name: str) -> Tensor:
        """The curvature of every weight of a parameter, in its shape, summed over the training rows."""
        return self.get_buffer(f"curvature_{self.names.index(name)}")

    def std(self, name: str) -> Tensor:
        return self.masked(name, (self.curvature(name) + self.prior_precision).rsqrt())
