"""The optimizer, its learning-rate schedule, and the clipping of gradients."""

import functools
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from vbdl.training.options import TrainingOptions


def make_optimizer(
    options: TrainingOptions, trained: Mapping[str, nn.Parameter], undecayed: Collection[str] = ()
) -> torch.optim.Optimizer:
    """The optimizer that `options.optimizer` returns for these parameters, or AdamW if it is None.

    undecayed: names of parameters that the weight decay of that AdamW does not shrink. A function of the parameters
    gets them all, in one list.

    Raises TypeError if that is no optimizer, and ValueError for LBFGS, which needs several gradients per step.
    """
    parameters = list(trained.values())
    if options.optimizer is None:
        fused = all(p.is_floating_point() for p in parameters)  # torch's fused step takes no complex weights
        groups = [{"params": [p for name, p in trained.items() if name not in undecayed]}]
        if spared := [p for name, p in trained.items() if name in undecayed]:
            groups.append({"params": spared, "weight_decay": 0.0})  # type: ignore[dict-item]
        return torch.optim.AdamW(groups, lr=options.lr, weight_decay=options.weight_decay, fused=fused)
    optimizer = options.optimizer(parameters)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must return a torch.optim.Optimizer, got {type(optimizer).__name__} from it")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            "LBFGS evaluates the loss several times per step, which fit does not: use an optimizer with one gradient "
            "per step, like AdamW or SGD"
        )
    return optimizer


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


def clip_gradients(trained: Mapping[str, Tensor], largest: float, by_member: Collection[str]) -> None:
    """Scale the gradients of each member down to a norm of at most `largest`, and likewise those of shared tensors.

    by_member: names of the tensors with a leading members axis; the others are shared by all members.
    """
    shared = [p for name, p in trained.items() if name not in by_member]
    if shared:
        torch.nn.utils.clip_grad_norm_(shared, largest)
    gradients = [p.grad for name, p in trained.items() if name in by_member and p.grad is not None]
    if not gradients:
        return
    square = functools.reduce(
        torch.add, [g.abs().flatten(1).square().sum(1) if g.ndim > 1 else g.abs().square() for g in gradients]
    )
    scale = (largest / (square.sqrt() + 1e-6)).clamp_max(1.0)
    for g in gradients:
        g.mul_(scale.view(-1, *[1] * (g.ndim - 1)))
