"""Sums the generalized Gauss-Newton matrix of a network and a likelihood over the training rows.

Memory does not grow with the number of rows, and no array of rows x outputs x weights is made: each batch costs one
forward pass of the layers before the first chosen one, and one backward pass to it for each column of the likelihood's
Hessian (`columns`). A linear layer that is itself the output, as a last layer mostly is, needs no backward pass:
A = sum phi phi^T, G = sum H. The network must be in evaluation mode, in which rows do not depend on each other.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vbdl.calling.inputs import flatten
from vbdl.calling.traversing import state_of
from vbdl.curvature.blocks import BiasBlock, Block, KroneckerBlock
from vbdl.curvature.columns import columns
from vbdl.curvature.uses import Recorded, Use, record
from vbdl.data.rows import take
from vbdl.types import Inputs, Likelihood, Output, State

logger = logging.getLogger("vbdl")


@dataclass
class Fit:
    """How the network at its mean fits the rows that were passed.

    rows: their number. nll: the sum of -log p(y | x), in nats. residuals: the sum of squared residuals of each output
    in units of the noise variance, (outputs,), of `elements` targets each; None for a likelihood without learned noise.
    """

    rows: int = 0
    nll: float = 0.0
    residuals: Tensor | None = None
    elements: int = 0

    def add(self, likelihood: Likelihood, outputs: Tensor, y: Tensor) -> None:
        """Add a batch of outputs, (batch, ...), and targets."""
        parameters = likelihood(outputs)
        self.rows += len(y)
        self.nll += float(likelihood.nll(parameters, y).double().sum())
        if likelihood.learned_noise:
            total = likelihood.squared_residuals(parameters, y).double().sum(0)
            self.residuals = total if self.residuals is None else self.residuals + total
            self.elements += y.numel() // len(total)


@dataclass
class GaussNewton:
    """The curvature of chosen parameters, added up batch by batch.

    blocks: which parameters, and the form of the curvature of each.
    samples: backward passes for each batch if it is not one for each output; see `columns`.
    seed: of the counters that random columns are drawn from.
    """

    network: nn.Module
    likelihood: Likelihood
    blocks: Sequence[Block]
    output: Output = None
    samples: int | None = None
    seed: int = 0
    fit: Fit = field(default_factory=Fit)
    state: State = field(init=False)
    # parameters that the outputs depend on by an operation without a rule: their gradients are taken row by row
    direct: set[str] = field(default_factory=set)
    _axes: list[int] | None = None  # the axis of the batch in the inputs of each use
    _each_row: bool = False  # whether rows are passed one by one

    def __post_init__(self) -> None:
        self.state = {name: t.detach() for name, t in state_of(self.network).items()}

    @property
    def chosen(self) -> list[str]:
        """The names of all parameters of the blocks."""
        return [name for block in self.blocks for name in block.names]

    def add(self, x: Inputs, y: Tensor) -> None:
        """Add a batch of rows; y: the targets as the likelihood's `check_targets` returns them."""
        if self._axes is None:
            self._find_axes(x)
        if not self._each_row:
            self._add(x, y)
            return
        for row in range(len(y)):
            one = torch.tensor([row])
            self._add(take(x, one), y[one])

    def _record(self, x: Inputs, axes: Sequence[int] | None, find_elsewhere: bool = False) -> Recorded:
        state = dict(self.state)
        for name in self.direct:
            state[name] = self.state[name].clone().requires_grad_()
        captured = [name for name in self.chosen if name not in self.direct]
        rows = flatten(x).rows
        recorded = record(self.network, state, captured, x, rows, self.output, axes, find_elsewhere)
        recorded.leaves = {name: state[name] for name in self.direct}
        return recorded

    def _find_axes(self, x: Inputs) -> None:
        """Find the axis of the batch in the inputs of each use, and the parameters that need gradients row by row.

        Two runs with other numbers of rows, which differ in the length of that axis.
        """
        some = lambda count: take(x, torch.zeros(count, dtype=torch.int64))
        two, three = (self._record(some(count), None, find_elsewhere=True) for count in (2, 3))
        self.direct = two.elsewhere | three.elsewhere
        names = lambda use: {name for name in (use.weight, use.bias) if name is not None}
        counts = [Counter(name for use in recorded.uses for name in names(use)) for recorded in (two, three)]
        by_row = counts[0] - counts[1] | counts[1] - counts[0]  # called in a loop over the rows
        self.direct |= set(by_row)
        first, second = ([use for use in each.uses if not names(use) & self.direct] for each in (two, three))
        for use, other in zip(first, second, strict=True):
            if use.shape == other.shape:  # it has no batch axis, as that of a table of positions
                self.direct |= names(use)
        for block in self.blocks:
            if isinstance(block, KroneckerBlock | BiasBlock) and (odd := self.direct & set(block.names)):
                raise ValueError(
                    f"parameter '{min(odd)}' is used by other operations than one linear layer or convolution of all "
                    f"rows, so its curvature is no Kronecker product: choose structure='diagonal', or parameters= "
                    f"without it"
                )
        if self.direct:
            logger.info(
                "the curvature of %s has no rule for a batch and is computed row by row, which is slower",
                ", ".join(sorted(self.direct)),
            )
            two, three = (self._record(some(count), None) for count in (2, 3))
        pairs = zip(two.uses, three.uses, strict=True)
        shapes = [(use.shape, other.shape) for use, other in pairs]
        self._axes = [next(i for i, (m, n) in enumerate(zip(*both, strict=True)) if m != n) for both in shapes]
        self._each_row = bool(self.direct) or self._mixes(x)

    def _mixes(self, x: Inputs) -> bool:
        """Whether the output of a row depends on what a use computes at the place of another row.

        That is so of layers whose batch axis is part of a longer axis in another order, or that compute weights for all
        rows from tensors that were repeated for each.
        """
        recorded = self._record(take(x, torch.arange(3) % flatten(x).rows), self._axes)
        ends, outputs = [use.output for use in recorded.uses], recorded.outputs
        for row in range(len(outputs) if ends and outputs.requires_grad else 0):
            cotangent = torch.zeros_like(outputs)
            cotangent[row] = torch.arange(1, outputs[row].numel() + 1).cos().view(outputs[row].shape)
            gradients = torch.autograd.grad(outputs, ends, cotangent, retain_graph=True, allow_unused=True)
            for use, gradient in zip(recorded.uses, gradients, strict=True):
                if gradient is None:
                    continue
                others = use.gradients_at(gradient).detach().clone()
                others[row] = 0
                if bool((others.abs() > 0).any()):
                    logger.info("rows are passed one by one, which is slower: a layer's inputs are not ordered by rows")
                    return True
        return False

    def _add(self, x: Inputs, y: Tensor) -> None:
        recorded = self._record(x, self._axes)
        outputs, rows = recorded.outputs.detach(), len(y)
        with torch.no_grad():
            hessian = self.likelihood.hessian(outputs, y)
            begun = self.fit.rows
            self.fit.add(self.likelihood, outputs, y)
            if (use := _output_layer(recorded)) is not None:
                for block in self.blocks:
                    block.add_output_layer(use, hessian, rows)
                return
            for block in self.blocks:
                block.add_inputs(recorded.uses, rows)
            vectors = columns(hessian, rows, outputs[0].numel(), self.samples, self.seed + begun)
        ends = [use.output for use in recorded.uses] + list(recorded.leaves.values())
        for vector in vectors if ends else ():
            cotangent = vector.reshape(outputs.shape).to(recorded.outputs.dtype)
            gradients = torch.autograd.grad(recorded.outputs, ends, cotangent, retain_graph=True, allow_unused=True)
            with torch.no_grad():
                by_use = [
                    None if g is None else use.gradients_at(g) for use, g in zip(recorded.uses, gradients, strict=False)
                ]
                direct = dict(zip(recorded.leaves, gradients[len(recorded.uses) :], strict=True))
                filled = {n: torch.zeros_like(self.state[n]) if g is None else g for n, g in direct.items()}
                for block in self.blocks:
                    block.add_column(recorded.uses, by_use, filled)


def _output_layer(recorded: Recorded) -> Use | None:
    """The only use of chosen parameters, if its output is that of the network: a linear layer, (rows, outputs)."""
    if len(recorded.uses) != 1 or recorded.leaves:
        return None
    use, outputs = recorded.uses[0], recorded.outputs
    return use if use.kind == "linear" and use.passed_on is outputs and outputs.ndim == 2 else None
