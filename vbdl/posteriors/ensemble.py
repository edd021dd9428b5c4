"""Deep ensembles: several networks trained from different starts, stacked into one.

Lakshminarayanan, Pritzel and Blundell, Simple and Scalable Predictive Uncertainty Estimation using Deep Ensembles,
NeurIPS 2017, https://arxiv.org/abs/1612.01474
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vbdl.calling.stacking import (
    blueprint,
    call_each,
    call_stacked,
    can_map,
    check_network,
    copied,
    holding,
    parameter_hooks,
    places_of,
    state_of,
    why_not_mapped,
)
from vbdl.data.tiles import aligned
from vbdl.model import Model
from vbdl.nn.architecture import architecture, difference, stack
from vbdl.nn.frozen import frozen_modules, hold_frozen
from vbdl.nn.objective import KeyedPosterior, Objective, training_keys
from vbdl.types import Inputs, Likelihood, Posterior, State, is_posterior


class DeepEnsemble(Posterior):
    """q(w) = an equal mixture of the members: parameters and buffers of every member, stacked.

    networks: a module, of which n_members fresh initializations are made, or a list of (trained) modules. Either may
    be posteriors themselves: an ensemble of dropout or of mean-field networks. A list of different architectures is
    taken too, and run one architecture after the other.
    initialize: what makes a fresh initialization of a copy; unless given, every submodule's `reset_parameters`, and
        what is frozen (requires_grad=False), like a pretrained backbone, stays as it is.
    seed: of the initializations and of dropout in training; member m uses seed + m.
    shared: names of the entries that members hold together, once; unless given, the frozen parameters (with the
        buffers of frozen layers) that are equal in all members. They are computed once a batch, and not trained.
    """

    steps: Tensor
    one_by_one: str | None = None  # why members are not trained together; None before that is known

    def __init__(
        self,
        networks: nn.Module | Sequence[nn.Module],
        n_members: int | None = None,
        seed: int = 0,
        initialize: Callable[[nn.Module], object] | None = None,
        *,
        shared: Sequence[str] | None = None,
    ):
        super().__init__()
        for network in networks if isinstance(networks, Sequence) else [networks]:
            check_network(network, scripted=True)
            _base(network)
            if not state_of(network):
                raise ValueError("the network has no parameter or buffer, so that members cannot differ")
        if isinstance(networks, nn.Module):
            if n_members is None or n_members < 1:
                raise ValueError(f"DeepEnsemble of one module needs n_members of at least 1, got {n_members}")
            members = [_fresh(networks, seed + m, initialize or reset_parameters) for m in range(n_members)]
        else:
            members = list(networks)
            if not members:
                raise ValueError("an ensemble needs at least one member, got an empty list")
            if n_members not in (None, len(members)):
                raise ValueError(f"n_members is {n_members} but {len(members)} networks were given")
        groups = _consecutive(members)
        if len(groups) > 1:
            if any(is_posterior(member) for member in members):
                first, other = (architecture(_module_of(group[0])) for group in groups[:2])
                said = "other frozen parameters" if first == other else difference(first, other)
                raise ValueError(
                    f"members of different architectures must be plain networks, not posteriors; member "
                    f"{len(groups[0])} has {said}"
                )
            self._join([DeepEnsemble(group) for group in groups])
            return
        self._parts = nn.ModuleList()
        self.lost_hooks = tuple(name for member in members for name in parameter_hooks(_module_of(member)))
        self.n_members = len(members)
        self.n_draws = len(members)

        base = _base(members[0])
        modules: list[Any] = [m.module for m in members] if base is not None else members
        # structure only, kept out of the registered modules: every parameter and buffer is in the stacks
        self._hidden: tuple[Any, Any] = (blueprint(modules[0]), blueprint(base) if base is not None else None)
        if base is not None:
            self.n_draws = None if base.n_draws is None else base.n_draws * len(members)
        trainable = {name: p.requires_grad for name, p in modules[0].named_parameters()}
        self.stacked_parameters = nn.Module()  # a ParameterDict has no place for one named "values"
        self.stacked_buffers = nn.Module()
        self.held_once = nn.Module()
        equal = {name: state_of(modules[0])[name] for name in _equal(modules, base is not None, shared)}
        for name, tensor in equal.items():
            if name in trainable:
                self.held_once.register_parameter(_key(name), nn.Parameter(tensor.detach().clone(), False))
            else:
                self.held_once.register_buffer(_key(name), tensor.detach().clone())
        self._shared_names = tuple(equal)
        for name, tensor in stack(modules, equal).items():
            if name in trainable:
                self.stacked_parameters.register_parameter(_key(name), nn.Parameter(tensor, trainable[name]))
            else:
                self.stacked_buffers.register_buffer(_key(name), tensor)
        self._parameter_names = tuple(n for n in trainable if n not in equal)
        self._buffer_names = tuple(n for n, _ in modules[0].named_buffers() if n not in equal)
        self._link()
        self.seed = seed
        device = next(iter(self.stacked().values())).device
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=device))

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
        self.seed = parts[0].seed

    @property
    def module(self) -> nn.Module:
        """The members' common module, whose tensors are placeholders; one a part for several architectures."""
        return self._parts if len(self._parts) else self._hidden[0]

    @property
    def user_network(self) -> nn.Module:
        return self.module if self.base is None else self._hidden[0].inner

    @property
    def base(self) -> KeyedPosterior | None:
        """The posterior that every member is (without its tensors), or None if the members are plain networks."""
        return None if len(self._parts) else self._hidden[1]

    @property
    def parts(self) -> Sequence["DeepEnsemble"]:
        return tuple(self._parts) if len(self._parts) else (self,)  # type: ignore[return-value]

    def train(self, mode: bool = True) -> "DeepEnsemble":
        super().train(mode)
        if not len(self._parts):
            self._hidden[0].train(mode)
            if mode:
                hold_frozen(self._hidden[0])
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> "DeepEnsemble":
        super()._apply(fn, recurse)
        if not len(self._parts):
            self._link()
        return self

    def _link(self) -> None:
        """Put the shared tensors in their places in the module that is called."""
        places = places_of(self._hidden[0])
        for name, t in self.shared().items():
            for place in places[name]:
                prefix, _, leaf = place.rpartition(".")
                owner = self._hidden[0].get_submodule(prefix)
                held: dict[str, Any] = owner._parameters if isinstance(t, nn.Parameter) else owner._buffers
                held[leaf] = t

    def shared(self) -> State:
        """The parameters and buffers that all members share, without a members axis; none of them is trained."""
        return {name: getattr(self.held_once, _key(name)) for name in self._shared_names}

    def stacked(self) -> State:
        """The parameters and buffers that each member has of its own, (members, ...) each: the trained tensors."""
        parameters = {name: getattr(self.stacked_parameters, _key(name)) for name in self._parameter_names}
        return {**parameters, **{name: getattr(self.stacked_buffers, _key(name)) for name in self._buffer_names}}

    @property
    def by_member(self) -> frozenset[str]:
        return frozenset(name for name in state_of(self) if name.startswith("stacked_"))

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
        """The state dict of one member, a copy, to be loaded into a network of its own."""
        if not 0 <= index < self.n_members:
            raise IndexError(f"member {index} of {self.n_members}")
        for part in self.parts:
            if index < part.n_members:
                entries = {**part.shared(), **{name: t[index] for name, t in part.stacked().items()}}
                return {name: t.detach().clone() for name, t in entries.items()}
            index -= part.n_members
        raise AssertionError("unreachable")

    def draws(self, numbers: Tensor, seed: int) -> State:
        """Sample s is member s % n_members; with dropout or weights of its own it is also draw s of those."""
        stacked = self.stacked()
        which = numbers % self.n_members
        first, count = int(which[0]), len(which)
        if torch.equal(which, torch.arange(first, first + count)):
            stacked = {name: aligned(t[first : first + count]) for name, t in stacked.items()}
        else:
            stacked = {name: t.index_select(0, which.to(t.device)) for name, t in stacked.items()}
        if self.base is not None:
            stacked = {**stacked, **self.base.draws(numbers, seed)}
        return stacked

    def prepare(self, inputs: Inputs) -> None:
        for part in self.parts:
            if part.base is not None:
                part._prepare_base(inputs)

    def _prepare_base(self, inputs: Inputs) -> None:
        """Let the base posterior look at the inputs, with the first member's tensors."""
        assert self.base is not None
        probe: Any = holding(self.base, {f"module.{name}": t for name, t in self.member(0).items()})
        probe.module.adopt(self._hidden[0])
        probe.prepare(inputs)
        self._hidden[0].adopt(probe.module)

    def losses(self, x: Inputs, y: Tensor, likelihood: Likelihood, own_rows: bool = False) -> Tensor:
        """(members,) each member's loss, nats a row.

        own_rows: x and y have a leading members axis, a batch for each member.
        """
        if len(self._parts):
            if own_rows:
                raise ValueError("members of different architectures share their batches")
            return torch.cat([part.losses(x, y, likelihood) for part in self.parts])
        objective, state, shared = self._objective(likelihood)
        self.steps += 1
        if self.one_by_one is None and not can_map(objective) or self.one_by_one:
            return call_each(objective, state, shared, (x, y), inputs_stacked=own_rows)
        return call_stacked(objective, state, shared, (x, y), randomness="different", inputs_stacked=own_rows)

    def _objective(self, likelihood: Likelihood) -> tuple[Objective, State, State]:
        """The members' objective, its entries of the next step, (members, ...) each, and its shared entries."""
        model, n_samples = Model(self, likelihood), 1 if self.base is None else self.base.n_samples
        state = model.member_entries()
        shared = model.shared(state)
        state["key"] = training_keys(self.seed, self.n_members, self.steps * n_samples)
        return Objective(self.module, likelihood, n_samples), state, shared

    def before_training(self, x: Inputs, y: Tensor, likelihood: Likelihood, own_rows: bool = False) -> None:
        """Find out on the first batch whether `vmap` can train the members together, or one by one only.

        `one_by_one` then holds the reason, or "" if they are trained together.
        """
        objective, state, shared = self._objective(likelihood)
        try:
            reason = why_not_mapped(objective, state, shared, (x, y), inputs_stacked=own_rows)
        except RuntimeError as error:
            if "escaped from inside a function being vmapped" not in str(error):
                raise
            raise ValueError(
                "the network keeps a tensor in an attribute from one call to the next, which members would share: make "
                "it a buffer with register_buffer(name, tensor), so that each has its own"
            ) from error
        self.one_by_one = reason or ""


