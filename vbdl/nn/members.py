"""Posteriors of several networks of one architecture: what differs between them is stacked, the rest is held once."""

import contextlib
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vbdl.calling.apart import Apart, Source
from vbdl.calling.attributes import OfMembers
from vbdl.calling.closures import check_held, tensors_held
from vbdl.calling.each import losses_of_each
from vbdl.calling.inputs import tensors
from vbdl.calling.lending import only_reading
from vbdl.calling.mapping import can_map, why_not_mapped
from vbdl.calling.stacking import call_stacked, is_of_a_trace, places_of, without_dots
from vbdl.calling.traversing import modules_of, parameters_of
from vbdl.data.rows import kept_tensor
from vbdl.data.tiles import aligned
from vbdl.model import Model
from vbdl.nn.frozen import hold_frozen
from vbdl.nn.may_drop import runs_code_of_others
from vbdl.nn.objective import Objective, training_keys
from vbdl.types import Inputs, Likelihood, Posterior, State

_BYTES_TOGETHER = 2**23  # of the batches of all members
# of a typical value of one member: with more, stacking loses more time by values that leave the processor's cache than
# it saves by fewer calls of operators (`python benchmarks/training.py`, "vbdl-uncompiled")
_BYTES_OF_A_VALUE = 2**17
_UNCOMPILED = 0.625  # the same of values and parameters, as a part of that, for steps that run as Python code


