"""Batches of inputs: what a predictor takes, and how they are cut into tiles of one size."""

import math
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from vbdl.calling.inputs import Flat, flatten
from vbdl.data.rows import check_dtype


def check_inputs(x: Any, device: torch.device, floating: torch.dtype | None) -> Flat:
    """The inputs flat, their tensors on the device.

    floating: dtype of the parameters. Raises TypeError or ValueError with what to do for anything else than finite
    rows of tensors or arrays.
    """
    flat = flatten(x)
    if not flat.tensors:
        raise TypeError("inputs are tensors or arrays: one, a tuple of them, or a dict by argument name; there is none")
    if any(t.ndim < 1 for t in flat.tensors):
        raise ValueError("inputs have a batch axis first, got a scalar")
    if any(is_functorch_wrapped_tensor(t) for t in flat.tensors):
        raise NotImplementedError(
            "a predictor cannot be called inside a transform of torch.func: give it all rows at once, and for a "
            "gradient inputs with requires_grad"
        )
    if len({t.shape[0] for t in flat.tensors}) > 1:
        raise ValueError(f"inputs disagree on the number of rows: {[tuple(t.shape) for t in flat.tensors]}")
    check_dtype(flat.tensors, floating)
    for t in flat.tensors:
        if not t.is_floating_point():
            continue
        # one reduction in the usual case; a sum that overflows is looked at again
        if not math.isfinite(float(t.detach().sum())) and not bool((ok := t.isfinite().flatten(1).all(1)).all()):
            bad = (~ok).nonzero().flatten().tolist()
            raise ValueError(
                f"{len(bad)} of {len(ok)} rows are not finite, the first is row {bad[0]}: remove or impute them"
            )
    return flat if flat.tensors[0].device == device else flat.map(lambda t: t.to(device))


def aligned(t: Tensor) -> Tensor:
    """The tensor, contiguous and on a boundary of 64 bytes as torch allocates: products round by how inputs lie."""
    if t.is_contiguous() and t.data_ptr() % 64 == 0:
        return t
    return t.clone(memory_format=torch.contiguous_format)


def padded(t: Tensor, start: int, rows: int) -> Tensor:
    """Rows [start, start + rows) of a tensor, the last row repeated where there are fewer; contiguous."""
    piece = t[start : start + rows]
    if piece.shape[0] == rows:
        return aligned(piece)
    tile = t.new_zeros(rows, *t.shape[1:])
    tile[: piece.shape[0]] = piece
    if piece.shape[0]:
        tile[piece.shape[0] :] = piece[-1:]
    return tile


def pad(inputs: Flat, start: int, rows: int) -> Flat:
    """The tile of rows [start, start + rows) of the inputs, padded."""
    return inputs.map(lambda t: padded(t, start, rows))
