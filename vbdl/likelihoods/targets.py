"""Targets of several tasks, some of them without a label."""

from torch import Tensor


def check_labeled(y: Tensor) -> None:
    """Raises ValueError where some of several targets of a row are missing (NaN), with what to do. y: (batch, ...)"""
    if y.ndim < 2 or y[:1].numel() < 2 or not y.is_floating_point() or not bool((missing := y.isnan()).any()):
        return
    each = missing.flatten(1).any(1)
    raise ValueError(
        f"targets of {int(each.sum())} of {len(each)} rows are missing (NaN), first in row {int(each.nonzero()[0])}: a "
        f"label that is missing in one of several tasks is not left out of the loss. Remove or impute such rows, or "
        f"fit one predictor a task, on the rows that have its label: y[:, i] where it is not NaN"
    )
