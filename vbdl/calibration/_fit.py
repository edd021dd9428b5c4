"""Input checks, the minimizer and one-versus-rest maps shared by the calibrators."""

from collections.abc import Callable

import numpy as np
import torch
from scipy import optimize
from torch import Tensor

from vbdl.metrics._checks import check_finite, check_labels, check_probs_and_labels

# the smallest normal float32, used for probabilities that underflowed to 0
TINY = 1.1754943508222875e-38


def check_logits_and_labels(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Check and return (logits, y): float64 (samples, batch, classes) and int64 (batch,).

    Logits (batch, classes) become one sample. Raises ValueError for NaN or infinite logits, no rows, or fewer than two
    classes.
    """
    values = check_finite(logits, "logits")
    if values.ndim == 2:
        values = values.unsqueeze(0)
    if values.ndim != 3 or values.shape[2] < 2:
        raise ValueError(
            "logits must be (batch, classes) or (samples, batch, classes) with at least two classes, "
            f"not {tuple(logits.shape)}"
        )
    if 0 in values.shape:
        raise ValueError(f"logits has no rows: its shape is {tuple(logits.shape)}")
    return values, check_labels(y, values.shape[1], values.shape[2]).to(values.device)


def require_all_classes(y: Tensor, n_classes: int, method: str) -> None:
    """Raise ValueError if a class has no rows, because its map would be fitted to negatives alone."""
    missing = (torch.bincount(y, minlength=n_classes) == 0).nonzero().squeeze(1).tolist()
    if missing:
        raise ValueError(
            f"{method} fits parameters for every class, but class {missing[0]} "
            f"({len(missing)} of {n_classes} in all) has no row to calibrate on; add rows, or use Temperature, which "
            "has one parameter for all classes"
        )


def minimize(
    loss: Callable[[Tensor], Tensor],
    start: Tensor,
    bounds: list[tuple[float | None, float | None]] | None = None,
) -> Tensor:
    """Minimize a scalar loss of a float64 vector by L-BFGS-B with gradients from autograd; return the vector."""

    def value_and_gradient(x: np.ndarray) -> tuple[float, np.ndarray]:
        point = torch.from_numpy(x.copy()).to(start.device).requires_grad_()
        with torch.enable_grad():
            value = loss(point)
            (gradient,) = torch.autograd.grad(value, point)
        return float(value.detach()), gradient.cpu().numpy().astype(np.float64)

    result = optimize.minimize(
        value_and_gradient,
        start.cpu().numpy().astype(np.float64),
        jac=True,
        method="L-BFGS-B",
        bounds=bounds,
        # ftol at rounding level: the default 2e-9 stops early, with four wrong digits in a temperature
        options={"maxiter": 1000, "maxfun": 5000, "ftol": 1e-15, "gtol": 1e-10, "maxcor": 20},
    )
    if not np.isfinite(result.x).all() or not np.isfinite(result.fun):
        raise RuntimeError(f"the fit became infinite or NaN: {result.message}")
    return torch.from_numpy(np.asarray(result.x)).to(start.device)


def binary_problems(probs: Tensor, y: Tensor, method: str) -> list[tuple[Tensor, Tensor]]:
    """The one-versus-rest problems: a pair (probability, label) for each class, or only for class 1 of two.

    probs: (batch, classes) or (batch,);  y: (batch,)  ->  [((batch,) float64, (batch,) float64)]
    """
    probs, y = check_probs_and_labels(probs, y)
    require_all_classes(y, probs.shape[1], method)
    classes = [1] if probs.shape[1] == 2 else range(probs.shape[1])
    return [(probs[:, k].clamp(0, 1).contiguous(), (y == k).to(torch.float64)) for k in classes]


def one_versus_rest(apply: Callable[[Tensor], Tensor], n_maps: int, probs: Tensor) -> Tensor:
    """Calibrate probabilities with one map for each class; the result has the shape and dtype of probs.

    apply: (maps, batch) -> (maps, batch) in float64.
    For two classes the map of class 1 determines both. For more, each class has its map, and the results are
    normalized; a row that all maps send to 0 keeps its original probabilities.
    """
    if n_maps == 0:
        raise RuntimeError("this calibrator has not been fitted: call fit first")
    binary = probs.ndim == 1
    if not binary and (probs.ndim != 2 or probs.shape[1] != (2 if n_maps == 1 else n_maps)):
        raise ValueError(f"fitted to {2 if n_maps == 1 else n_maps} classes, got probs {tuple(probs.shape)}")
    if binary and n_maps != 1:
        raise ValueError(f"fitted to {n_maps} classes, got binary probabilities (batch,)")
    p = probs.to(torch.float64)
    if n_maps == 1:
        one = apply((p if binary else p[:, 1]).unsqueeze(0).contiguous()).squeeze(0)
        q = one if binary else torch.stack((1 - one, one), dim=1)
    else:
        q = apply(p.T.contiguous()).T
        mass = q.sum(dim=1, keepdim=True)
        q = torch.where(mass > 0, q / torch.where(mass > 0, mass, 1.0), p)
    return q.to(probs.dtype)


def stack_padded(rows: list[Tensor]) -> Tensor:
    """Stack vectors of different lengths as a matrix (rows, longest), each padded with its last value."""
    longest = max(r.numel() for r in rows)
    return torch.stack([torch.cat((r, r[-1:].expand(longest - r.numel()))) for r in rows])
