"""One training step: the forward and backward pass and the updates of buffers, traced and compiled per batch shape."""

import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from vbdl.calling.attributes import Attributes
from vbdl.calling.copies import numbers_kept_by
from vbdl.calling.graphs import in_words, recorded
from vbdl.calling.inputs import TENSOR, flatten, rebuild
from vbdl.calling.stacking import call
from vbdl.calling.traversing import state_of
from vbdl.compiling.graph import trace
from vbdl.compiling.products import faster_products
from vbdl.nn import drawn
from vbdl.nn.objective import StepOptions, under_options
from vbdl.nn.part_of_batch import current_part
from vbdl.training.gradients import Use, gradients_like, without_empty_work
from vbdl.training.takeover import Takeover
from vbdl.training.worth import is_worth_tracing, steps_until_compiled
from vbdl.types import Inputs, Json, Likelihood, Posterior, State

logger = logging.getLogger("vbdl")


@dataclass
class _Code:
    """The code of the steps of one batch shape, and how each of the gradients that it returns may be used."""

    call: Takeover | fx.GraphModule
    uses: list[Use]


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
        return self.computed(lambda: self.posterior.losses(x, y, self.likelihood, self._own))

    def computed(self, losses_of: Callable[[], Tensor]) -> Tensor:
        """The losses that a function computes with its network run under the options of the training."""
        if self._options is None:
            return losses_of()
        with under_options(self._options):
            losses = losses_of()
        if not self._options.used:
            raise ValueError(
                f"{type(self.posterior).__name__} computes its losses without vbdl.nn.objective.Objective, which runs "
                f"networks in a lower precision and adds the losses of auxiliary outputs: leave precision= and "
                f"auxiliary= out"
            )
        return losses


class _Counts(Exception):
    """The network changes a number in an attribute at every step."""


