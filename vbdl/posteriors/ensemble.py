"""Deep ensembles: several networks trained from different initializations, their parameters stacked.

Lakshminarayanan, Pritzel and Blundell, Simple and Scalable Predictive Uncertainty Estimation using Deep Ensembles,
NeurIPS 2017, https://arxiv.org/abs/1612.01474
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from vbdl.calling.apart import hold_apart
from vbdl.calling.checks import check_network, unwrapped
from vbdl.calling.closures import tensors_held
from vbdl.calling.copies import blueprint, holding
from vbdl.calling.inputs import map_inputs
from vbdl.calling.lending import only_reading
from vbdl.calling.outputs import check_output
from vbdl.calling.traversing import is_sparse, modules_of, parameters_of, state_of
from vbdl.model import Model
from vbdl.nn.architecture import architecture, are_alike, difference, stacks
from vbdl.nn.frozen import frozen_names
from vbdl.nn.initialization import fresh, reset_parameters
from vbdl.nn.members import StackedPosterior
from vbdl.nn.objective import KeyedPosterior
from vbdl.types import Course, Inputs, Likelihood, Output, Posterior, State, TrainingRows, is_posterior


class DeepEnsemble(StackedPosterior):
    """A deep ensemble: q(w) is an equal mixture of the members, whose parameters and buffers are stacked.

    networks: a module, which is copied and initialized anew n_members times, or (trained) modules: a list, or a
        generator like `(load(path) for path in paths)`. Training or changing them later does not change the ensemble:
        they are copied, large parameters when they are next asked for (`vbdl.calling.apart`). The modules may be
        posteriors: an ensemble of dropout or mean-field networks. Modules may differ in architecture; the architectures
        then run one after the other.
    initialize: function that initializes a copy of the module in place; by default what its classes offer
        (`vbdl.nn.initialization`), while frozen parameters (requires_grad=False), like a pretrained backbone, are kept.
        Adapters of peft start as their configuration says: with LoRA, members start as one function, because B is 0,
        and differ in A, so that their first step drives them apart.
    seed: of the initializations and of dropout in training; member m uses seed + m.
    shared: names of parameters and buffers that all members share; by default the frozen parameters, and the buffers
        of frozen layers, that are equal in all members. Layers of shared entries are computed once per batch, and
        shared entries are not trained.
    output: name or index of the network's output to predict from, or a function that returns it, if it returns several;
        "logits" are found without it. Members that are posteriors have their own.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> q = vbdl.DeepEnsemble(net, n_members=5)
    >>> q.n_members, q.member(0)["0.weight"].shape
    (5, torch.Size([8, 4]))
    >>> p = vbdl.Predictor(q, vbdl.Categorical(), compile=False)(torch.randn(7, 4))
    >>> p.probs.shape, p.n_samples
    (torch.Size([7, 3]), 5)
    """

    def __init__(
        self,
        networks: nn.Module | Iterable[nn.Module],
        n_members: int | None = None,
        seed: int = 0,
        initialize: Callable[[nn.Module], object] | None = None,
        *,
        shared: Sequence[str] | None = None,
        output: Output = None,
    ):
        super().__init__()
        check_output(output)
        members, alike = _members(networks, n_members, seed, initialize or reset_parameters)
        groups = _consecutive(members, alike)
        if len(groups) > 1:
            if any(is_posterior(member) for member in members):
                first, other = (architecture(_module_of(group[0])) for group in groups[:2])
                how = "other frozen parameters" if first == other else difference(first, other)
                raise ValueError(
                    f"members of different architectures must be plain networks, not posteriors; member "
                    f"{len(groups[0])} has {how}"
                )
            self._join([DeepEnsemble(group, output=output) for group in groups])
            return
        self._parts = nn.ModuleList()
        self.n_members = len(members)
        self.n_draws = len(members)

        base = _base(members[0])
        self.output = base.output if output is None and base is not None else output
        modules: list[Any] = [m.module for m in members] if base is not None else members
        if base is not None:
            self.n_draws = None if base.n_draws is None else base.n_draws * len(members)
        # structure only, in a tuple so that it is not registered: all parameters and buffers are in the stacks
        self._posterior: tuple[Any] = (blueprint(base) if base is not None else None,)
        self.seed = seed
        first = state_of(modules[0])
        shared_state = {name: first[name] for name in _equal(modules, base is not None, shared)}
        del first
        trained = {n for n, p in parameters_of(modules[0]).items() if p.requires_grad and n not in shared_state}
        apart = hold_apart(modules, shared_state)
        with only_reading():
            network, states = blueprint(modules[0]), [state_of(module) for module in modules]
        hooked = (n for state in states for n, t in state.items() if t._backward_hooks and isinstance(t, nn.Parameter))
        self.lost_hooks = tuple(hooked)
        for held in (members, modules, *groups):  # what a generator made is freed as it is stacked
            held.clear()
        del base
        self._hold(network, stacks(states, {*shared_state, *apart}), shared_state, trained, apart)

    @classmethod
    def joined(cls, parts: "Sequence[DeepEnsemble]") -> "DeepEnsemble":
        """Join ensembles, each of one architecture, into one ensemble of all their members."""
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._join(parts)
        return self

    def _join(self, parts: "Sequence[DeepEnsemble]") -> None:
        self._parts = nn.ModuleList(parts)
        self.n_members = self.n_draws = sum(part.n_members for part in parts)
        self.seed, self.output = parts[0].seed, parts[0].output

    @property
    def module(self) -> nn.Module:
        """The members' common module, with placeholder tensors; a list of the parts for several architectures."""
        return self._parts if len(self._parts) else self._structure[0]

    @property
    def user_network(self) -> nn.Module:
        return self.module if self.base is None else self._structure[0].inner

    def config(self) -> dict[str, Any]:
        """The arguments that make it again, given one member: a network or a posterior. Each of several `parts` has its
        own.
        """
        if len(self._parts):
            raise ValueError("an ensemble of several architectures has a config() for each: ask its parts")
        arguments: dict[str, Any] = {"n_members": self.n_members, "seed": self.seed, "shared": list(self._shared_names)}
        return arguments if self.output is None else arguments | {"output": self.output}

    @property
    def base(self) -> KeyedPosterior | None:
        """The members' own posterior, with placeholder tensors, or None if the members are plain networks."""
        return None if len(self._parts) else self._posterior[0]

    @property
    def parts(self) -> Sequence["DeepEnsemble"]:
        return tuple(self._parts) if len(self._parts) else (self,)  # type: ignore[return-value]

    @property
    def n_samples(self) -> int:  # type: ignore[override]
        """Draws of a member per training step, averaged."""
        return 1 if self.base is None else self.base.n_samples

    def train(self, mode: bool = True) -> Self:
        if not len(self._parts):
            return super().train(mode)
        nn.Module.train(self, mode)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        if not len(self._parts):
            return super()._apply(fn, recurse)
        nn.Module._apply(self, fn, recurse)
        return self

    @property
    def kl_weight(self) -> float | None:
        """The weight of the KL term if the members are mean-field networks, else None."""
        if self.base is None or "kl_weight" not in self._buffer_names:
            return None
        return float(self.stacked_buffers.get_buffer("kl_weight")[0])

    @kl_weight.setter
    def kl_weight(self, value: float) -> None:
        self.stacked_buffers.get_buffer("kl_weight").fill_(value)

    def member(self, index: int) -> State:
        """A copy of one member's state dict, to load into a network."""
        if not 0 <= index < self.n_members:
            raise IndexError(f"there is no member {index} of {self.n_members}: count from 0")
        for part in self.parts:
            if index < part.n_members:
                entries = {**part.shared(), **part._of_one(index)}
                # prediction may lay out weights otherwise, which files and `view` do not take
                return {n: t.detach().clone(memory_format=torch.contiguous_format) for n, t in entries.items()}
            index -= part.n_members
        raise AssertionError("unreachable")

    def of_members(self, members: range) -> "DeepEnsemble | None":
        """An ensemble of these members alone, whose tensors are parts of this one's: training it trains them."""
        if len(self._parts):
            return None
        own = self.by_member
        state = {n: t.detach() for n, t in state_of(self).items()}
        part = holding(self, {n: t[members.start : members.stop] if n in own else t for n, t in state.items()})
        part.n_members = len(members)
        part.n_draws = None if self.n_draws is None else self.n_draws // self.n_members * len(members)
        part.seed = self.seed + members.start
        return part

    def draws(self, numbers: Tensor, seed: int) -> State:
        """The entries of these samples: sample s is member s % n_members, at draw s of its dropout or weights."""
        entries = super().draws(numbers, seed)
        if self.base is None:
            return entries
        # draws that are numbered within each member, if they are limited
        numbers = numbers if self.base.n_draws is None else numbers // self.n_members
        return {**entries, **self.base.draws(numbers, seed)}

    def one_draw(self, number: int, seed: int) -> State:
        return super().one_draw(number, seed) if self.base is None else Posterior.one_draw(self, number, seed)

    def lay_out(self, names: Collection[str], layout: torch.memory_format, copying: bool = False) -> bool:
        # members that are posteriors have entries of their own besides
        return self.base is None and super().lay_out(names, layout, copying)

    @property
    def prepares(self) -> bool:
        return any(part.base is not None and part.base.prepares for part in self.parts)

    def prepare(self, inputs: Inputs) -> None:
        for part in self.parts:
            if part.base is not None:
                part._prepare_base(inputs)

    def _posterior_of(self, index: int) -> Any:  # of the class of the members
        """A posterior of the members' class with copies of one member's tensors."""
        assert self.base is not None
        return holding(self.base, {f"module.{name}": t for name, t in self.member(index).items()})

    def _each_member(self, hook: Callable[[Any], object]) -> None:
        """Call a hook of the members' own posterior for each member; what it writes into tensors is written here."""
        assert self.base is not None
        entries = {**self.shared(), **self.stacked()}
        for index in range(self.n_members):
            own = {n: t.detach()[index] if n not in self._shared_names else t for n, t in entries.items()}
            hook(holding(self.base, {f"module.{name}": t for name, t in own.items()}))

    @property
    def learning_rate(self) -> float:  # type: ignore[override]
        """The learning rate of `fit` unless `lr=` is given: that of the members."""
        return Posterior.learning_rate if self.base is None else self.base.learning_rate

    def own_optimizer(self, entries: State, others: Sequence[nn.Parameter], lr: float) -> Optimizer | None:
        return None if self.base is None else self.base.own_optimizer(entries, others, lr)

    def course(self, epochs: int, lr: float) -> Course:
        return Course() if self.base is None else self.base.course(epochs, lr)

    def being_trained(self, on: bool) -> None:
        if self.base is not None and type(self.base).being_trained is not Posterior.being_trained:
            self.base.being_trained(on)
            self._structure[0].adopt(self.base.module)
            self.n_draws = None if self.base.n_draws is None else self.base.n_draws * self.n_members

    def after_epoch(self, epoch: int) -> None:
        if self.base is not None and type(self.base).after_epoch is not Posterior.after_epoch:
            self._each_member(lambda member: member.after_epoch(epoch))

    def check_ready(self) -> None:
        for part in self.parts:
            if part.base is not None and type(part.base).check_ready is not Posterior.check_ready:
                part._posterior_of(0).check_ready()

    @property
    def fits_trained(self) -> bool:  # type: ignore[override]
        """Whether members are posteriors that fit to trained networks."""
        return self.base is not None and self.base.fits_trained

    def after_training(self, model: nn.Module, data: TrainingRows) -> None:
        """Run the members' own `after_training`, one member after the other, each with its rows and likelihood."""
        if self.base is None or type(self.base).after_training is Posterior.after_training:
            return
        assert isinstance(model, Model)
        for index in range(self.n_members):
            posterior, likelihood = self._posterior_of(index), model.likelihood
            if likelihood.n_members is not None:
                own = {name: p.detach()[index].clone() for name, p in likelihood.named_parameters()}
                likelihood = holding(likelihood, own)
                likelihood.n_members = None
            posterior.after_training(Model(posterior, likelihood), _RowsOfMember(data, index))
            with torch.no_grad():
                fitted = state_of(posterior.module)
                for name, t in self.stacked().items():
                    t[index].copy_(fitted[name])
                if model.likelihood.n_members is not None:
                    for name, p in model.likelihood.named_parameters():
                        p[index].copy_(dict(likelihood.named_parameters())[name])

    def _prepare_base(self, inputs: Inputs) -> None:
        """Run the base posterior's `prepare` on the inputs, with the first member's tensors."""
        probe = self._posterior_of(0)
        probe.module.adopt(self._structure[0])
        probe.prepare(inputs)
        self._structure[0].adopt(probe.module)

    def losses(self, x: Inputs, y: Tensor, likelihood: Likelihood, own_rows: bool = False) -> Tensor:
        """The loss of each member, (members,), in nats per row.

        own_rows: x and y have a leading members axis, one batch per member.
        """
        if len(self._parts):
            if own_rows:
                raise ValueError("members of different architectures share their batches: give losses one batch")
            return torch.cat([part.losses(x, y, likelihood) for part in self.parts])
        return super().losses(x, y, likelihood, own_rows)

    def before_training(self, x: Inputs, y: Tensor, likelihood: Likelihood, own_rows: bool = False) -> None:
        if self.base is not None and type(self.base).before_training is not Posterior.before_training:
            base = self.base

            def begin(member: Any) -> None:
                member.before_training(x, y, likelihood, own_rows)
                for found in (self._structure[0], base.module):
                    found.adopt(member.module)

            self._each_member(begin)
        super().before_training(x, y, likelihood, own_rows)


