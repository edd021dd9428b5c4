"""The Hessian of a row's -log p(y | x) in the outputs of the network, in the form that each likelihood has it.

The outputs of a row are flattened, (batch, outputs). With J the Jacobian of the outputs in the weights, the sum over
rows of J^T H J is the generalized Gauss-Newton matrix (Schraudolph, Fast Curvature Matrix-Vector Products for
Second-Order Gradient Descent, Neural Computation 14, 2002). Each form is positive semi-definite.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class OutputHessian(Protocol):
    """The Hessian H of every row of a batch, (batch, outputs, outputs), without making it unless asked to."""

    @property
    def groups(self) -> int:
        """The number of blocks along the diagonal of H, of equal size: 1, or one for each pixel or token of a row."""
        ...

    def diagonal(self) -> Tensor:
        """The diagonal of H, (batch, outputs)."""
        ...

    def matrices(self) -> Tensor:
        """H itself, (batch, outputs, outputs)."""
        ...

    def total(self) -> Tensor:
        """The sum of H over the rows, (outputs, outputs)."""
        ...

    def root(self, vectors: Tensor) -> Tensor:
        """Multiply vectors by a root R of H = R R^T; vectors and result: (batch, outputs).

        If v are standard normals, R v has the covariance H, like the gradient of -log p at targets drawn from p.
        """
        ...

    def column(self, number: int, signs: Tensor) -> Tensor:
        """The vector, (batch, outputs), with a sign at this column of every block and 0 elsewhere.

        signs: (batch, groups). Over random signs, the mean of the sum over the columns of (R v)(R v)^T is H.
        """
        ...


@dataclass(frozen=True)
class DiagonalHessian:
    """H = diag(values), of outputs that are independent given x: normal noise, binary targets.

    values: (batch, outputs), at least 0.
    """

    values: Tensor

    @property
    def groups(self) -> int:
        return self.values.shape[1]

    def diagonal(self) -> Tensor:
        return self.values

    def matrices(self) -> Tensor:
        return torch.diag_embed(self.values)

    def total(self) -> Tensor:
        return self.values.sum(0).diag()

    def root(self, vectors: Tensor) -> Tensor:
        return self.values.sqrt() * vectors

    def column(self, number: int, signs: Tensor) -> Tensor:
        return signs


@dataclass(frozen=True)
class SoftmaxHessian:
    """H = diag(p) - p p^T of classes with probabilities p, for each pixel or token of a row by itself.

    probs: (batch, ..., classes). class_axis: the axis of the classes in the network's outputs.
    """

    probs: Tensor
    class_axis: int = -1

    @property
    def groups(self) -> int:
        return self.probs[0].numel() // self.probs.shape[-1]

    def _as_outputs(self, values: Tensor) -> Tensor:
        """Flatten values (batch, ..., classes) in the order of the network's outputs."""
        return values.movedim(-1, self.class_axis).flatten(1)

    def _as_classes(self, flat: Tensor) -> Tensor:
        shape = self.probs.movedim(-1, self.class_axis).shape
        return flat.reshape(-1, *shape[1:]).movedim(self.class_axis, -1)

    def diagonal(self) -> Tensor:
        return self._as_outputs(self.probs * (1 - self.probs))

    def matrices(self) -> Tensor:
        if self.groups == 1:
            p = self.probs.flatten(1)
            return torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
        identity = torch.eye(self.probs[0].numel()).to(self.probs)
        roots = [self.root(column.expand(len(self.probs), -1)) for column in identity]
        root = torch.stack(roots, dim=-1)
        return root @ root.mT

    def total(self) -> Tensor:
        if self.groups == 1:
            p = self.probs.flatten(1)
            return p.sum(0).diag() - p.T @ p
        return self.matrices().sum(0)

    def root(self, vectors: Tensor) -> Tensor:
        """R = diag(p)^(1/2) - p (p^(1/2))^T, whose R R^T is diag(p) - p p^T."""
        v, scale = self._as_classes(vectors), self.probs.sqrt()
        return self._as_outputs(scale * v - self.probs * (scale * v).sum(-1, keepdim=True))

    def column(self, number: int, signs: Tensor) -> Tensor:
        one = signs.new_zeros(len(signs), self.groups, self.probs.shape[-1])
        one[:, :, number] = signs
        return self._as_outputs(one.view(-1, *self.probs.shape[1:]))


@dataclass(frozen=True)
class DenseHessian:
    """H as it is, with its negative eigenvalues replaced by 0, of any other likelihood.

    values: (batch, outputs, outputs), symmetric.
    """

    values: Tensor

    @property
    def groups(self) -> int:
        return 1

    def _decomposed(self) -> tuple[Tensor, Tensor]:
        eigenvalues, eigenvectors = torch.linalg.eigh(self.values)
        return eigenvalues.clamp_min(0), eigenvectors

    def diagonal(self) -> Tensor:
        return self.matrices().diagonal(dim1=-2, dim2=-1)

    def matrices(self) -> Tensor:
        eigenvalues, eigenvectors = self._decomposed()
        return eigenvectors * eigenvalues.unsqueeze(-2) @ eigenvectors.mT

    def total(self) -> Tensor:
        return self.matrices().sum(0)

    def root(self, vectors: Tensor) -> Tensor:
        eigenvalues, eigenvectors = self._decomposed()
        return (eigenvectors @ (eigenvalues.sqrt() * vectors).unsqueeze(-1)).squeeze(-1)

    def column(self, number: int, signs: Tensor) -> Tensor:
        one = signs.new_zeros(self.values.shape[:2])
        one[:, number] = signs[:, 0]
        return one
