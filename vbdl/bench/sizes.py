"""Makes tasks of other sizes: fewer rows or splits for a quick comparison, more splits to repeat trainings."""

import dataclasses
import math

import torch
from torch import Tensor

from vbdl.bench.task import Task


def resized(task: Task, rows: int | None = None, splits: int | None = None, hold_out: float = 0.0) -> Task:
    """The task with at most `rows` training and test rows, this number of splits, and held-out rows.

    rows: of the training part the first; of the test part, and of each out-of-distribution set, evenly spaced ones.
    splits: the first of the task, repeated if it has fewer: repeated splits differ by initialization and order only.
    hold_out: share of the training rows that calibration gets and training does not.
    """
    x, y, notes, ood = task.x, task.y, list(task.notes), dict(task.ood)
    train, test = torch.arange(task.n_train), torch.arange(task.n_train, x.shape[1])
    if rows is not None and max(len(train), len(test)) > rows:
        notes.append(f"at most {rows} rows of {len(train)} training and {len(test)} test rows")
        train, test = train[:rows], spaced(test, rows)
        ood = {name: outside[:, spaced(torch.arange(outside.shape[1]), rows)] for name, outside in ood.items()}
    n_held = math.floor(hold_out * len(train))
    if n_held:
        notes.append(f"the last {n_held} training rows are held out: methods that calibrate use them, others do not")
    order = torch.cat((train[: len(train) - n_held], train[len(train) - n_held :], test))
    chosen = torch.arange(task.n_splits)
    if splits is not None:
        chosen = torch.arange(splits) % task.n_splits
        if splits > task.n_splits:
            notes.append(f"{splits} trainings of {task.n_splits} split(s), which differ by initialization and order")
        elif splits < task.n_splits:
            notes.append(f"the first {splits} of {task.n_splits} splits")
    if not n_held and len(order) == x.shape[1] and splits is None:
        return task
    take = lambda t: t[chosen]
    scale = tuple(task.scale[k] for k in chosen.tolist()) if task.scale else ()
    center = tuple(task.center[k] for k in chosen.tolist()) if task.center else ()
    return dataclasses.replace(
        task,
        x=take(x[:, order]),
        y=take(y[:, order]),
        n_train=len(train) - n_held,
        n_held=n_held,
        scale=scale,
        center=center,
        ood={name: take(outside) for name, outside in ood.items()},
        notes=tuple(notes),
        published=() if rows is not None or n_held else task.published,
    )


def spaced(numbers: Tensor, count: int) -> Tensor:
    """`count` of these numbers, evenly spaced, or all if there are no more."""
    if len(numbers) <= count:
        return numbers
    return numbers[torch.arange(count) * len(numbers) // count]
