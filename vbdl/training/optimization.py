"""The optimizer, its learning-rate schedule, and the clipping of gradients."""

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from vbdl.training.adamw import FusedAdamW, MembersAdamW
from vbdl.training.options import TrainingOptions, is_of_each_member
from vbdl.types import Posterior

_ELEMENTWISE = {
    getattr(torch.optim, name)
    for name in "SGD ASGD Adam AdamW Adamax NAdam RAdam Adagrad Adadelta RMSprop Rprop".split()
}


def make_optimizer(
    options: TrainingOptions,
    trained: Mapping[str, nn.Parameter],
    undecayed: Collection[str] = (),
    by_member: Collection[str] = (),
    n_members: int = 1,
) -> torch.optim.Optimizer:
    """The optimizer that `options.optimizer` returns for these parameters, or AdamW if it is None.

    undecayed: names of parameters that the weight decay of that AdamW does not shrink. A function of the parameters
    gets them all, in one list. by_member: names of parameters with a leading members axis.

    Raises TypeError if that is no optimizer, and ValueError for LBFGS, which needs several gradients per step, and for
    learning rates of each member where members share a trained parameter.
    """
    parameters = list(trained.values())
    if options.optimizer is None:
        decayed = [p for name, p in trained.items() if name not in undecayed]
        spared = [p for name, p in trained.items() if name in undecayed]
        alike = len({(p.dtype, p.device) for p in parameters}) == 1 and parameters[0].is_floating_point()
        if is_of_each_member(options.lr) or is_of_each_member(options.weight_decay):
            lr, weight_decay = (_of_each(name, options, n_members) for name in ("lr", "weight_decay"))
            if shared := [name for name in trained if name not in by_member]:
                raise ValueError(
                    f"lr and weight_decay of each member need members with parameters of their own, but they share "
                    f"'{shared[0].partition('.')[2]}': give one number for all"
                )
            if not alike:
                raise ValueError(
                    "lr and weight_decay of each member need real parameters of one dtype on one device: give one "
                    "number for all"
                )
            return MembersAdamW(decayed, spared, lr, weight_decay)
        groups: list[dict[str, Any]] = [{"params": decayed}] if decayed else []
        if spared:
            groups.append({"params": spared, "weight_decay": 0.0})
        if alike:
            return FusedAdamW(groups, options.lr, options.weight_decay)  # type: ignore[arg-type]
        fused = all(p.is_floating_point() for p in parameters)  # torch's fused step takes no complex weights
        return torch.optim.AdamW(groups, lr=options.lr, weight_decay=options.weight_decay, fused=fused)  # type: ignore[arg-type]
    optimizer = options.optimizer(parameters)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must return a torch.optim.Optimizer, got {type(optimizer).__name__} from it")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            "LBFGS evaluates the loss several times per step, which fit does not: use an optimizer with one gradient "
            "per step, like AdamW or SGD"
        )
    known = type(optimizer) in _ELEMENTWISE
    if by_member and n_members > 1 and not known and _mixes_members(optimizer):
        raise ValueError(
            f"{type(optimizer).__name__} updates a number by the gradients of others too, and members are trained "
            f"stacked in one tensor, so each would change the others' updates: use an optimizer that treats each "
            f"number alone, like AdamW or SGD, or train the networks one by one and pass them to the ensemble"
        )
    return optimizer


def _mixes_members(optimizer: torch.optim.Optimizer) -> bool:
    """Whether two steps of an optimizer on a stack of two tensors differ from its steps on each of them.

    Steps are those of copies of the optimizer. False also where that cannot be seen: it draws random numbers, refuses
    such tensors, or holds another optimizer, which the steps would change.
    """
    if any(isinstance(value, torch.optim.Optimizer) for value in vars(optimizer).values()):
        return False
    begin = torch.linspace(-1.0, 1.0, 48, dtype=torch.float64).view(2, 4, 6)
    gradients = torch.stack((begin.cos(), 50 * begin.sin()))  # in both steps one tensor's are much larger
    gradients = torch.stack((gradients[:, 0], gradients.flip(0)[:, 1]), dim=1)

    def update(part: Any) -> Tensor:
        p = nn.Parameter(begin[part].clone())
        alone: Any = object.__new__(type(optimizer))
        vars(alone).update(vars(optimizer), state=defaultdict(dict))
        vars(alone).update({name: copy.copy(v) for name, v in vars(alone).items() if isinstance(v, dict | list | set)})
        vars(alone).update({name: OrderedDict() for name in vars(optimizer) if name.endswith("_hooks")})
        alone.param_groups = [{**optimizer.param_groups[0], "params": [p]}]
        for step in gradients:
            p.grad = step[part].clone()
            alone.step()
        return p.detach() - begin[part]

    with torch.random.fork_rng(devices=[]):
        before = torch.get_rng_state()
        try:
            stacked, apart = update(slice(None)), torch.stack((update(0), update(1)))
        except Exception:  # of an optimizer that somebody wrote
            return False
        draws = not torch.equal(before, torch.get_rng_state())
    return not draws and not torch.allclose(stacked, apart, rtol=1e-4, atol=1e-4 * float(apart.abs().max()))


