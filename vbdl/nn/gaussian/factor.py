"""The base class of a factor: one block of the covariance C of q(w) = N(mean, C), which draws some of the parameters.

Parameters of different factors are independent.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vbdl.nn.embedding import without_row
from vbdl.types import State


class Factor(nn.Module):
    """A normal distribution of w - mean for some parameters of a network, written in one way.

    A factor holds its tensors as buffers, which have their final shapes from the start: before it is fitted, loading an
    artifact can fill them in.

    parameters: the parameters that it draws together, by their names in the user's network; only their shapes, dtype
        and device are used.
    padding: the padding row of each embedding table that has one, by name; it is never drawn.

    Raises ValueError without parameters.
    """

    names: tuple[str, ...]
    """The names of the parameters that the factor draws together."""

    layers: int
    """The number of layer numbers in the counters of random numbers that the factor uses."""

    def __init__(self, parameters: Mapping[str, Tensor], padding: Mapping[str, int] | None = None):
        super().__init__()
        if not parameters:
            raise ValueError("a factor needs at least one parameter to draw: give {name: parameter}")
        self.names = tuple(parameters)
        self.shapes = {name: p.shape for name, p in parameters.items()}
        self.padding = {
            name: row % parameters[name].shape[0] for name, row in (padding or {}).items() if name in parameters
        }

    def deviation(self, key: Tensor, layer: int) -> State:
        """Draw w - mean by parameter name, in the parameters' shapes: a pure function of key, layer and the buffers.

        key: (2,) int64, the seed and the number of the draw. layer: the first of its layer numbers in the counters.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define deviation(key, layer)")

    def draw(self, means: State, key: Tensor, layer: int) -> State:
        """Draw w = mean + deviation by parameter name; means: the means by parameter name."""
        deviations = self.deviation(key, layer)
        return {name: means[name] + deviations[name] for name in self.names}

    def log_det(self) -> Tensor:
        """The log of the determinant of C, (), in nats; without the padding rows."""
        raise NotImplementedError(f"{type(self).__name__} does not define log_det()")

    def variances(self) -> State:
        """The diagonal of C by parameter name, in the parameters' shapes; 0 in a padding row."""
        raise NotImplementedError(f"{type(self).__name__} does not define variances()")

    # -- padding rows

    def without_padding(self, name: str, t: Tensor) -> Tensor:
        """A tensor of the shape of a parameter without its padding row."""
        return without_row(t, self.padding.get(name))

    def with_padding(self, name: str, t: Tensor) -> Tensor:
        """The inverse of `without_padding`, with zeros in the padding row."""
        row = self.padding.get(name)
        return t if row is None else torch.cat([t[:row], t.new_zeros(1, *t.shape[1:]), t[row:]])

    def drawn_shape(self, name: str) -> torch.Size:
        """The shape of a parameter without its padding row."""
        shape = self.shapes[name]
        return torch.Size((shape[0] - 1, *shape[1:])) if name in self.padding else shape


def common(parameters: Mapping[str, Tensor]) -> Tensor:
    """A tensor of the dtype and on the device that all parameters have; ValueError if they differ."""
    kinds = sorted({f"{p.dtype} on {p.device}" for p in parameters.values()})
    if len(kinds) > 1:
        raise ValueError(f"the parameters of this factor need one dtype and device, got {kinds}: make several factors")
    return next(iter(parameters.values())).detach()
