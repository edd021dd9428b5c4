"""Epochs in which the members of an ensemble train one after the other, as in a loop over members.

A member's weights and values then stay in the processor's cache from step to step, which saves more time than stacked
operators do where they are large. Members see the batches, draws and updates of stacked steps.
"""

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn

from vbdl.calling.attributes import Attributes
from vbdl.calling.copies import numbers_kept_by
from vbdl.calling.inputs import map_inputs
from vbdl.calling.stacking import call, caller
from vbdl.calling.traversing import state_of
from vbdl.nn.members import StackedPosterior
from vbdl.nn.objective import training_keys
from vbdl.training.step import Losses, Step
from vbdl.types import Inputs, State

_APART = 1e-3  # relative to a loss: far above rounding errors
_LOSSES = ("vbdl.nn.members", "vbdl.posteriors.ensemble")  # where losses are those of the training objective alone


class MemberStep(Step):
    """A training step of one member, traced and compiled once for all members.

    Its parameters are the member's parts of the stacked ones, by the names of the training objective.
    """

    def __init__(self, losses: Losses, compiled: bool | None, expected: Callable[[int], int]):
        super().__init__(losses, compiled, expected)
        assert isinstance(losses.posterior, StackedPosterior)
        self._posterior, self.runs = losses.posterior, losses.posterior.n_members
        self._member, self._first = 0, 0
        self._one: Tensor | None = None

    def begin_epoch(self) -> None:
        self._objective, state, self._shared = self._posterior.objective(self.losses.likelihood)
        del state["key"]
        self._stacked = {n: t for n, t in state.items() if t.requires_grad}
        self._buffers = {n: t for n, t in state.items() if not t.requires_grad}
        self._run_objective = caller(self._objective, [*self._shared, *state, "key"])
        self._keys: list[tuple[Tensor, ...]] = []  # of the epoch's steps, (2,) for each member
        self._first = self.number

    def begin(self, member: int) -> None:
        """Let the next steps train this member, from the first step of the epoch on."""
        self._member, self.number = member, self._first
        self.trained = {n: nn.Parameter(t.detach()[member]) for n, t in self._stacked.items()}
        self._others = {n: t.detach()[member] for n, t in self._buffers.items()} | self._shared
        self._flat = [t.detach() for t in (*self.trained.values(), *self._others.values())]

    def end_epoch(self) -> None:
        """Count the epoch's steps, from which the draws of the next ones follow."""
        with torch.no_grad():
            self._posterior.steps.add_(self.number - self._first)

    def gradients(self, x: Inputs, y: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """The loss of the member on its batch, (), in nats per row, and its gradients by the ids of the stacked ones.

        A parameter that the loss does not depend on has a gradient of zero, as one that other members use in their
        batches has it in a stacked step.
        """
        self._index = self.number - self._first
        if self._index == len(self._keys):
            q = self._posterior
            keys = training_keys(q.seed, q.n_members, (q.steps + self._index) * q.n_samples)
            self._keys.append(keys.unbind(0))
        loss, gradients = self._run(x, y) or self._differentiated(x, y)
        each = zip(self._stacked.values(), self.trained.values(), gradients, strict=True)
        return loss, {id(p): torch.zeros_like(own) if g is None else g for p, own, g in each}

    def _key(self) -> Tensor:
        """The key of the current step, (2,)."""
        return self._keys[self._index][self._member]

    def _differentiated(self, x: Inputs, y: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """The loss and its gradients, run as Python code."""
        state = {**self._others, **self.trained, "key": self._key()}
        loss = self.losses.computed(lambda: self._run_objective(state, (x, y)))
        parameters = self.trained.values()
        for p in parameters:
            p.grad = None
        if self._one is None:
            self._one = torch.ones_like(loss)
        # not autograd.grad: gradients that are accumulated have the parameter's layout, and memory of their own
        torch.autograd.backward(loss, self._one)
        return loss.detach(), [p.grad for p in parameters]

    # -- what is traced

    def _tensors(self) -> list[Tensor]:
        return [*self._flat, self._key()]

    def _fixed(self) -> State:
        return {**self._others, "key": self._key()}

    def _rows(self, y: Tensor) -> int:
        return y.shape[0]

    def _losses_of(self, state: State, inputs: Inputs, targets: Tensor) -> Tensor:
        return self.losses.computed(lambda: self._run_objective(state, (inputs, targets)))


def trains_in_turn(
    losses: Losses, x: Inputs, y: Tensor, trained: Mapping[str, Tensor], by_member: Collection[str], traced: bool
) -> bool:
    """Whether members train one after the other: they do not interact, and it is faster than stacked steps.

    x, y: the first batch of each member, (members, ...). trained: the parameters in training, by name. by_member: names
    of tensors with a leading members axis. traced: whether steps are traced.
    """
    posterior = losses.posterior
    if not isinstance(posterior, StackedPosterior) or posterior.n_members < 2:
        return False
    if not posterior.runs_in_turn((x, y), traced):
        return False
    if type(posterior).losses.__module__ not in _LOSSES or not all(name in by_member for name in trained):
        return False
    return _is_of_members_alone(losses, x, y, by_member)


def _is_of_members_alone(losses: Losses, x: Inputs, y: Tensor, by_member: Collection[str]) -> bool:
    """Whether the losses are those of the training objective, depend on all parameters, write to no buffer that members
    share and to no number in an attribute, and draw nothing from torch's generators: numbers would depend on the order
    of the members.

    Computes the losses of a batch on copies of the tensors, for all members and for the first.
    """
    posterior = losses.posterior
    assert isinstance(posterior, StackedPosterior)
    state = {n: t.detach().clone().requires_grad_(t.requires_grad) for n, t in state_of(losses).items()}
    objective, of_members, shared = posterior.objective(losses.likelihood)
    first = {n: t.detach()[0].clone() for n, t in of_members.items()} | {n: t.clone() for n, t in shared.items()}
    one = map_inputs(lambda t: t[0], x), y[0]
    cuda = [y.device] if y.device.type == "cuda" else []
    generators = lambda: [torch.get_rng_state(), *map(torch.cuda.get_rng_state, cuda)]
    shared_buffers = {n: t._version for n, t in state.items() if not t.requires_grad and n not in by_member}
    numbers = numbers_kept_by(posterior.module)
    with Attributes(posterior.module).kept(), torch.random.fork_rng(devices=cuda):
        before = generators()
        each = call(losses, state, (x, y))
        mixed = any(state[n]._version != v for n, v in shared_buffers.items() if n != "posterior.steps")
        used = torch.autograd.grad(each.sum(), [t for t in state.values() if t.requires_grad], allow_unused=True)
        alone = losses.computed(lambda: call(objective, first, one))
        drawn = not all(map(torch.equal, before, generators()))
        counts = numbers != numbers_kept_by(posterior.module)
    posterior.begin_turns()
    return (
        not (drawn or mixed or counts)
        and all(g is not None for g in used)
        and torch.allclose(each[0], alone, rtol=_APART, atol=_APART)
    )
