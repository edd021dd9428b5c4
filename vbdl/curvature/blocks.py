"""Blocks of the generalized Gauss-Newton matrix: sums over the rows, and their eigenvalues and eigenvectors.

Sums are float64: a batch is summed in the network's dtype, batches are added up in float64.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from vbdl.curvature.uses import Use
from vbdl.nn.embedding import without_row
from vbdl.types import OutputHessian, State

_NUMBERS = 2**24  # of the largest array of per-row gradients or patches made at once
Gradients = Sequence[Tensor | None]
"""The gradient in the output of each use, (rows, positions, groups, outputs); None where it is 0."""


class Block:
    """The curvature of some parameters of a network, summed over rows.

    parameters: by name; only their shapes, dtype and device are used.
    """

    def __init__(self, parameters: Mapping[str, Tensor]):
        self.names = tuple(parameters)
        self.shapes = {name: p.shape for name, p in parameters.items()}
        first = next(iter(parameters.values()))
        self.like = torch.zeros((), dtype=torch.float64, device=first.device)

    def add_output_layer(self, use: Use, hessian: OutputHessian, rows: int) -> None:
        """Add a batch of rows whose outputs are the output of this one linear layer, (rows, outputs): no gradient."""
        raise NotImplementedError

    def add_inputs(self, uses: Sequence[Use], rows: int) -> None:
        """Add what depends on the inputs of the layers alone, once for each batch."""

    def add_column(self, uses: Sequence[Use], gradients: Gradients, direct: State) -> None:
        """Add the outer product of one gradient of each row, that of one column.

        direct: gradients of parameters of the batch's only row, by name, that are not among the uses.
        """
        raise NotImplementedError

    def finish(self) -> State:
        """The sum as the buffers of a factor of `vbdl.nn.gaussian`, by their names; a diagonal by parameter names."""
        raise NotImplementedError


def chunks(rows: int, each: int) -> Iterator[slice]:
    """Yield slices of the rows that hold at most 2^24 numbers, with `each` of them for a row."""
    step = max(1, _NUMBERS // max(each, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def with_one(phi: Tensor) -> Tensor:
    """The inputs of a layer, (rows, inputs), with the input 1 of its bias."""
    return torch.cat([phi, phi.new_ones(len(phi), 1)], dim=1)


# -- Kronecker


class KroneckerBlock(Block):
    """G x A of a layer: A the second moments of its inputs, G those of the gradients in its outputs.

    Martens and Grosse 2015. Of a layer that is applied at several positions of a row (a convolution, tokens), positions
    count as independent: G x A = (sum of g g^T) x (sum of a a^T) / (number of positions) over all rows and positions
    (Grosse and Martens 2016). Of parameters {weight, bias}, the bias is the column of an input 1.
    """

    def __init__(self, parameters: Mapping[str, Tensor]):
        super().__init__(parameters)
        weight, *bias = parameters.values()
        self.weight, self.bias = self.names[0], (self.names[1] if bias else None)
        self.inputs = self.like.new_zeros(weight[0].numel(), weight[0].numel())
        self.input_sum = self.like.new_zeros(weight[0].numel())
        self.outputs = self.like.new_zeros(len(weight), len(weight))
        self.positions = 0

    def _uses(self, uses: Sequence[Use]) -> Iterator[tuple[int, Use]]:
        return ((i, use) for i, use in enumerate(uses) if use.weight == self.weight)

    def add_output_layer(self, use: Use, hessian: OutputHessian, rows: int) -> None:
        self._add(use.inputs_at(slice(None)).flatten(0, 2))
        self.outputs += hessian.total()

    def _add(self, phi: Tensor) -> None:
        self.inputs += phi.mT @ phi
        self.input_sum += phi.sum(0)
        self.positions += len(phi)

    def add_inputs(self, uses: Sequence[Use], rows: int) -> None:
        for _, use in self._uses(uses):
            first = use.inputs_at(slice(0, 1))
            for some in chunks(rows, first.numel()):
                self._add(use.inputs_at(some).flatten(0, 2))

    def add_column(self, uses: Sequence[Use], gradients: Gradients, direct: State) -> None:
        for i, _ in self._uses(uses):
            g = gradients[i]
            if g is not None:
                flat = g.flatten(0, 2)
                self.outputs += flat.mT @ flat

    def finish(self) -> State:
        inputs = self.inputs
        if self.bias is not None:
            count = self.like + self.positions
            inputs = torch.cat(
                [
                    torch.cat([inputs, self.input_sum[:, None]], dim=1),
                    torch.cat([self.input_sum, count[None]])[None],
                ]
            )
        a, of_inputs = torch.linalg.eigh(inputs / max(self.positions, 1))
        g, of_outputs = torch.linalg.eigh(self.outputs)
        a, g = a.clamp_min(0), g.clamp_min(0)
        return {"input_values": a, "input_vectors": of_inputs, "output_values": g, "output_vectors": of_outputs}


class BiasBlock(Block):
    """G of a layer, for its bias alone: the bias of a Kronecker block without the covariance with the weights."""

    def __init__(self, parameters: Mapping[str, Tensor]):
        super().__init__(parameters)
        (self.bias,) = self.names
        self.outputs = self.like.new_zeros(self.shapes[self.bias].numel(), self.shapes[self.bias].numel())

    def add_output_layer(self, use: Use, hessian: OutputHessian, rows: int) -> None:
        self.outputs += hessian.total()

    def add_column(self, uses: Sequence[Use], gradients: Gradients, direct: State) -> None:
        for use, g in zip(uses, gradients, strict=True):
            if use.bias == self.bias and g is not None:
                flat = g.flatten(0, 2)
                self.outputs += flat.mT @ flat

    def finish(self) -> State:
        values, vectors = torch.linalg.eigh(self.outputs)
        return {"values": values.clamp_min(0), "vectors": vectors}


# -- diagonal and dense, from the gradient of each row


def row_gradients(
    name: str, shape: torch.Size, uses: Sequence[Use], gradients: Gradients, direct: State, some: slice
) -> Tensor:
    """The gradient of each of some rows in a parameter, (rows, *shape): the sum over its uses."""
    if name in direct:
        return direct[name].unsqueeze(0)
    total = None
    for use, gradient in zip(uses, gradients, strict=True):
        if gradient is None or name not in (use.weight, use.bias):
            continue
        g = gradient[some]
        one = g.sum(1).flatten(1) if name == use.bias and name != use.weight else _of_weight(use, g, some, shape)
        one = one.reshape(len(g), *shape)
        total = one if total is None else total + one
    if total is None:
        return torch.zeros(1, *shape)
    return total


def _of_weight(use: Use, g: Tensor, some: slice, shape: torch.Size) -> Tensor:
    at = use.inputs_at(some)
    if use.kind == "scale":
        return (g * at).sum(1)
    if use.kind == "linear":
        return torch.einsum("ntgo,ntgi->ngoi", g, at)
    table = g.new_zeros(len(g), *shape)
    rows = torch.arange(len(g), device=g.device)[:, None].expand_as(at)
    return table.index_put((rows, at), g.squeeze(2), accumulate=True)


class DiagonalBlock(Block):
    """The diagonal of the curvature: for each weight, the sum over rows and columns of its squared gradient."""

    def __init__(self, parameters: Mapping[str, Tensor]):
        super().__init__(parameters)
        self.sums = {name: self.like.new_zeros(shape) for name, shape in self.shapes.items()}

    def add_output_layer(self, use: Use, hessian: OutputHessian, rows: int) -> None:
        diagonal = hessian.diagonal()
        if use.weight in self.sums:
            phi = use.inputs_at(slice(None)).flatten(1)
            self.sums[use.weight] += (diagonal.mT @ phi.square()).view(self.shapes[use.weight])
        if use.bias in self.sums:
            self.sums[use.bias] += diagonal.sum(0)

    def add_column(self, uses: Sequence[Use], gradients: Gradients, direct: State) -> None:
        for name, shape in self.shapes.items():
            mine = [
                (u, g) for u, g in zip(uses, gradients, strict=True) if g is not None and name in (u.weight, u.bias)
            ]
            if name not in direct and not mine:
                continue
            if name not in direct and len(mine) == 1 and _once(*mine[0], name):
                use, g = mine[0]
                at = use.inputs_at(slice(None)).flatten(1)
                self.sums[name] += (g.flatten(1).square().mT @ at.square()).view(shape)
                continue
            rows = 1 if name in direct else len(mine[0][1])
            for some in chunks(rows, shape.numel()):
                self.sums[name] += row_gradients(name, shape, uses, gradients, direct, some).square().sum(0)

    def finish(self) -> State:
        return dict(self.sums)


def _once(use: Use, gradient: Tensor, name: str) -> bool:
    """Whether this is the weight of a linear layer that is applied once to each row."""
    return use.kind == "linear" and name == use.weight and gradient.shape[1] == gradient.shape[2] == 1


class DenseBlock(Block):
    """The whole curvature of few parameters, (n, n): flattened in the order of `names`, without padding rows.

    padding: the padding row of each embedding table that has one, by name, which is left out.
    """

    def __init__(self, parameters: Mapping[str, Tensor], padding: Mapping[str, int] | None = None):
        super().__init__(parameters)
        self.padding = padding or {}
        self.size = sum(
            shape.numel() - (shape[1:].numel() if name in self.padding else 0) for name, shape in self.shapes.items()
        )
        self.matrix = self.like.new_zeros(self.size, self.size)
        self.of_layer: Tensor | None = None  # of an output layer: (outputs, inputs, outputs, inputs), with the bias
        self.layer: Use | None = None

    def add_output_layer(self, use: Use, hessian: OutputHessian, rows: int) -> None:
        phi = with_one(use.inputs_at(slice(None)).flatten(1))
        width, outputs = phi.shape[1], hessian.diagonal().shape[1]
        if self.of_layer is None:
            self.of_layer = self.like.new_zeros(outputs, width, outputs, width)
        self.layer, matrices = use, hessian.matrices()
        for some in chunks(rows, outputs * max(outputs, width)):
            each, at = matrices[some], phi[some]
            for one in range(outputs):
                rest = each[:, one, one:, None] * at[:, None]  # (rows, outputs from this one on, width)
                self.of_layer[one, :, one:] += (at.mT @ rest.flatten(1)).view(width, outputs - one, width)

    def add_column(self, uses: Sequence[Use], gradients: Gradients, direct: State) -> None:
        rows = 1 if direct else next(len(g) for g in gradients if g is not None)
        for some in chunks(rows, self.size):
            count = len(range(rows)[some])
            each = []
            for name, shape in self.shapes.items():
                of_rows = row_gradients(name, shape, uses, gradients, direct, some)
                if (row := self.padding.get(name)) is not None:
                    of_rows = torch.stack([without_row(one, row) for one in of_rows])
                each.append(of_rows.reshape(len(of_rows), -1).to(self.like.device).expand(count, -1))
            jacobian = torch.cat([t.to(each[0].dtype) for t in each], dim=1)
            self.matrix += jacobian.mT @ jacobian

    def finish(self) -> State:
        matrix = self.matrix
        if self.of_layer is not None and self.layer is not None:
            matrix = matrix + self._of_layer(self.of_layer, self.layer)
        values, vectors = torch.linalg.eigh(matrix)
        return {"values": values.clamp_min(0), "vectors": vectors}

    def _of_layer(self, upper: Tensor, use: Use) -> Tensor:
        """The curvature of an output layer in the order of this block's parameters."""
        outputs, width = upper.shape[:2]
        flat = upper.view(outputs * width, outputs * width)
        block = torch.arange(outputs, device=upper.device).repeat_interleave(width)
        flat = torch.where(block[:, None] < block, flat, flat.mT.where(block[:, None] > block, flat))
        places = torch.arange(outputs * width, device=upper.device).view(outputs, width)
        order = [places[:, :-1].flatten() if name == use.weight else places[:, -1] for name in self.names]
        chosen = torch.cat(order)
        return flat[chosen][:, chosen]