class _RowsOfMember:
    """The training rows of one member of an ensemble."""

    own = False

    def __init__(self, rows: TrainingRows, index: int):
        self._rows, self._index = rows, index

    @property
    def validation(self) -> tuple[Inputs, Tensor] | None:
        return self._rows.validation

    def __iter__(self) -> Iterator[tuple[Inputs, Tensor]]:
        for x, y in self._rows:
            yield (map_inputs(lambda t: t[self._index], x), y[self._index]) if self._rows.own else (x, y)


def _members(
    networks: nn.Module | Iterable[nn.Module],
    n_members: int | None,
    seed: int,
    initialize: Callable[[nn.Module], object],
) -> tuple[list[Any], list[bool]]:
    """The members: copies of one network, initialized anew, or the networks as they are.

    Also returns whether each clearly has the architecture of the one before it.
    """
    several = isinstance(networks, Iterable) and not isinstance(networks, nn.Module)
    # what is neither is refused by check_network
    given: list[Any] = [unwrapped(each) for each in (networks if several else [networks])]  # type: ignore[union-attr]
    alike: list[bool] = []
    for index, network in enumerate(given):
        alike.append(index > 0 and isinstance(network, nn.Module) and _are_alike(given[index - 1], network))
        if alike[-1] and not is_posterior(network):
            continue  # what is checked here is equal
        check_network(network, scripted=True)
        _base(network)
        if not state_of(network):
            raise ValueError(
                "the network has no parameter or buffer, so members cannot differ (quantized layers pack theirs): give "
                "the networks before they are quantized, or one that has some"
            )
    if isinstance(networks, nn.Module):
        if n_members is None or n_members < 1:
            raise ValueError(f"DeepEnsemble(module, n_members) needs n_members of at least 1, got {n_members}")
        members = [fresh(given[0], seed + m, initialize) for m in range(n_members)]
        return members, [m > 0 and _are_alike(members[m - 1], members[m]) for m in range(n_members)]
    if not given:
        raise ValueError("an ensemble needs at least one member, got an empty list")
    if n_members not in (None, len(given)):
        raise ValueError(f"n_members is {n_members} but {len(given)} networks were given: leave it out")
    return given, alike


