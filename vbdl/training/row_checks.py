"""Checks of rows before training: the network, the likelihood and a predictor must take them."""

import torch
from torch import Tensor

from vbdl.calling.inputs import flatten, map_inputs, tensors
from vbdl.calling.stacking import call, select
from vbdl.data.rows import cannot_take, check_dtype, check_finite, floating_dtype, take, unknown_argument
from vbdl.engine.predictor import Predictor
from vbdl.engine.taken import takes
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


_AS_THEY_ARE = {torch.int32, torch.int64, torch.bool}  # dtypes of indices and masks


class RowChecks:
    """A callable that checks rows, moves them to the posterior's device, and converts targets for the likelihood.

    The network runs once per shape of a row, to find the shape of its output, not once per batch; `check_predictable`
    checks the first rows.
    """

    def __init__(self, model: Model, seed: int):
        self.model, self.seed, self.device = model, seed, model.device
        self._floating = floating_dtype(model.posterior)
        # the dtype of integers that are no indices as they are, of rows in files; None: unknown
        self._integers: torch.dtype | None = None
        self._output_shapes: dict[tuple, tuple[int, ...]] = {}  # by structure, shapes and dtypes of a row

    def __call__(self, x: Inputs, y: Tensor, converts: bool = False) -> tuple[Inputs, Tensor]:
        """The inputs and targets to train on. Raises ValueError or TypeError for rows that cannot be trained on.

        converts: convert floating-point numbers to the dtype of the network, and integers of other dtypes than int32
            and int64 to int64, if the network takes those, or else to its dtype. For rows of files, which cannot be
            converted as a whole.
        """
        # detached from the graph that computed them, e.g. of a network whose features they are
        x, y = map_inputs(self._moved, x), self._moved(y)
        if converts:
            x, y = self._converted(x), y.to(self._dtype(y) if y.is_floating_point() else torch.int64)
        flat = flatten(x)
        row = (flat.structure, tuple((t.shape[1:], t.dtype) for t in flat.tensors))
        if row not in self._output_shapes:
            check_dtype(flat.tensors, self._floating, lambda: self._takes(take(x, torch.arange(1))))
            if not self._output_shapes:
                try:
                    check_predictable(self.model.posterior, self.model.likelihood, x)
                except TypeError as error:
                    if (unknown := unknown_argument(x, error)) is None:
                        raise
                    raise unknown from error
            self._output_shapes[row] = self._output_shape(take(x, torch.arange(1)))
        return x, self.model.likelihood.check_targets(y, (len(y), *self._output_shapes[row]))

    def check_finite(self, x: Inputs, first: int = 0) -> None:
        """Raise ValueError for rows of which the network makes no finite numbers; first: the number of the first."""
        check_finite(x, first, lambda rows: self._takes(self._converted(map_inputs(self._moved, rows))))

    def _takes(self, x: Inputs) -> bool:
        """Return whether the network, before it is trained, computes finite numbers from these rows."""
        with before_training(), torch.inference_mode(False):
            return takes(self.model.posterior, self.model.likelihood, flatten(x))

    def too_large(self, x: Inputs) -> bool:
        """Whether the inputs take more than half of the memory that is free on a GPU, so that they stay outside it."""
        outside = [t for t in tensors(x) if t.device != self.device]
        if self.device.type != "cuda" or not outside:
            return False
        free, _ = torch.cuda.mem_get_info(self.device)
        return sum(t.numel() * t.element_size() for t in outside) > free / 2

    def _moved(self, t: Tensor) -> Tensor:
        return t.detach().to(self.device, non_blocking=t.device.type == "cpu" and t.is_pinned())

    def _dtype(self, t: Tensor) -> torch.dtype:
        """The dtype to which a tensor is converted."""
        if t.is_floating_point():
            return self._floating or t.dtype
        return t.dtype if t.dtype in _AS_THEY_ARE or self._integers is None else self._integers

    def _converted(self, x: Inputs) -> Inputs:
        if self._integers is None and any(
            not t.is_floating_point() and t.dtype not in _AS_THEY_ARE for t in tensors(x)
        ):
            self._integers = torch.int64  # as indices have, if the network takes it
            try:
                self._output_shape(self._converted(take(x, torch.arange(1))))
            except ValueError:
                self._integers = self._floating
        return map_inputs(lambda t: t.to(self._dtype(t)), x)

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