def _key(name: str) -> str:
    return name.replace(".", "/")  # registered names take no dots


def _equal(modules: list[Any], are_posteriors: bool, chosen: Sequence[str] | None) -> list[str]:
    """The names of the entries that members can share: frozen, and equal in all of them. chosen: names to take instead.

    Of a posterior those of the network inside; what the posterior keeps beside it is each member's.
    """
    states = [state_of(module) for module in modules]
    if chosen is not None:
        if missing := [name for name in chosen if name not in states[0]]:
            raise ValueError(f"shared names {missing[0]!r}, which is no parameter or buffer of the network")
        return list(chosen)
    if len(modules) < 2:
        return []
    frozen = [_frozen_names(module) for module in modules]
    names = [n for n in states[0] if all(n in f for f in frozen) and (not are_posteriors or n.startswith("inner."))]
    equal = [n for n in names if all(torch.equal(states[0][n], s[n]) for s in states[1:])]
    return equal if len(equal) < len(states[0]) else []  # members that are all one have to be something


def _frozen_names(module: nn.Module) -> set[str]:
    """The names of the parameters that are not trained, and of the buffers of layers without trained parameters."""
    names = {name for name, p in module.named_parameters() if not p.requires_grad}
    for path, m in frozen_modules(module):
        names |= {f"{path}.{leaf}" if path else leaf for leaf, b in m._buffers.items() if b is not None}
    return names