def _are_alike(member: nn.Module, other: nn.Module) -> bool:
    """Whether two members clearly have one architecture and the same frozen parameters."""
    return are_alike(_module_of(member), _module_of(other))


def _equal(modules: list[Any], are_posteriors: bool, chosen: Sequence[str] | None) -> list[str]:
    """The names of the entries that members share: those that are frozen and equal in all members.

    Entries that a posterior adds to the user's network are not shared. chosen: names to share instead.
    """
    if chosen is not None:
        own = state_of(modules[0])
        if missing := [name for name in chosen if name not in own]:
            raise ValueError(f"shared names {missing[0]!r}, which is no parameter or buffer of the network")
        return list(dict.fromkeys([*chosen, *(n for n, t in own.items() if is_sparse(t))]))
    if not (frozen := frozen_names(modules[0])):  # networks of one architecture have the same
        return []
    if len(modules) == 1:
        return [n for n in frozen if is_sparse(state_of(modules[0])[n])]
    states = [state_of(module) for module in modules]
    names = [n for n in states[0] if n in frozen and (not are_posteriors or n.startswith("inner."))]
    equal = [n for n in names if all(_is_equal(states[0][n], s[n]) for s in states)]
    return equal if len(equal) < len(states[0]) else []  # at least one entry must be stacked


