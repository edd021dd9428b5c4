"""The factor of few parameters with any covariance, such as those of a last layer."""

from collections.abc import Mapping

import torch
from torch import Tensor

from vbdl.nn.gaussian.factor import Factor, common
from vbdl.nn.gaussian.operators import dense_noise
from vbdl.types import State


class Dense(Factor):
    """A normal distribution with precision H + prior precision, for any symmetric curvature H = V diag(l) V^T.

        w = mean + V (e / sqrt(l + prior precision))

    w is the vector of all parameters, each flattened, in the order of `names`, without padding rows; it has n entries.
    The factor uses one layer number. Memory: n^2 numbers.

    Buffers: `values` l, (n,), initially 0, summed over the training rows; `vectors` V, (n, n), with an eigenvector in
    each column, initially the identity; `prior_precision`, (), initially 1.
    """

    layers = 1
    values: Tensor
    vectors: Tensor
    prior_precision: Tensor

    def __init__(self, parameters: Mapping[str, Tensor], padding: Mapping[str, int] | None = None):
        super().__init__(parameters, padding)
        like = common(parameters)
        self.size = sum(self.drawn_shape(name).numel() for name in self.names)
        self.register_buffer("values", like.new_zeros(self.size))
        self.register_buffer("vectors", torch.eye(self.size, dtype=like.dtype, device=like.device))
        self.register_buffer("prior_precision", like.new_ones(()))

    def precision(self) -> Tensor:
        """The eigenvalues of the precision matrix, (n,)."""
        return self.values + self.prior_precision

    def deviation(self, key: Tensor, layer: int) -> State:
        std = self.precision().rsqrt()
        return self.split(dense_noise(self.vectors, std, key.to(std.device), layer))

    def log_det(self) -> Tensor:
        return -self.precision().log().sum()

    def variances(self) -> State:
        return self.split(self.vectors.square() @ (1 / self.precision()))

    def split(self, vector: Tensor) -> State:
        """The parameters in a vector (n,), by name, with 0 in padding rows."""
        shapes = {name: self.drawn_shape(name) for name in self.names}
        pieces = vector.split([shape.numel() for shape in shapes.values()])
        return {
            name: self.with_padding(name, piece.view(shape))
            for (name, shape), piece in zip(shapes.items(), pieces, strict=True)
        }