def _of_each(name: str, options: TrainingOptions, n_members: int) -> list[float]:
    """The values of an option for each member: those given, or the one number for all."""
    given = getattr(options, name)
    if not is_of_each_member(given):
        return [given] * n_members
    if len(given) != n_members:
        raise ValueError(f"{name} must be one number, or one for each of {n_members} members; got {len(given)}")
    return [float(value) for value in given]


def own_optimizer(
    options: TrainingOptions, posterior: Posterior, trained: Mapping[str, nn.Parameter]
) -> torch.optim.Optimizer | None:
    """The optimizer of a posterior that has an update rule of its own, or None.

    Raises ValueError for options that such a rule does not take.
    """
    state = {**posterior.shared(), **posterior.stacked()}
    parameters = {id(p): p for p in trained.values()}
    entries = {name: t for name, t in state.items() if id(t) in parameters}
    inside = {id(t) for t in entries.values()}
    others = [p for i, p in parameters.items() if i not in inside]
    lr: Any = posterior.learning_rate if is_of_each_member(options.lr) else options.lr
    own = posterior.own_optimizer(entries, others, lr)
    if own is None:
        return None
    if is_of_each_member(options.lr):
        raise ValueError(f"{type(own).__name__} is the posterior's own update rule, with one lr for all members")
    for name in ("optimizer", "weight_decay", "clip_norm"):
        if is_of_each_member(value := getattr(options, name)) or value:
            raise ValueError(
                f"{type(own).__name__} is the posterior's own update rule and takes no {name}: leave {name}= out, and "
                f"give the posterior the numbers of its rule"
            )
    return own


def make_schedule(options: TrainingOptions, optimizer: torch.optim.Optimizer) -> LRScheduler | None:
    """The learning-rate schedule of this optimizer, stepped once per epoch; None for a constant rate."""
    if options.schedule is None:
        return None
    if not callable(options.schedule):  # "cosine" is the only name
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs)
    schedule = options.schedule(optimizer)
    if isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise ValueError(
            "ReduceLROnPlateau needs a metric at every step, which fit does not pass to a schedule: use "
            "schedule='cosine' or a schedule of the epoch alone, like StepLR, and validation= with patience= to stop "
            "early"
        )
    return schedule


class MeanGradients:
    """The mean of the gradients of several batches, weighted by their rows: that of one batch of all their rows."""

    def __init__(self, trained: Collection[nn.Parameter]):
        self._trained = trained
        self._begin()

    @torch.no_grad()
    def add(self, rows: int) -> None:
        """Add the gradients of a batch of so many rows, which are in the parameters' `grad`."""
        for index, p in enumerate(self._trained):
            if p.grad is None:
                continue
            if (so_far := self._sums[index]) is None:
                self._sums[index] = p.grad * rows
            else:
                so_far.add_(p.grad, alpha=rows)
        self.rows += rows

    @torch.no_grad()
    def put(self) -> None:
        """Put the mean in the parameters' `grad`, and begin anew."""
        for p, total in zip(self._trained, self._sums, strict=True):
            p.grad = None if total is None else total.div_(self.rows)
        self._begin()

    def _begin(self) -> None:
        self._sums: list[Tensor | None] = [None] * len(self._trained)
        self.rows = 0


def clip_gradients(trained: Mapping[str, Tensor], largest: float, by_member: Collection[str]) -> None:
    """Scale the gradients of each member down to a norm of at most `largest`, and likewise those of shared tensors.

    by_member: names of the tensors with a leading members axis; the others are shared by all members.
    """
    shared = [p for name, p in trained.items() if name not in by_member]
    if shared:
        torch.nn.utils.clip_grad_norm_(shared, largest)
    gradients = [p.grad for name, p in trained.items() if name in by_member and p.grad is not None]
    if gradients:
        clip_members(gradients, largest)


def clip_members(gradients: Sequence[Tensor], largest: float) -> None:
    """Scale gradients, (members, ...) each, down in place to a norm of at most `largest` for each member."""
    norms = [torch.linalg.vector_norm(g.flatten(1), dim=1) if g.ndim > 1 else g.abs() for g in gradients]
    scale = (largest / (torch.linalg.vector_norm(torch.stack(norms), dim=0) + 1e-6)).clamp_max(1.0)
    for g in gradients:
        g.mul_(scale.view(-1, *[1] * (g.ndim - 1)))
