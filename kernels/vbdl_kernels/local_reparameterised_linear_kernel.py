"""Triton: both moments of a linear layer from one read of x, the noise of every draw in the epilogue."""

import triton
import triton.language as tl
from torch import Tensor

from vbdl_kernels.dispatch import fast_math, interpreting, on_device
from vbdl_kernels.noise_kernel import load_inputs, load_key, load_tile, matmul, normal_at, tile_of
from vbdl_kernels.sampled_linear_kernel import last_contiguous, precision_of


@triton.jit(do_not_specialize=["tag"])
def local_reparameterised_forward(
    x, mean, std, bias_mean, bias_std, key, y,
    tag, samples, batch, columns, rows, x_sample, x_batch,
    OUT: tl.constexpr, BATCH: tl.constexpr, IN: tl.constexpr, BIAS: tl.constexpr, SHARED: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """SHARED: one program makes the moments once and every draw of them; else a program is one draw."""
    row, example = tile_of(tl.program_id(0), rows, OUT, BATCH)
    first = tl.program_id(1)
    in_rows = row < rows
    in_batch = example < batch
    source = x + first.to(tl.int64) * x_sample + example.to(tl.int64)[None, :] * x_batch
    m = tl.zeros((OUT, BATCH), tl.float32)
    v = tl.zeros((OUT, BATCH), tl.float32)
    for start in range(0, columns, IN):
        column = start + tl.arange(0, IN)
        offset = row[:, None] * columns + column[None, :]
        in_weight = in_rows[:, None] & (column < columns)[None, :]
        value = load_inputs(source, column, columns, in_batch, MASKED)
        m = matmul(load_tile(mean + offset, in_weight, MASKED), value, m, PRECISION, INTERPRET)
        s = load_tile(std + offset, in_weight, MASKED)
        if INTERPRET:  # which does no arithmetic on bfloat16
            s = s.to(tl.float32)
            value = value.to(tl.float32)
        v = matmul(s * s, value * value, v, PRECISION, INTERPRET)
    if BIAS > 0:
        m += tl.load(bias_mean + row, mask=in_rows, other=0.0).to(tl.float32)[:, None]
    if BIAS == 2:
        s = tl.load(bias_std + row, mask=in_rows, other=0.0).to(tl.float32)
        v += (s * s)[:, None]
    root = tl.sqrt(v)
    inside = in_rows[:, None] & in_batch[None, :]
    to = y + (example.to(tl.int64) * rows)[None, :] + row[:, None]
    count = samples if SHARED else 1
    for i in range(0, count):
        sample = first + i
        k0, k1, draw = load_key(key, sample)
        noise = normal_at(k0, k1, draw, tag, row * 0, row, FAST)
        step = (tl.zeros((1, 1), tl.int64) + sample) * batch * rows
        tl.store(to + step, (m + root * noise[:, None]).to(y.dtype.element_ty), mask=inside)


def config(batch: int) -> dict:
    return dict(
        OUT=64, BATCH=max(16, min(64, triton.next_power_of_2(batch))), IN=32, num_warps=4, num_stages=3
    )  # fmt: skip


def local_reparameterised_linear(x, mean, std, bias_mean, bias_std, key, layer, precision) -> Tensor:
    samples, batch, (rows, columns) = len(key), x.shape[-2], mean.shape
    y = x.new_empty((samples, batch, rows))
    if y.numel() == 0:
        return y
    x, mean, std = last_contiguous(x), mean.contiguous(), std.contiguous()
    tile = config(batch)
    tiles = triton.cdiv(rows, tile["OUT"]) * triton.cdiv(batch, tile["BATCH"])
    shared = x.ndim == 2
    with on_device(x):
        local_reparameterised_forward[tiles, 1 if shared else samples](
            x, mean, std, mean if bias_mean is None else bias_mean.contiguous(),
            mean if bias_std is None else bias_std.contiguous(), key.contiguous(), y,
            layer << 4 | 3, samples, batch, columns, rows, 0 if shared else x.stride(0), x.stride(-2),
            BIAS=(bias_mean is not None) + (bias_std is not None), SHARED=shared,
            MASKED=columns % tile["IN"] != 0 or rows % tile["OUT"] != 0,
            PRECISION=precision_of(precision), FAST=fast_math(x), INTERPRET=interpreting(),
            enable_fp_fusion=True, **tile,
        )  # fmt: skip
    return y
