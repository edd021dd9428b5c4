"""One training step, the forward and backward pass and the updates of buffers, compiled once per batch shape."""

import logging
import time
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from vbdl.calling.graphs import in_words, recorded
from vbdl.calling.inputs import flatten, rebuild
from vbdl.calling.stacking import call, state_of
from vbdl.compiling.compiler import compile_graph
from vbdl.compiling.graph import trace
from vbdl.nn import drawn
from vbdl.types import Inputs, Likelihood, Posterior

logger = logging.getLogger("vbdl")


class Losses(nn.Module):
    """Posterior and likelihood as one module, whose forward returns the loss of each member, (members,), nats per row.

    own: whether each member has its own batch.
    """

    def __init__(self, posterior: Posterior, likelihood: Likelihood, own: bool):
        super().__init__()
        self.posterior, self.likelihood, self._own = posterior, likelihood, own

    def forward(self, x: Inputs, y: Tensor) -> Tensor:
        return self.posterior.losses(x, y, self.likelihood, self._own)


class Step:
    """A callable that computes the losses of a batch and puts their gradients in the parameters' `grad`."""

    def __init__(self, losses: Losses, compiled: bool):
        self.losses, self.compiled = losses, compiled
        self.trained = {n: p for n, p in losses.named_parameters() if p.requires_grad}
        if not self.trained:
            raise ValueError("nothing to train: no parameter of the posterior or the likelihood requires a gradient")
        self.compile_seconds = 0.0
        self._calls: dict[tuple, Callable] = {}

    def __call__(self, x: Inputs, y: Tensor) -> Tensor:
        """The loss of each member before the optimizer's step, (members,), nats per row."""
        if not self.compiled:
            return self._plain(x, y)
        fixed = {n: t for n, t in state_of(self.losses).items() if n not in self.trained}
        inputs = flatten(x)
        flat = [*(p.detach() for p in self.trained.values()), *fixed.values(), *inputs.tensors, y]
        key = (inputs.structure, tuple((tuple(t.shape), t.dtype) for t in [*inputs.tensors, y]))
        if key not in self._calls:
            begun = time.perf_counter()
            traced = self._traced(self._whole(list(fixed), x), flat)
            if traced is None:
                self.compiled = False
                return self._plain(x, y)
            self._calls[key] = compile_graph(traced, flat)
            self.compile_seconds += time.perf_counter() - begun
        with torch.no_grad():
            losses, *gradients = self._calls[key](*flat)
        for p, gradient in zip(self.trained.values(), gradients, strict=True):
            # a fused optimizer reads the gradient in memory order and assumes the parameter's layout
            p.grad = gradient if gradient.stride() == p.stride() else torch.empty_like(p).copy_(gradient)
        return losses

    def _plain(self, x: Inputs, y: Tensor) -> Tensor:
        losses = self.losses(x, y)
        losses.sum().backward()
        return losses.detach()

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
