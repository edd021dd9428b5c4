"""Checks of rows before anything is trained on them: by the network, the likelihood, and a predictor of both."""

from typing import Any

import torch
from torch import Tensor

from vbdl.calling.stacking import call, map_inputs, select, tensors
from vbdl.data.rows import cannot_take, check_dtype, floating_dtype, take
from vbdl.engine.predictor import Predictor
from vbdl.model import Model
from vbdl.types import Inputs, Likelihood, Posterior


def check_predictable(posterior: Posterior, likelihood: Likelihood, x: Inputs) -> None:
    """Raise the error that a predictor of this posterior raises for rows like these.

    That is for a network that cannot be traced, mixes rows, draws from torch's generator or returns no tensor, and for
    one whose output nothing random reaches. The predictor's first execution is built for it, uncompiled, of two rows
    and two draws, on a copy of the posterior.
    """
    # of different architectures every one is looked at, which takes the draws of all members
    n_samples = None if len(posterior.parts) > 1 else min(2, posterior.n_draws or 2)
    with torch.inference_mode(False):  # a predictor is made of tensors that may be differentiated
        # two rows that differ, as the first and the last one mostly do: each is held against a batch of the other
        few = take(x, torch.tensor([0, tensors(x)[0].shape[0] - 1]))
        Predictor(posterior, likelihood, n_samples, compile=False, tiles=2).explain(few)


class RowChecks:
    """Puts rows on the posterior's device and their targets in the form that the likelihood needs.

    The network is run once for each shape of a row, to know the shape of its output, and not for every batch; the first
    rows are also checked by `check_predictable`.
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
            if not self._output_shapes:
                check_predictable(self.model.posterior, self.model.likelihood, x)
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
