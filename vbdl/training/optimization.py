"""How a step changes the parameters: the optimizer, its schedule, and the clipping of gradients."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vbdl.training.options import TrainingOptions


def make_optimizer(options: TrainingOptions, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of these parameters: what `options.optimizer` returns for them, AdamW unless given.

    Raises TypeError or ValueError for an optimizer that cannot step from one gradient.
    """
    if options.optimizer is None:
        return torch.optim.AdamW(parameters, lr=options.lr, weight_decay=options.weight_decay, fused=True)
    optimizer: Any = options.optimizer(parameters)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer returns a torch.optim.Optimizer, got {type(optimizer).__name__} from it")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            "LBFGS evaluates the loss several times a step, which fit does not: use an optimizer with one gradient a "
            "step, like AdamW or SGD"
        )
    return optimizer


def make_schedule(options: TrainingOptions, optimizer: torch.optim.Optimizer) -> Any:
    """The learning-rate schedule of this optimizer, stepped once an epoch; None for a constant rate."""
    if options.schedule is None:
        return None
    if not callable(options.schedule):  # "cosine", the only name there is
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs)
    schedule = options.schedule(optimizer)
    if isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise ValueError(
            "ReduceLROnPlateau waits for a number that fit does not give a schedule: use schedule='cosine' or one "
            "of the epoch alone, like StepLR, and validation= with patience= to stop in time"
        )
    return schedule


def clip_gradients(trained: Mapping[str, Tensor], largest: float, by_member: Collection[str]) -> None:
    """Scale gradients down to this norm: each member's own, and that of all that members share.

    by_member: names of the tensors with a leading members axis.
    """
    together = [p for name, p in trained.items() if name not in by_member]
    if together:
        torch.nn.utils.clip_grad_norm_(together, largest)
    gradients = [p.grad for name, p in trained.items() if name in by_member and p.grad is not None]
    if not gradients:
        return
    square: Any = sum(g.flatten(1).square().sum(1) if g.ndim > 1 else g.square() for g in gradients)
    scale = (largest / (square.sqrt() + 1e-6)).clamp_max(1.0)
    for g in gradients:
        g.mul_(scale.view(-1, *[1] * (g.ndim - 1)))