class StackedPosterior(Posterior):
    """A posterior that is an equal mixture of members, networks of one architecture.

    The parameters and buffers in which members differ are stacked, (members, ...) each; all others are held once. A
    subclass calls `_hold`, and sets `n_members`, `n_draws`, `seed` and `output`.

    seed: of dropout in training; member m uses seed + m. steps: () int64 buffer, the number of training steps so far.
    """

    seed: int
    steps: Tensor
    one_by_one: str | None = None  # None: unknown
    _turns: OfMembers | None = None  # the attributes of the network in the turn of each member, in training
    _large = False  # whether one member's values are so large that traced steps run one member after the other
    _large_uncompiled = False  # the same of values and parameters, for steps that run as Python code
    n_samples: int = 1  # draws of a member per training step, averaged
    _parameter_names: tuple[str, ...] = ()  # of those that differ between members; none with several architectures
    _buffer_names: tuple[str, ...] = ()

    def _hold(
        self,
        network: nn.Module,
        stacked: State,
        shared: State,
        trained: Collection[str],
        apart: Mapping[str, list[Tensor]] = MappingProxyType({}),
    ) -> None:
        """Register the members' tensors as parameters and buffers.

        network: the members' common module, with placeholders on the meta device for tensors. stacked: (members, ...)
        each. shared: all its other parameters and buffers. trained: names of the parameters that require a gradient.
        apart: parameters that are not stacked yet, one tensor for each member.
        """
        # structure only, in a tuple so that it is not registered: all parameters and buffers are in the stacks
        self._structure: tuple[Any] = (network,)
        parameters = parameters_of(network).keys()
        self.stacked_parameters = nn.Module()  # a ParameterDict cannot hold a parameter named "values"
        self.stacked_buffers = nn.Module()
        self.held_once = nn.Module()
        for name, tensor in stacked.items():
            if name in parameters:
                parameter = nn.Parameter(tensor.detach(), name in trained)
                self.stacked_parameters.register_parameter(without_dots(name), parameter)
            else:
                self.stacked_buffers.register_buffer(without_dots(name), tensor.detach())
        for name, tensor in shared.items():
            if name in parameters:
                parameter = nn.Parameter(tensor.detach().clone(), name in trained)
                self.held_once.register_parameter(without_dots(name), parameter)
            else:
                self.held_once.register_buffer(without_dots(name), tensor.detach().clone())
        self._shared_names = tuple(shared)
        self._parameter_names = tuple(n for n in parameters if n in stacked or n in apart)
        self._buffer_names = tuple(n for n in stacked if n not in parameters)
        if apart:
            owner, held = self.stacked_parameters, self.stacked_parameters._parameters
            tensors = {without_dots(n): held.get(without_dots(n)) for n in self._parameter_names}
            source = Source({without_dots(n): tensors for n, tensors in apart.items()})
            vars(owner)["_parameters"] = Apart(tensors, owner, source, {without_dots(n) for n in trained})
        self._link()
        device = next(iter(stacked.values())).device
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=device))

    @property
    def module(self) -> nn.Module:
        """The members' common module, with placeholders for the tensors in which they differ."""
        return self._structure[0]

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if mode or any(m.training for _, m in modules_of(self._structure[0])):  # as it takes long where nothing changes
            self._structure[0].train(mode)
        if mode:
            hold_frozen(self._structure[0])
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._link()
        return self

    def _link(self) -> None:
        """Put the shared tensors into the module that is called."""
        network = self._structure[0]
        places = places_of(network)
        for name, t in self.shared().items():
            for place in places[name]:
                prefix, _, leaf = place.rpartition(".")
                owner = network.get_submodule(prefix)
                tensors: dict[str, Any] = owner._parameters if isinstance(t, nn.Parameter) else owner._buffers
                tensors[leaf] = t

    def shared(self) -> State:
        """The parameters and buffers that all members share, without a members axis: the tensors, not copies."""
        return {name: getattr(self.held_once, without_dots(name)) for name in self._shared_names}

    def stacked(self) -> State:
        """The parameters and buffers that differ between members, (members, ...) each: the tensors, not copies."""
        parameters = {name: getattr(self.stacked_parameters, without_dots(name)) for name in self._parameter_names}
        buffers = {name: getattr(self.stacked_buffers, without_dots(name)) for name in self._buffer_names}
        return {**parameters, **buffers}

    @property
    def by_member(self) -> frozenset[str]:
        kinds = {"stacked_parameters": self._parameter_names, "stacked_buffers": self._buffer_names}
        return frozenset(f"{kind}.{without_dots(name)}" for kind, names in kinds.items() for name in names)

    def _of_one(self, index: int) -> State:
        """The parameters and buffers of one member that differ between members, (...) each, to read."""
        parameters, buffers = vars(self.stacked_parameters)["_parameters"], vars(self.stacked_buffers)["_buffers"]
        with only_reading():
            if isinstance(parameters, Apart):
                of_one = {name: parameters.of_one(without_dots(name), index) for name in self._parameter_names}
            else:
                of_one = {name: parameters[without_dots(name)][index] for name in self._parameter_names}
            return of_one | {name: buffers[without_dots(name)][index] for name in self._buffer_names}

    @property
    def is_apart(self) -> bool:
        """Whether some parameters are not stacked yet: drawing several members at once would stack them."""
        held = vars(self.stacked_parameters)["_parameters"]
        return isinstance(held, Apart) and any(map(held.is_apart, dict.keys(held)))

    def draws(self, numbers: Tensor, seed: int) -> State:
        """The entries of these samples, (samples, ...) each: sample s is member s % n_members."""
        which = numbers % self.n_members
        first, count = int(which[0]), len(which)
        if count == 1:
            return {name: t.unsqueeze(0) for name, t in StackedPosterior.one_draw(self, first, seed).items()}
        with only_reading():
            stacked = self.stacked()
        if torch.equal(which, torch.arange(first, first + count)):
            return {name: aligned(t[first : first + count]) for name, t in stacked.items()}
        return {name: t.index_select(0, which.to(t.device)) for name, t in stacked.items()}

    def one_draw(self, number: int, seed: int) -> State:
        return {name: aligned(t) for name, t in self._of_one(number % self.n_members).items()}

    def draw_as_laid_out(self, number: int) -> State:
        """The entries of one sample, (...) each, in the memory formats that `lay_out` gave them."""
        return self._of_one(number % self.n_members)

    def lay_out(self, names: Collection[str], layout: torch.memory_format, copying: bool = False) -> bool:
        """Lay out those of these parameters in a memory format that are not stacked, and return whether they are.

        copying: whether to do so even if somebody else holds one of them, so that it takes a second copy.
        """
        held = vars(self.stacked_parameters)["_parameters"]
        apart = {without_dots(name) for name in names if isinstance(held, Apart) and held.is_apart(without_dots(name))}
        return bool(apart) and held.source.lay_out(apart, layout, copying)

    # -- training

    def losses(self, x: Inputs, y: Tensor, likelihood: Likelihood, own_rows: bool = False) -> Tensor:
        """The loss of each member, (members,), in nats per row.

        own_rows: x and y have a leading members axis, one batch per member.
        """
        objective, state, shared = self.objective(likelihood)
        self.steps.add_(1)
        unmapped = not can_map(objective) if self.one_by_one is None else bool(self.one_by_one)
        if unmapped or self._leaves_the_cache((x, y), own_rows):
            turn = contextlib.nullcontext if self._turns is None else self._turns.turn
            return losses_of_each(objective, state, shared, (x, y), inputs_stacked=own_rows, turn=turn)
        return call_stacked(objective, state, shared, (x, y), randomness="different", inputs_stacked=own_rows)

    def begin_turns(self) -> None:
        """Give each member the network's attributes as they are now, for its first turn."""
        self._turns = OfMembers(self.module, self.n_members) if runs_code_of_others(self.module) else None

    def end_turns(self) -> None:
        """Forget the attributes of the members, at the end of a training."""
        self._turns = None

    def runs_in_turn(self, inputs: Inputs, traced: bool) -> bool:
        """Whether members of these batches, (members, ...) each, run one after the other; `before_training` tells.

        traced: whether steps are traced, so that stacked ones cost less.
        """
        return bool(self.one_by_one) or self._leaves_the_cache(inputs, True, traced)

    def _leaves_the_cache(self, inputs: Inputs, own_rows: bool, traced: bool = False) -> bool:
        """Whether what members compute together leaves the processor's cache, so that one after the other is faster.

        A traced step is stacked all the same: compiled, its elementwise operations are fused.
        """
        leaves = tensors(inputs)
        if any(t.device.type != "cpu" or is_of_a_trace(t) for t in leaves):
            return False
        copies = 1 if own_rows else self.n_members
        large = self._large if traced else self._large_uncompiled
        return large or copies * sum(t.numel() * t.element_size() for t in leaves) > _BYTES_TOGETHER

    def objective(self, likelihood: Likelihood) -> tuple[Objective, State, State]:
        """The training objective, its entries that differ between members, (members, ...), and its shared entries.

        The keys among them are those of the next step.
        """
        model = Model(self, likelihood)
        state = model.member_entries()
        shared = model.shared(state)
        state["key"] = training_keys(self.seed, self.n_members, self.steps * self.n_samples)
        return Objective(self.module, likelihood, self.n_samples, self.output), state, shared

    def before_training(self, x: Inputs, y: Tensor, likelihood: Likelihood, own_rows: bool = False) -> None:
        """Find out on the first batch whether members can be trained together under `vmap`.

        Sets `one_by_one` to the reason to train them one by one, or to "" if there is none.
        """
        check_held(self.module, self._parameter_names)
        if any(isinstance(t, nn.Parameter) for _, m in modules_of(self.module) for t in tensors_held(m)):
            raise ValueError(
                "a function that the network holds keeps a parameter itself, so it would not use the one that each "
                "member trains: let it keep the module and read module.weight when it is called"
            )
        objective, state, shared = self.objective(likelihood)
        sizes = _Sizes()
        # batches of a DataLoader may differ in shape, and a resumed training, which begins with another one, must
        # decide alike
        watch = sizes if own_rows and y.device.type == "cpu" else None
        try:
            reason = why_not_mapped(objective, state, shared, (x, y), own_rows, watch)
        except RuntimeError as error:
            if (kept_error := kept_tensor(error)) is None:
                raise
            raise kept_error from error
        self.one_by_one = reason or ""
        self.begin_turns()
        largest = _BYTES_OF_A_VALUE * self.n_members
        self._large = not reason and sizes.typical > largest
        sizes.add([t for t in state.values() if t.requires_grad])
        known = watch is not None and not reason
        self._large_uncompiled = self._large or (known and sizes.typical > _UNCOMPILED * largest)


class _Sizes(TorchDispatchMode):
    """A context that measures the floating-point tensors that operators compute; views are none."""

    def __init__(self):
        super().__init__()
        self._sum, self._of_squares = 0, 0

    @property
    def typical(self) -> float:
        """The mean of their bytes, each weighed by its bytes, so that small tensors beside do not count."""
        return self._of_squares / max(self._sum, 1)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.add([t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()])
        return output

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Add the sizes of these tensors to what is measured."""
        sizes = [t.nbytes for t in tensors]
        self._sum += sum(sizes)
        self._of_squares += sum(size * size for size in sizes)