def _network_of(member: nn.Module) -> nn.Module:
    """The user's network of a member."""
    return member.user_network if is_posterior(member) else member


def _module_of(member: nn.Module) -> nn.Module:
    """The module of a member that is called and stacked."""
    return member.module if is_posterior(member) else member


def _base(member: nn.Module) -> KeyedPosterior | None:
    """The posterior that a member is, or None for a network."""
    if is_posterior(member) and not isinstance(member, KeyedPosterior):
        raise TypeError(
            f"members that are posteriors draw from keys, like vbdl.MCDropout and vbdl.MeanField, got "
            f"{type(member).__name__}: give DeepEnsemble the networks themselves"
        )
    return member if isinstance(member, KeyedPosterior) else None


def _consecutive(members: list[nn.Module]) -> list[list[nn.Module]]:
    """Group consecutive members of the same architecture, in their order."""
    groups: list[list[nn.Module]] = []
    last: list[str] | None = None
    for member in members:
        network = _module_of(member)
        frozen = [f"{name} is frozen" for name, p in network.named_parameters() if not p.requires_grad]
        this = architecture(network) + frozen  # members that train other parts are not one either
        if this != last:
            groups.append([])
        groups[-1].append(member)
        last = this
    return groups


def _fresh(module: nn.Module, seed: int, initialize: Callable[[nn.Module], object]) -> nn.Module:
    """Copy a module and initialize the copy under this seed; torch's global generator is restored afterwards."""
    fresh = copied(module)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        initialize(fresh)
    return fresh


def reset_parameters(module: nn.Module) -> None:
    """Call `reset_parameters` of every submodule, and keep what is frozen.

    Raises ValueError where parameters belong to a submodule that has no initialization, or all are frozen.
    """
    target = _network_of(module)
    if not any(p.requires_grad for p in target.parameters()):
        raise ValueError(
            "every parameter is frozen, so all members would be one network: thaw what is to be trained with "
            "requires_grad_(True), or give DeepEnsemble a list of trained modules"
        )
    # a submodule's initialization may reach into others, so that what is frozen is put back in the end
    kept = {t: t.detach().clone() for m in target.modules() for t in _frozen(m)}
    for name, m in target.named_modules():
        reset = getattr(m, "reset_parameters", None) or getattr(m, "_reset_parameters", None)
        if callable(reset):
            reset()
        elif any(p.requires_grad for p in m.parameters(recurse=False)):
            raise ValueError(
                f"module '{name}' ({type(m).__name__}) holds parameters and has no reset_parameters(): "
                f"give DeepEnsemble(module, n_members, initialize=...), or a list of modules you have initialized"
            )
    with torch.no_grad():
        for t, value in kept.items():
            t.copy_(value)


def _frozen(module: nn.Module) -> list[Tensor]:
    """A module's own frozen parameters, and its buffers (running statistics) too if all its parameters are frozen."""
    parameters = list(module.parameters(recurse=False))
    frozen: list[Tensor] = [p for p in parameters if not p.requires_grad]
    return [*frozen, *module.buffers(recurse=False)] if frozen and len(frozen) == len(parameters) else frozen
