"""Checks of rows before training: the network, the likelihood and a predictor must take them."""

import torch
from torch import Tensor

from vbdl.calling.inputs import flatten, map_inputs, tensors
from vbdl.calling.stacking import call, select
from vbdl.data.rows import cannot_take, check_dtype, floating_dtype, take
from vbdl.engine.predictor import Predictor
from vbdl.model import Model
from vbdl.types import Inputs, Likelihood, Posterior, before_training


def check_predictable(posterior: Posterior, likelihood: Likelihood, x: Inputs) -> None:
    """Raise the error that a predictor of this posterior would raise for rows like these.

    A predictor refuses a network that cannot be traced, mixes rows, draws from torch's generator or returns no tensor,
    and one whose output is the same for all draws. The check builds a predictor's first execution, uncompiled, with
    two rows and two draws, on a copy of the posterior.
    """
    # only the draws of all members reach every one of several architectures
    n_samples = None if len(posterior.parts) > 1 else min(2, posterior.n_draws or 2)
    with before_training(), torch.inference_mode(False):  # a predictor's tensors may be differentiated
        # the first and the last row, which mostly differ: equal rows would hide that the network mixes rows
        few = take(x, torch.tensor([0, tensors(x)[0].shape[0] - 1]))
        Predictor(posterior, likelihood, n_samples, compile=False, tiles=2).explain(few)


class RowChecks:
    """A callable that checks rows, moves them to the posterior's device, and converts targets for the likelihood.

    The network runs once per shape of a row, to find the shape of its output, not once per batch; `check_predictable`
    checks the first rows.
    """

    def __init__(self, model: Model, seed: int):
        self.model, self.seed, self.device = model, seed, model.device
        self._floating = floating_dtype(model.posterior)
        self._output_shapes: dict[tuple, tuple[int, ...]] = {}  # by structure, shapes and dtypes of a row

    def __call__(self, x: Inputs, y: Tensor) -> tuple[Inputs, Tensor]:
        """The inputs and targets to train on. Raises ValueError or TypeError for rows that cannot be trained on."""
        # detached from the graph that computed them, e.g. of a network whose features they are
        x, y = map_inputs(lambda t: t.detach().to(self.device), x), y.detach().to(self.device)
        check_dtype(x, self._floating)
        flat = flatten(x)
        row = (flat.structure, tuple((t.shape[1:], t.dtype) for t in flat.tensors))
        if row not in self._output_shapes:
            if not self._output_shapes:
                check_predictable(self.model.posterior, self.model.likelihood, x)
            self._output_shapes[row] = self._output_shape(take(x, torch.arange(1)))
        return x, self.model.likelihood.check_targets(y, (len(y), *self._output_shapes[row]))

    @torch.no_grad()
    def _output_shape(self, one: Inputs) -> tuple[int, ...]:
        """The shape of the parameters of p(y | x) for one row, found by running the network on it."""
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