class Step:
    """A callable that computes the losses of a batch and puts their gradients in the parameters' `grad`.

    compiled: whether to compile the step before it runs; None to decide for each batch shape by the number of its
        steps: for few the step runs as Python code, for more it is traced, and if that repays the time, it is compiled
        in the background, to take over at a step that depends on nothing but this number and the graph. So the same
        training gives the same bits.
    expected: the number of steps of the training with batches of as many rows.
    number: of the next step, counted from the beginning of the training. runs: of the traced graph for each step.
    """

    runs = 1

    def __init__(self, losses: Losses, compiled: bool | None, expected: Callable[[int], int] = lambda rows: 0):
        self.losses, self.compiled, self._expected = losses, compiled, expected
        self.trained = {n: p for n, p in losses.named_parameters() if p.requires_grad}
        if not self.trained:
            raise ValueError("nothing to train: no parameter of the posterior or the likelihood requires a gradient")
        self.compile_seconds = 0.0  # that training waited for
        self.number = 0
        self._codes: dict[tuple, _Code | None] = {}  # of each batch shape; None: runs as Python code
        self._begun: dict[str, int] = {}  # the number of the first step of each batch shape
        self._ones: Tensor | None = None  # (members,)
        self._state: tuple[list[Tensor], list[int]] | None = None  # the tensors of a call, and where they lie

    def __call__(self, x: Inputs, y: Tensor) -> Tensor:
        """The loss of each member before the optimizer's step, (members,), nats per row."""
        result = self._run(x, y)
        if result is None:
            return self._plain(x, y)
        losses, gradients = result
        for p, gradient in zip(self.trained.values(), gradients, strict=True):
            p.grad = gradient
        return losses

    def begin_epoch(self) -> None:
        """Look up the tensors of the state again, which a posterior may have replaced after an epoch."""
        self._state = None

    def end(self) -> None:
        """Leave out what is still to be compiled."""
        for code in self.taking_over():
            code.cancel()

    def progress(self) -> Json:
        """What a checkpoint holds for a resumed training to run the same code at the same steps."""
        return {"steps": self.number, "begun": self._begun}

    def resume(self, progress: Json) -> None:
        """Go on from the progress that a checkpoint holds."""
        self.number, self._begun = progress["steps"], dict(progress["begun"])

    def is_traced(self, y: Tensor) -> bool:
        """Return whether steps with batches of so many targets as these are traced as graphs."""
        return bool(self.compiled) or (self.compiled is None and is_worth_tracing(self._steps_with(y)))

    def _steps_with(self, y: Tensor) -> int:
        """The number of steps of the whole training with batches of as many rows."""
        part = current_part()
        return self._expected(self._rows(y) if part is None else part.total)

    def taking_over(self) -> list[Takeover]:
        """The code of each batch shape that takes over, or has."""
        return [code.call for code in self._codes.values() if code is not None and isinstance(code.call, Takeover)]

    @property
    def compiler_seconds(self) -> float:
        """The seconds that the compiler took in the background, so far."""
        return sum(code.seconds for code in self.taking_over())

    def _run(self, x: Inputs, y: Tensor) -> tuple[Tensor, list[Tensor | None]] | None:
        """The losses of a batch and their gradients, of a traced step; None if it runs as Python code.

        A parameter that the losses do not depend on has no gradient, as after backward().
        """
        number, self.number = self.number, self.number + 1
        if self.compiled is False:
            return None
        if isinstance(x, Tensor):
            structure, inputs = TENSOR, (x,)
        else:
            structure, inputs = (flat := flatten(x)).structure, flat.tensors
        key = (structure, current_part(), y.shape, y.dtype, *((t.shape, t.dtype) for t in inputs))
        if key not in self._codes:
            begun = time.perf_counter()
            self._codes[key] = self._made(x, y, self._begun.setdefault(repr(key), number))
            self.compile_seconds += time.perf_counter() - begun
        if (code := self._codes[key]) is None:
            return None
        run = code.call
        if isinstance(run, Takeover):
            begun = time.perf_counter()
            run = run.of_step(number)
            self.compile_seconds += time.perf_counter() - begun
        with torch.no_grad():
            losses, *gradients = run(*self._tensors(), *inputs, y)
        for index, (p, use) in enumerate(zip(self.trained.values(), code.uses, strict=True)):
            gradients[index] = None if use is Use.NONE else like_parameter(gradients[index], p, use is Use.TWICE)
        return losses, gradients

    def _tensors(self) -> list[Tensor]:
        """The trained entries and the fixed ones, as the traced step takes them."""
        parameters = self.trained.values()
        places = [p.data_ptr() for p in parameters]  # an optimizer may replace a parameter's data
        if self._state is None or self._state[1] != places:
            self._state = [*(p.detach() for p in parameters), *self._fixed().values()], places
        return self._state[0]

    def _fixed(self) -> dict[str, Tensor]:
        return {n: t for n, t in state_of(self.losses).items() if n not in self.trained}

    def _rows(self, y: Tensor) -> int:
        return self.losses.rows(y)

    def _losses_of(self, state: State, inputs: Inputs, targets: Tensor) -> Tensor:
        """The losses of a batch with these trained and fixed entries."""
        return call(self.losses, state, (inputs, targets))

    def _plain(self, x: Inputs, y: Tensor) -> Tensor:
        for p in self.trained.values():
            p.grad = None
        losses = self.losses(x, y)
        if self._ones is None or self._ones.shape != losses.shape:
            self._ones = torch.ones_like(losses)
        torch.autograd.backward(losses, self._ones)  # of their sum, without an operation for it
        return losses.detach()

    def _made(self, x: Inputs, y: Tensor, number: int) -> "_Code | None":
        """How steps with such a batch run, of which the first has this number; None: as Python code."""
        if not self.is_traced(y):
            return None
        flat = [*self._tensors(), *flatten(x).tensors, y]
        graph = self._traced(self._whole(x), flat)
        if graph is None:
            self.compiled = False
            return None
        without_empty_work(graph)
        uses = gradients_like(graph, list(self.trained.values()))
        until = 0 if self.compiled else steps_until_compiled(graph, self._steps_with(y), self.runs)
        faster_products(graph)
        return _Code(graph if until is None else Takeover(graph, flat, number + until), uses)

    def _traced(self, whole: Callable[..., tuple[Tensor, ...]], flat: list[Tensor]) -> fx.GraphModule | None:
        """The graph of the step, or None, after logging a warning, if the network cannot be traced."""
        networks = [part.module for part in self.losses.posterior.parts]
        numbers = [numbers_kept_by(network) for network in networks]
        kept = contextlib.ExitStack()
        for network in networks:
            kept.enter_context(Attributes(network).kept())
        try:
            graph = self._trace(whole, flat)
            if numbers != (after := [numbers_kept_by(network) for network in networks]):  # or the first forward sets it
                graph = self._trace(whole, flat)
                if after != [numbers_kept_by(network) for network in networks]:
                    raise _Counts  # in the graph the numbers would stay what they were
            return graph
        except Exception as error:  # torch raises many types of errors for a graph that depends on values
            counts = "the network changes a number in an attribute at every step, such as a count of steps"
            reason = counts if isinstance(error, _Counts) else in_words(error)
            logger.warning("the training step cannot be compiled and runs uncompiled, which is slower: %s", reason)
            return None
        finally:
            kept.close()

    def _trace(self, whole: Callable[..., tuple[Tensor, ...]], flat: list[Tensor]) -> fx.GraphModule:
        if any(p.device.type in drawn.DEVICES for p in self.trained.values()):
            # differentiate before `trace` removes mutations: no kernel has a gradient under `functionalize`
            with recorded():
                whole = make_fx(whole, tracing_mode="fake", _allow_non_fake_inputs=True)(*flat)
        return trace(whole, *flat, aligned=False)

    def _whole(self, like: Inputs) -> Callable[..., tuple[Tensor, ...]]:
        """A function from the flat list (trained entries, fixed entries, inputs, targets) to (losses, *gradients)."""
        count, fixed = len(self.trained), list(self._fixed())

        def whole(*flat: Tensor) -> tuple[Tensor, ...]:
            *entries, targets = flat
            inputs = rebuild(like, entries[count + len(fixed) :])

            # entries that the step changes (running statistics, counters) must be arguments of the function that
            # torch.func.grad differentiates
            def total(trained: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
                state = dict(zip([*self.trained, *fixed], [*trained, *others], strict=True))
                losses = self._losses_of(state, inputs, targets)
                return losses.sum(), losses

            trained, others = tuple(entries[:count]), tuple(entries[count : count + len(fixed)])
            gradients, losses = torch.func.grad(total, has_aux=True)(trained, others)
            return (losses, *gradients)

        return whole


def like_parameter(gradient: Tensor | None, p: Tensor, copied: bool = False) -> Tensor | None:
    """A gradient in the memory layout of its parameter, as it is where it has that, unless it is to be copied.

    A fused optimizer reads the gradient in memory order and assumes the parameter's layout.
    """
    if gradient is None or not copied and gradient.stride() == p.stride():
        return gradient
    return torch.empty_like(p).copy_(gradient)
