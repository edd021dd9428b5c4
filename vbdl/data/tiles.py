"""Inputs of a predictor: their checks, and cutting them into tiles of a fixed number of rows."""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from vbdl.calling.autograd import is_transformed
from vbdl.calling.inputs import Flat, flatten
from vbdl.data.rows import check_dtype


def check_inputs(
    x: object, device: torch.device, floating: torch.dtype | None, takes: Callable[[Flat], bool] = lambda rows: False
) -> Flat:
    """Check the inputs, flatten them, and move their tensors to the device.

    floating: dtype of the parameters. takes: whether the network takes rows of another dtype or that are not finite.
    Raises TypeError or ValueError unless the inputs are dense tensors or arrays of rows that are finite or taken, and
    NotImplementedError for tensors of a transform of torch.func and for dual numbers.
    """
    flat = flatten(x)
    if not flat.tensors:
        raise TypeError("inputs must be tensors or arrays: one, a tuple of them, or a dict by argument name; got none")
    for t in flat.tensors:
        if t.layout != torch.strided or t.is_nested or t.device.type == "meta" or t.is_quantized:
            raise ValueError(f"inputs must be dense tensors with numbers, got {_kind(t)}")
    if any(t.ndim < 1 for t in flat.tensors):
        raise ValueError("inputs must have a batch axis first, got a scalar")
    if any(map(is_transformed, flat.tensors)):
        raise NotImplementedError(
            "a predictor cannot be called inside a transform of torch.func, nor on dual numbers of forward mode: call "
            "it on all rows at once, and for gradients on inputs with requires_grad (torch.autograd.functional has "
            "jvp, jacobian and hessian)"
        )
    if len({t.shape[0] for t in flat.tensors}) > 1:
        raise ValueError(f"inputs disagree on the number of rows: {[tuple(t.shape) for t in flat.tensors]}")
    moved = flat if flat.tensors[0].device == device else flat.map(lambda t: t.to(device))
    check_dtype(flat.tensors, floating, lambda: flat.rows > 0 and takes(moved.map(lambda t: t[:1])))
    if not len(bad := not_finite(flat)):
        return moved
    if not takes(moved.map(lambda t: t[bad.to(device)])):
        raise of_not_finite(bad, flat.rows)
    return replace(moved, not_finite=bad)


def of_not_finite(bad: Tensor, rows: int) -> ValueError:
    """Make the error for rows that are not finite, of which the network makes no finite numbers; bad: their numbers."""
    return ValueError(
        f"{len(bad)} of {rows} rows are not finite, the first is row {int(bad[0])}, and the network makes no finite "
        f"numbers of them: remove or impute them"
    )


def not_finite(flat: Flat) -> Tensor:
    """Find the rows that are not finite; returns their numbers, (n,) int64."""
    finite = None
    for t in flat.tensors:
        # finite rows cost one reduction; a sum may overflow, so check each element if it is not finite
        if t.is_floating_point() and not math.isfinite(float(t.detach().sum())):
            own = (t.detach().isfinite().flatten(1).all(1) if t.ndim > 1 else t.detach().isfinite()).cpu()
            finite = own if finite is None else finite & own
    return torch.empty(0, dtype=torch.int64) if finite is None else (~finite).nonzero().flatten()


def kinds_not_finite(flat: Flat) -> tuple[tuple[bool, ...], ...]:
    """Return for each tensor whether it has NaN, infinity and minus infinity among its numbers."""
    having = lambda t: (bool(t.isnan().any()), bool(t.isposinf().any()), bool(t.isneginf().any()))
    return tuple(having(t) if t.is_floating_point() else () for t in flat.tensors)


def _kind(t: Tensor) -> str:
    """A tensor that is no input in words, with what to do."""
    if t.is_nested:
        return "a nested tensor: pad it with t.to_padded_tensor(0.0), and give the network a mask of what is padding"
    if t.device.type == "meta":
        return "a tensor on the meta device, which has none"
    if t.is_quantized:
        return "a quantized tensor: convert it with t.dequantize()"
    return f"a tensor of layout {t.layout}: convert it with t.to_dense()"


def aligned(t: Tensor) -> Tensor:
    """The tensor, contiguous and 64-byte aligned, as torch allocates: the rounding of products depends on alignment."""
    if t.layout != torch.strided or (t.is_contiguous() and t.data_ptr() % 64 == 0):  # sparse ones have no rows to align
        return t
    return t.clone(memory_format=torch.contiguous_format)


def padded(t: Tensor, start: int, rows: int) -> Tensor:
    """Rows [start, start + rows) of a tensor, contiguous; copies of the last row fill up missing rows."""
    # an alias, which is a new tensor as a slice is
    piece = t.detach() if start == 0 and t.shape[0] == rows and not t.requires_grad else t[start : start + rows]
    if piece.shape[0] == rows:
        return aligned(piece)
    tile = t.new_zeros(rows, *t.shape[1:])
    tile[: piece.shape[0]] = piece
    if piece.shape[0]:
        tile[piece.shape[0] :] = piece[-1:]
    return tile


def pad(inputs: Flat, start: int, rows: int) -> Flat:
    """The tile of rows [start, start + rows) of the inputs, filled up with copies of the last row."""
    return inputs.map(lambda t: padded(t, start, rows))
