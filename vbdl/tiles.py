"""Batches of inputs: what a predictor takes, and how they are cut into tiles of one size."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from vbdl.data import as_tensor, check_dtype
from vbdl.stacking import map_inputs, tensors
from vbdl.types import Inputs


def check_inputs(x: Any, device: torch.device, floating: torch.dtype | None) -> tuple[Inputs, int]:
    """The inputs as tensors on the device, and how many rows they have.

    floating: dtype of the parameters. Raises TypeError or ValueError with what to do for anything else than finite
    rows of tensors or arrays.
    """
    x = as_tensor(x)
    found = tensors(x) if isinstance(x, Tensor | Sequence | Mapping) else []
    if not found or not all(isinstance(t, Tensor) for t in found):
        raise TypeError("inputs are tensors or arrays: one, a tuple of them, or a dict by argument name")
    if any(t.ndim < 1 for t in found):
        raise ValueError("inputs have a batch axis first, got a scalar")
    if any(is_functorch_wrapped_tensor(t) for t in found):
        raise NotImplementedError(
            "a predictor cannot be called inside a transform of torch.func: give it all rows at once, and for a "
            "gradient inputs with requires_grad"
        )
    sizes = {t.shape[0] for t in found}
    if len(sizes) > 1:
        raise ValueError(f"inputs disagree on the number of rows: {[tuple(t.shape) for t in found]}")
    check_dtype(x, floating)
    for t in found:
        if not t.is_floating_point():
            continue
        # one reduction in the usual case; a sum that overflows is looked at again
        if not math.isfinite(float(t.detach().sum())) and not bool((ok := t.isfinite().flatten(1).all(1)).all()):
            bad = (~ok).nonzero().flatten().tolist()
            raise ValueError(
                f"{len(bad)} of {len(ok)} rows are not finite, the first is row {bad[0]}: remove or impute them"
            )
    if found[0].device != device:
        x = map_inputs(lambda t: t.to(device), x)
    return x, sizes.pop()


def aligned(t: Tensor) -> Tensor:
    """Contiguous, and from a boundary on, as all that torch allocates: products round by how their inputs lie."""
    if t.is_contiguous() and t.data_ptr() % 64 == 0:
        return t
    return t.clone(memory_format=torch.contiguous_format)


def pad(inputs: Inputs, start: int, rows: int) -> Inputs:
    """Rows [start, start + rows) of every tensor, the last row repeated where there are fewer; contiguous."""

    def one(t: Tensor) -> Tensor:
        piece = t[start : start + rows]
        if piece.shape[0] == rows:
            return aligned(piece)
        padded = t.new_zeros(rows, *t.shape[1:])
        padded[: piece.shape[0]] = piece
        if piece.shape[0]:
            padded[piece.shape[0] :] = piece[-1:]
        return padded

    return map_inputs(one, inputs)
