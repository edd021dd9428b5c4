"""One training step, the forward and backward pass and the updates of buffers, compiled once per batch shape."""

import logging
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from vbdl.calling.graphs import in_words, recorded
from vbdl.calling.inputs import TENSOR, flatten, rebuild
from vbdl.calling.stacking import call, state_of
from vbdl.compiling.compiler import compile_graph
from vbdl.compiling.graph import trace
from vbdl.nn import drawn
from vbdl.nn.objective import StepOptions, under_options
from vbdl.nn.part_of_batch import current_part
from vbdl.training.gradients import Use, gradients_like, without_empty_work
from vbdl.training.worth import is_worth_compiling, is_worth_tracing
from vbdl.types import Inputs, Likelihood, Posterior

logger = logging.getLogger("vbdl")

Call = Callable[..., Sequence[Tensor]]


class Losses(nn.Module):
    """Posterior and likelihood as one module, whose forward returns the loss of each member, (members,), nats per row.

    own: whether each member has its own batch. options: how the networks run, if not simply as they are.
    """

    def __init__(self, posterior: Posterior, likelihood: Likelihood, own: bool, options: StepOptions | None = None):
        super().__init__()
        self.posterior, self.likelihood, self._own, self._options = posterior, likelihood, own, options

    def rows(self, y: Tensor) -> int:
        """The number of rows of a batch of these targets; those of one member if each has its own."""
        return y.shape[1] if self._own else y.shape[0]

    def forward(self, x: Inputs, y: Tensor) -> Tensor:
        if self._options is None:
            return self.posterior.losses(x, y, self.likelihood, self._own)
        with under_options(self._options):
            losses = self.posterior.losses(x, y, self.likelihood, self._own)
        if not self._options.used:
            raise ValueError(
                f"{type(self.posterior).__name__} computes its losses without vbdl.nn.objective.Objective, which runs "
                f"networks in a lower precision and adds the losses of auxiliary outputs: leave precision= and "
                f"auxiliary= out"
            )
        return losses


