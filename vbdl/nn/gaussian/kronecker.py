"""The factor of a layer whose curvature is a Kronecker product: one matrix of its outputs times one of its inputs.

Martens and Grosse, Optimizing Neural Networks with Kronecker-factored Approximate Curvature, ICML 2015,
https://arxiv.org/abs/1503.05671; Grosse and Martens, A Kronecker-factored Approximate Fisher Matrix for Convolution
Layers, ICML 2016, https://arxiv.org/abs/1602.01407; as a posterior: Ritter, Botev and Barber, ICLR 2018.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from vbdl.nn.gaussian.factor import Factor, common
from vbdl.nn.gaussian.operators import kronecker_noise
from vbdl.types import State


class Kronecker(Factor):
    """A normal distribution of a layer's weight and bias with precision (G x A) + prior precision.

        W = mean + U_G (E / sqrt(P)) U_A^T,   P_ji = g_j a_i + prior precision

    where g, U_G are the eigenvalues and eigenvectors of G, a and U_A those of A. W is the weight as a matrix, (outputs,
    inputs): the inputs of a convolution are its (channels, height, width) flattened. The bias, if it is drawn too, is
    the last column, that of an input 1. The factor uses one layer number.

    Buffers: `output_values` g, (outputs,), and `input_values` a, (inputs,), initially 0, whose products are curvatures
    summed over the training rows; `output_vectors` U_G and `input_vectors` U_A, with an eigenvector in each column,
    initially the identity; `prior_precision`, (), initially 1.

    parameters: the weight of the layer, and its bias if that is drawn too: {name: weight, name: bias}.
    Raises ValueError for a weight that is no matrix or for a bias without one entry for each row of the weight.
    """

    layers = 1
    output_values: Tensor
    output_vectors: Tensor
    input_values: Tensor
    input_vectors: Tensor
    prior_precision: Tensor

    def __init__(self, parameters: Mapping[str, Tensor]):
        super().__init__(parameters)
        weight, *rest = parameters.values()
        if weight.ndim < 2 or len(rest) > 1 or any(bias.shape != weight.shape[:1] for bias in rest):
            shapes = {name: tuple(p.shape) for name, p in parameters.items()}
            raise ValueError(
                f"a Kronecker factor draws a weight (outputs, inputs, ...) and, if wanted, a bias (outputs,); got "
                f"{shapes}: draw other parameters by Diagonal"
            )
        outputs, inputs = weight.shape[0], weight[0].numel() + len(rest)
        like = common(parameters)
        eye = lambda n: torch.eye(n, dtype=like.dtype, device=like.device)
        self.register_buffer("output_values", like.new_zeros(outputs))
        self.register_buffer("output_vectors", eye(outputs))
        self.register_buffer("input_values", like.new_zeros(inputs))
        self.register_buffer("input_vectors", eye(inputs))
        self.register_buffer("prior_precision", like.new_ones(()))

    def precision(self) -> Tensor:
        """The eigenvalues of the precision matrix, (outputs, inputs)."""
        return self.output_values[:, None] * self.input_values + self.prior_precision

    def deviation(self, key: Tensor, layer: int) -> State:
        std = self.precision().rsqrt()
        return self._split(kronecker_noise(self.output_vectors, self.input_vectors, std, key.to(std.device), layer))

    def log_det(self) -> Tensor:
        return -self.precision().log().sum()

    def variances(self) -> State:
        return self._split(self.output_vectors.square() @ (1 / self.precision()) @ self.input_vectors.square().mT)

    def _split(self, matrix: Tensor) -> State:
        """The parameters in a matrix (outputs, inputs), by name."""
        weight, *bias = self.names
        if not bias:
            return {weight: matrix.view(self.shapes[weight])}
        return {weight: matrix[:, :-1].reshape(self.shapes[weight]), bias[0]: matrix[:, -1]}
