"""The check for missing labels among the targets of several tasks."""

from torch import Tensor


def check_labeled(y: Tensor) -> None:
    """Raise ValueError if a row with several targets lacks some of them (NaN). y: (batch, ...)"""
    if y.ndim < 2 or y[:1].numel() < 2 or not y.is_floating_point() or not bool((missing := y.isnan()).any()):
        return
    each = missing.flatten(1).any(1)
    raise ValueError(
        f"targets of {int(each.sum())} of {len(each)} rows are missing (NaN), first in row {int(each.nonzero()[0])}, "
        f"and the loss cannot leave out a label of one of several tasks: remove or impute such rows, or fit one "
        f"predictor per task, on the rows that have its label, y[:, i] where it is not NaN"
    )