class Step:
    """A callable that computes the losses of a batch and puts their gradients in the parameters' `grad`.

    compiled: whether to compile the step; None to decide for each batch shape by the number of its steps: for few the
        step runs as Python code, for more it is traced, and compiled if that repays the time. The choice depends on
        nothing but this number and the graph, so that the same training gives the same bits.
    expected: the number of steps of the training with batches of as many rows.
    """

    def __init__(self, losses: Losses, compiled: bool | None, expected: Callable[[int], int] = lambda rows: 0):
        self.losses, self.compiled, self._expected = losses, compiled, expected
        self.trained = {n: p for n, p in losses.named_parameters() if p.requires_grad}
        if not self.trained:
            raise ValueError("nothing to train: no parameter of the posterior or the likelihood requires a gradient")
        self.compile_seconds = 0.0
        self._calls: dict[tuple, tuple[Call, list[Use]] | None] = {}  # None: runs as Python code
        self._ones: Tensor | None = None  # (members,)
        self._state: tuple[list[Tensor], list[int]] | None = None  # the tensors of a call, and where they lie

    def __call__(self, x: Inputs, y: Tensor) -> Tensor:
        """The loss of each member before the optimizer's step, (members,), nats per row."""
        if self.compiled is False:
            return self._plain(x, y)
        if isinstance(x, Tensor):
            structure, inputs = TENSOR, (x,)
        else:
            structure, inputs = (flat := flatten(x)).structure, flat.tensors
        key = (structure, current_part(), y.shape, y.dtype, *((t.shape, t.dtype) for t in inputs))
        if key not in self._calls:
            begun = time.perf_counter()
            self._calls[key] = self._made(x, y)
            self.compile_seconds += time.perf_counter() - begun
        if (made := self._calls[key]) is None:
            return self._plain(x, y)
        run, uses = made
        with torch.no_grad():
            losses, *gradients = run(*self._tensors(), *inputs, y)
        for p, gradient, use in zip(self.trained.values(), gradients, uses, strict=True):
            # a fused optimizer reads the gradient in memory order and assumes the parameter's layout
            if use is Use.TWICE or gradient.stride() != p.stride():
                gradient = torch.empty_like(p).copy_(gradient)
            p.grad = None if use is Use.NONE else gradient  # like backward(), which leaves the others without one
        return losses

    def begin_epoch(self) -> None:
        """Look up the tensors of the state again, which a posterior may have replaced after an epoch."""
        self._state = None

    def _tensors(self) -> list[Tensor]:
        """The trained entries and the fixed ones, as the compiled step takes them."""
        parameters = self.trained.values()
        places = [p.data_ptr() for p in parameters]  # an optimizer may replace a parameter's data
        if self._state is None or self._state[1] != places:
            self._state = [*(p.detach() for p in parameters), *self._fixed().values()], places
        return self._state[0]

    def _fixed(self) -> dict[str, Tensor]:
        return {n: t for n, t in state_of(self.losses).items() if n not in self.trained}

    def _plain(self, x: Inputs, y: Tensor) -> Tensor:
        for p in self.trained.values():
            p.grad = None
        losses = self.losses(x, y)
        if self._ones is None or self._ones.shape != losses.shape:
            self._ones = torch.ones_like(losses)
        torch.autograd.backward(losses, self._ones)  # of their sum, without an operation for it
        return losses.detach()

    def _made(self, x: Inputs, y: Tensor) -> tuple[Call, list[Use]] | None:
        """The call of a step with such a batch, and how each of the gradients that it returns may be used.

        None if it runs as Python code.
        """
        part = current_part()
        steps = self._expected(self.losses.rows(y) if part is None else part.total)
        if self.compiled is None and not is_worth_tracing(steps):
            return None
        flat = [*self._tensors(), *flatten(x).tensors, y]
        graph = self._traced(self._whole(list(self._fixed()), x), flat)
        if graph is None:
            self.compiled = False
            return None
        without_empty_work(graph)
        uses = gradients_like(graph, list(self.trained.values()))
        if self.compiled or is_worth_compiling(graph, steps):
            return compile_graph(graph, flat, whole=True), uses
        return graph, uses

    def _traced(self, whole: Callable[..., tuple[Tensor, ...]], flat: list[Tensor]) -> fx.GraphModule | None:
        """The graph of the step, or None, after logging a warning, if the network cannot be traced."""
        try:
            return self._trace(whole, flat)
        except Exception as error:  # torch raises many types of errors for a graph that depends on values
            logger.warning(
                "the training step cannot be compiled and runs uncompiled, which is slower: %s", in_words(error)
            )
            return None

    def _trace(self, whole: Callable[..., tuple[Tensor, ...]], flat: list[Tensor]) -> fx.GraphModule:
        if any(p.device.type in drawn.DEVICES for p in self.trained.values()):
            # differentiate before `trace` removes mutations: no kernel has a gradient under `functionalize`
            with recorded():
                whole = make_fx(whole, tracing_mode="fake", _allow_non_fake_inputs=True)(*flat)
        return trace(whole, *flat, aligned=False)

    def _whole(self, fixed: list[str], like: Inputs) -> Callable[..., tuple[Tensor, ...]]:
        """A function from the flat list (trained entries, fixed entries, inputs, targets) to (losses, *gradients)."""
        count = len(self.trained)

        def whole(*flat: Tensor) -> tuple[Tensor, ...]:
            *entries, targets = flat
            inputs = rebuild(like, entries[count + len(fixed) :])

            # entries that the step changes (running statistics, counters) must be arguments of the function that
            # torch.func.grad differentiates
            def total(trained: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
                state = dict(zip([*self.trained, *fixed], [*trained, *others], strict=True))
                losses = call(self.losses, state, (inputs, targets))
                return losses.sum(), losses

            trained, others = tuple(entries[:count]), tuple(entries[count : count + len(fixed)])
            gradients, losses = torch.func.grad(total, has_aux=True)(trained, others)
            return (losses, *gradients)

        return whole
