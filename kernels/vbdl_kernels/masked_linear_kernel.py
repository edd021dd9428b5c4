"""The Triton kernel of `masked_linear`: an input mask multiplies the weights, an output mask the result."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vbdl_kernels.dispatch import fast_math, interpreting, on_device
from vbdl_kernels.noise_kernel import columns_of, keep_at, load_inputs, load_key, load_tile, matmul, philox, tile_of
from vbdl_kernels.sampled_linear_kernel import last_contiguous, precision_of


@triton.jit(do_not_specialize=["tag", "threshold"])
def masked_linear_forward(
    x, w, bias, key, y,
    tag, threshold, scale, samples, batch, columns, rows, x_sample, x_batch,
    OUT: tl.constexpr, BATCH: tl.constexpr, GROUPS: tl.constexpr, ON_INPUT: tl.constexpr, ONCE: tl.constexpr,
    BIAS: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Compute one tile of y.

    ONCE: all draws share the product (mask on the output, x shared), so one program writes the tile for every draw.
    """
    row, example = tile_of(tl.program_id(0), rows, OUT, BATCH)
    first = tl.program_id(1)
    in_rows = row < rows
    in_batch = example < batch
    source = x + first.to(tl.int64) * x_sample + example.to(tl.int64)[None, :] * x_batch
    k0, k1, draw = load_key(key, first)
    product = tl.zeros((OUT, BATCH), tl.float32)
    for start in range(0, tl.cdiv(columns, 128) * 32, GROUPS):
        group = (start + tl.arange(0, GROUPS))[None, :]
        base = columns_of(start + tl.arange(0, GROUPS))
        if ON_INPUT:
            zero = (group * 0).to(tl.uint32)
            w0, w1, w2, w3 = philox(k0, k1, zero, group.to(tl.uint32), draw + zero, tag.to(tl.uint32) + zero, FAST)
        for j in tl.static_range(4):
            column = base + 32 * j
            offset = row[:, None] * columns + column[None, :]
            tile = load_tile(w + offset, in_rows[:, None] & (column < columns)[None, :], MASKED)
            if INTERPRET:  # the interpreter has no arithmetic on bfloat16
                tile = tile.to(tl.float32)
            if ON_INPUT:
                own = w0 if j == 0 else (w1 if j == 1 else (w2 if j == 2 else w3))
                tile = tile * (own.to(tl.int64) >= threshold).to(tl.float32).to(tile.dtype)
            value = load_inputs(source, column, columns, in_batch, MASKED)
            product = matmul(tile, value, product, PRECISION, INTERPRET)
    if ON_INPUT:
        product *= scale
    if BIAS:
        product += tl.load(bias + row, mask=in_rows, other=0.0).to(tl.float32)[:, None]
    inside = in_rows[:, None] & in_batch[None, :]
    to = y + (example.to(tl.int64) * rows)[None, :] + row[:, None]
    count = samples if ONCE else 1
    for i in range(0, count):
        sample = first + i
        result = product
        if not ON_INPUT:
            k0, k1, draw = load_key(key, sample)
            keep = keep_at(k0, k1, draw, tag, row * 0, row, threshold, FAST)
            result = product * (keep * scale)[:, None]
        step = (tl.zeros((1, 1), tl.int64) + sample) * batch * rows
        tl.store(to + step, result.to(y.dtype.element_ty), mask=inside)


def config(batch: int, dtype: torch.dtype) -> dict:
    """The kernel's tile sizes."""
    tile = max(16, min(64, triton.next_power_of_2(batch)))
    if dtype == torch.float32 or tile > 32:
        return dict(OUT=64, BATCH=tile, GROUPS=32, num_warps=4, num_stages=2)
    return dict(OUT=128, BATCH=tile, GROUPS=32, num_warps=4, num_stages=3)


def masked_linear(x, weight, bias, key, layer, p, side, precision) -> Tensor:
    samples, batch, (rows, columns) = len(key), x.shape[-2], weight.shape
    y = x.new_empty((samples, batch, rows))
    if y.numel() == 0:
        return y
    x, weight = last_contiguous(x), weight.contiguous()
    tile = config(batch, x.dtype)
    once = side == "output" and x.ndim == 2
    tiles = triton.cdiv(rows, tile["OUT"]) * triton.cdiv(batch, tile["BATCH"])
    with on_device(x):
        masked_linear_forward[tiles, 1 if once else samples](
            x, weight, weight if bias is None else bias.contiguous(), key.contiguous(), y,
            layer << 4 | 2, round(p * 2**32), 1 / (1 - p) if p < 1 else 0.0,
            samples, batch, columns, rows, x.stride(0) if x.ndim == 3 else 0, x.stride(-2),
            ON_INPUT=side == "input", ONCE=once, BIAS=bias is not None,
            MASKED=columns % 128 != 0 or rows % tile["OUT"] != 0,
            PRECISION=precision_of(precision), FAST=fast_math(x), INTERPRET=interpreting(),
            enable_fp_fusion=True, **tile,
        )  # fmt: skip
    return y