def _is_equal(t: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same numbers; sparse ones do, or their networks were not stacked (`_stacks_as`)."""
    return t is other or is_sparse(t) or torch.equal(t, other)


def _module_of(member: nn.Module) -> nn.Module:
    """The module of a member that is called and stacked."""
    return member.module if is_posterior(member) else member


def _base(member: nn.Module) -> KeyedPosterior | None:
    """The member if it is a posterior, or None if it is a plain network.

    Raises TypeError for a posterior that does not draw from keys, like an ensemble.
    """
    if is_posterior(member) and not isinstance(member, KeyedPosterior):
        raise TypeError(
            f"members that are posteriors must draw from keys, like vbdl.MCDropout and vbdl.MeanField; got "
            f"{type(member).__name__}: let its class inherit from vbdl.nn.objective.KeyedPosterior, or give "
            f"DeepEnsemble the networks themselves, which loses the method"
        )
    return member if isinstance(member, KeyedPosterior) else None


def _stacks_as(network: nn.Module) -> list[str]:
    """Describe what networks must share to be stacked: the architecture, and which parameters are frozen.

    A function that holds a parameter itself, and not its module, goes on using it, whatever stands in the module.
    """
    parameters = [(name, t) for name, m in modules_of(network) for t in tensors_held(m) if isinstance(t, nn.Parameter)]
    held = [f"{name} holds a parameter of {id(t)}" for name, t in parameters]
    frozen = [f"{n} is frozen" for n, p in parameters_of(network).items() if not p.requires_grad]
    return architecture(network) + frozen + held


def _consecutive(members: list[nn.Module], alike: list[bool]) -> list[list[nn.Module]]:
    """Group consecutive members of the same architecture, keeping their order; alike: as `_members` returns it."""
    groups: list[list[nn.Module]] = []
    last: nn.Module | None = None
    for member, is_alike in zip(members, alike, strict=True):
        network = _module_of(member)
        if last is None or not (is_alike or _stacks_as(last) == _stacks_as(network)):
            groups.append([])
        groups[-1].append(member)
        last = network
    return groups
