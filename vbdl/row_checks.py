"""Checks of rows before anything is trained on them: by the network and by the likelihood."""

from typing import Any

import torch
from torch import Tensor

from vbdl.data import cannot_take, check_dtype, floating_dtype, take
from vbdl.model import Model
from vbdl.stacking import call, map_inputs, select, tensors
from vbdl.types import Inputs


class RowChecks:
    """Puts rows on the posterior's device and their targets in the form that the likelihood needs.

    The network is run once for each shape of a row, to know the shape of its output, and not for every batch.
    """

    def __init__(self, model: Model, seed: int):
        self.model, self.seed, self.device = model, seed, model.device
        self._floating = floating_dtype(model.posterior)
        self._output_shapes: dict[Any, tuple[int, ...]] = {}  # by names, shapes and dtypes of a row

    def __call__(self, x: Inputs, y: Tensor) -> tuple[Inputs, Tensor]:
        """Inputs and targets to train on. Raises ValueError or TypeError that says what is wrong with them."""
        # detached from what made them, like a network whose features they are
        x, y = map_inputs(lambda t: t.detach().to(self.device), x), y.detach().to(self.device)
        check_dtype(x, self._floating)
        names = tuple(x) if isinstance(x, dict) else None
        row = (names, tuple((t.shape[1:], t.dtype) for t in tensors(x)))
        if row not in self._output_shapes:
            self._output_shapes[row] = self._output_shape(take(x, torch.arange(1)))
        return x, self.model.likelihood.check_targets(y, (len(y), *self._output_shapes[row]))

    @torch.no_grad()
    def _output_shape(self, one: Inputs) -> tuple[int, ...]:
        """The shape of the parameters of p(y | x) of a row, found by running one."""
        posterior = self.model.posterior
        was_training = posterior.training
        posterior.eval()
        try:
            posterior.prepare(one)
            draw = select(self.model.entries(torch.arange(1), self.seed), 0)
            return tuple(call(self.model, draw, one).shape[1:])
        except (RuntimeError, IndexError, AssertionError) as error:
            raise cannot_take(one, error) from error
        finally:
            posterior.train(was_training)
