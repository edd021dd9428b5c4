"""What every likelihood asks of its targets."""

from torch import Tensor


def check_labelled(y: Tensor) -> None:
    """Raises ValueError where targets are missing (NaN), with what to do about it. y: (batch, ...)"""
    if not y.is_floating_point() or not bool((missing := y.isnan()).any()):
        return
    each = missing.flatten(1).any(1) if y.ndim > 1 else missing
    said = f"the targets of {int(each.sum())} of {len(each)} rows are missing (NaN) and not finite, first in row "
    said += str(int(each.nonzero()[0]))
    if y.ndim > 1 and y[:1].numel() > 1:
        raise ValueError(
            f"{said}: a label that is missing in one of several tasks is not left out of the loss. Remove or impute "
            f"such rows, or fit one predictor a task, on the rows that have its label: y[:, i] where it is not NaN"
        )
    raise ValueError(f"{said}: remove or impute such rows")
