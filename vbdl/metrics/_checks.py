"""Checks of the inputs of metrics and calibrators, with one wording for each error."""

import torch
from torch import Tensor

# tolerated difference of a row's sum from one: the rounding of a softmax in that dtype
_SUM_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}


def _first_row(bad: Tensor) -> int:
    """The index of the first row that has a True anywhere in `bad`."""
    return int(bad.reshape(bad.shape[0], -1).any(dim=1).nonzero()[0])


def check_finite(values: Tensor, name: str) -> Tensor:
    """Return `values` as float64, detached; ValueError with the row's index if one is NaN or infinite."""
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, not {type(values).__name__}")
    values = values.detach()
    if values.is_complex():
        raise TypeError(f"{name} must be real, not {values.dtype}")
    if values.numel() and not bool(torch.isfinite(values).all()):
        row = _first_row(~torch.isfinite(values.reshape(values.shape[0] if values.ndim else 1, -1)))
        raise ValueError(f"{name} has a NaN or infinite value in row {row}; drop or repair such rows first")
    return values.to(torch.float64)


def check_probs(probs: Tensor, name: str = "probs", empty: bool = False) -> Tensor:
    """Return probabilities as float64 (batch, classes); (batch,) is taken as the probability of class 1 of two.

    Raises ValueError if a value is NaN or outside [0, 1], if a row does not sum to one, or if there are no rows and
    `empty` is False.
    """
    if not isinstance(probs, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, not {type(probs).__name__}")
    if not probs.is_floating_point():
        raise TypeError(f"{name} must be floating point, not {probs.dtype}")
    if probs.ndim not in (1, 2):
        raise ValueError(f"{name} must be (batch, classes) or (batch,), not {tuple(probs.shape)}")
    if probs.shape[0] == 0 and not empty:
        raise ValueError(f"{name} has no rows")
    tolerance = _SUM_TOLERANCE.get(probs.dtype, 2e-2)
    values = check_finite(probs, name)
    outside = (values < 0) | (values > 1 + tolerance)
    if bool(outside.any()):
        raise ValueError(
            f"{name} has a value outside [0, 1] in row {_first_row(outside)}; pass probabilities, not logits"
        )
    if values.ndim == 1:
        values = values.clamp(max=1.0)
        return torch.stack([1 - values, values], dim=1)
    if values.shape[1] == 0:
        raise ValueError(f"{name} has no classes: its shape is {tuple(probs.shape)}")
    if values.shape[1] == 1:
        raise ValueError(f"{name} is (batch, 1): for a binary outcome pass (batch,), the probability of class 1")
    wrong = (values.sum(dim=1) - 1).abs() > tolerance
    if bool(wrong.any()):
        row = _first_row(wrong)
        raise ValueError(
            f"row {row} of {name} sums to {float(values[row].sum()):.6g}, not to one; normalize the rows first"
        )
    return values


def check_labels(y: Tensor, n: int, n_classes: int, name: str = "y") -> Tensor:
    """Return labels as int64 (batch,). TypeError if they are not integers, ValueError if not n in [0, n_classes)."""
    if not isinstance(y, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, not {type(y).__name__}")
    if y.is_floating_point() or y.is_complex():
        raise TypeError(f"{name} must hold class numbers of an integer dtype, not {y.dtype}")
    if tuple(y.shape) != (n,):
        raise ValueError(f"{name} must have shape ({n},), one label per row, not {tuple(y.shape)}")
    y = y.detach().to(torch.int64)
    outside = (y < 0) | (y >= n_classes)
    if bool(outside.any()):
        row = _first_row(outside)
        raise ValueError(f"{name} is {int(y[row])} in row {row}, outside the {n_classes} classes 0..{n_classes - 1}")
    return y


def check_probs_and_labels(probs: Tensor, y: Tensor, empty: bool = False) -> tuple[Tensor, Tensor]:
    """Check and return (probs, y): float64 (batch, classes) and int64 (batch,), both on the device of probs."""
    values = check_probs(probs, empty=empty)
    return values, check_labels(y, values.shape[0], values.shape[1]).to(values.device)


def check_scores(scores: Tensor, name: str = "scores") -> Tensor:
    """Return scores as float64; ValueError unless they are (batch,), finite and at least one."""
    values = check_finite(scores, name)
    if values.ndim != 1:
        raise ValueError(f"{name} must be (batch,), not {tuple(values.shape)}")
    if values.numel() == 0:
        raise ValueError(f"{name} has no rows")
    return values


def check_targets(mean: Tensor, y: Tensor, name: str = "mean") -> tuple[Tensor, Tensor]:
    """Return predicted values and targets as float64 of one shape, (batch,) or (batch, ...).

    The shapes must be equal, because (batch,) and (batch, 1) would silently broadcast to (batch, batch).
    """
    mean, y = check_finite(mean, name), check_finite(y, "y")
    if mean.shape != y.shape:
        raise ValueError(f"{name} is {tuple(mean.shape)} but y is {tuple(y.shape)}; give both the same shape")
    if mean.ndim == 0:
        raise ValueError(f"{name} must be (batch,) or (batch, ...), not {tuple(mean.shape)}")
    return mean, y.to(mean.device)


def check_std(std: Tensor, shape: torch.Size, name: str = "std", zero: bool = False) -> Tensor:
    """Return standard deviations as float64; ValueError unless of this shape and positive (0 is allowed if `zero`)."""
    std = check_finite(std, name)
    if std.shape != shape:
        raise ValueError(f"{name} is {tuple(std.shape)}, expected {tuple(shape)}")
    bad = std < 0 if zero else std <= 0
    if bool(bad.any()):
        raise ValueError(
            f"{name} must be {'not negative' if zero else 'positive'}, but is {float(std[bad][0]):g} "
            f"in row {_first_row(bad)}"
        )
    return std


def check_rate(value: float, name: str) -> float:
    """Return the value as a float; ValueError unless it lies strictly between 0 and 1."""
    if not 0.0 < value < 1.0:
        raise ValueError(f"{name} must lie strictly between 0 and 1, not {value}")
    return float(value)
