"""The Triton kernel of `local_reparameterized_linear`: mean and variance from one read of x, then noise."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vbdl_kernels.dispatch import fast_math, interpreting, on_device
from vbdl_kernels.noise_kernel import load_inputs, load_key, load_tile, matmul, normal_at
from vbdl_kernels.sampled_linear_kernel import last_contiguous, precision_of


@triton.jit(do_not_specialize=["tag"])
def local_reparameterized_forward(
    x, mean, std, bias_mean, bias_std, key, y,
    tag, samples, draws, batch, columns, rows, x_sample, x_batch,
    OUT: tl.constexpr, DRAWS: tl.constexpr, BATCH: tl.constexpr, IN: tl.constexpr, BIAS: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Compute one tile of outputs for several draws.

    If all draws share the input (DRAWS is 1), a program computes the moments once and then `draws` draws. Otherwise the
    examples of DRAWS = `draws` draws are the columns of one product.
    """
    out_tiles = tl.cdiv(rows, OUT)
    row = tl.program_id(0) % out_tiles * OUT + tl.arange(0, OUT)
    at = tl.arange(0, DRAWS * BATCH)
    example = tl.program_id(0) // out_tiles * BATCH + at % BATCH
    first = tl.program_id(1) * draws
    of = first + at // BATCH  # the draw that a column of the product belongs to
    in_rows = row < rows
    in_batch = (example < batch) & (of < samples)
    source = x + (of.to(tl.int64) * x_sample + example.to(tl.int64) * x_batch)[None, :]
    m = tl.zeros((OUT, DRAWS * BATCH), tl.float32)
    v = tl.zeros((OUT, DRAWS * BATCH), tl.float32)
    for start in range(0, columns, IN):
        column = start + tl.arange(0, IN)
        offset = row[:, None] * columns + column[None, :]
        in_weight = in_rows[:, None] & (column < columns)[None, :]
        value = load_inputs(source, column, columns, in_batch, MASKED)
        m = matmul(load_tile(mean + offset, in_weight, MASKED), value, m, PRECISION, INTERPRET)
        s = load_tile(std + offset, in_weight, MASKED)
        if INTERPRET:  # the interpreter has no arithmetic on bfloat16
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
    if DRAWS == 1:
        for sample in range(first, tl.minimum(first + draws, samples)):
            k0, k1, draw = load_key(key, sample)
            noise = normal_at(k0, k1, draw, tag, row * 0, row, FAST)
            step = (tl.zeros((1, 1), tl.int64) + sample) * batch * rows
            tl.store(to + step, (m + root * noise[:, None]).to(y.dtype.element_ty), mask=inside)
    else:
        k0, k1, draw = load_key(key, tl.minimum(first + tl.arange(0, DRAWS), samples - 1)[None, :])
        noise = normal_at(k0, k1, draw, tag, row[:, None] * 0, row[:, None], FAST)  # (OUT, DRAWS)
        noise = tl.reshape(tl.broadcast_to(noise[:, :, None], (OUT, DRAWS, BATCH)), (OUT, DRAWS * BATCH))
        step = (of.to(tl.int64) * batch * rows)[None, :]
        tl.store(to + step, (m + root * noise).to(y.dtype.element_ty), mask=inside)


_PROGRAMS = 256  # programs that keep a card busy; with fewer tiles, several programs compute the same moments


def config(batch: int, samples: int, columns: int, dtype: torch.dtype) -> dict:
    """The kernel's tile sizes, measured on an H100.

    samples: the number of draws with different inputs, 1 if all share one. With enough rows to fill a tile, the product
    limits the speed; otherwise the number of programs that read memory does.
    """
    half = dtype != torch.float32
    tile = min(64, triton.next_power_of_2(batch))
    if samples > 1:
        few = samples * batch <= 512
        draws = min((32 if few else 128) // tile, triton.next_power_of_2(samples)) or 1
        shape = dict(OUT=32 if few else 64, DRAWS=draws, BATCH=max(tile, 16 // draws), IN=64 if half else 32)
        return shape | dict(num_warps=4, num_stages=3)
    shape = dict(OUT=32, DRAWS=1, BATCH=max(16, tile))
    if not half or columns < 2048:
        return shape | dict(IN=64, num_warps=2, num_stages=3)
    if batch > 64:
        return shape | dict(OUT=64, IN=64, num_warps=4, num_stages=4)
    return shape | dict(IN=128, num_warps=4, num_stages=4 if tile <= 32 else 3)


def local_reparameterized_linear(x, mean, std, bias_mean, bias_std, key, layer, precision) -> Tensor:
    samples, batch, (rows, columns) = len(key), x.shape[-2], mean.shape
    y = x.new_empty((samples, batch, rows))
    if y.numel() == 0:
        return y
    x, mean, std = last_contiguous(x), mean.contiguous(), std.contiguous()
    shared = x.ndim == 2 or samples == 1
    tile = config(batch, 1 if shared else samples, columns, x.dtype)
    tiles = triton.cdiv(rows, tile["OUT"]) * triton.cdiv(batch, tile["BATCH"])
    draws = triton.cdiv(samples, triton.cdiv(_PROGRAMS, tiles)) if shared else tile["DRAWS"]
    with on_device(x):
        local_reparameterized_forward[tiles, triton.cdiv(samples, draws)](
            x, mean, std, mean if bias_mean is None else bias_mean.contiguous(),
            mean if bias_std is None else bias_std.contiguous(), key.contiguous(), y,
            layer << 4 | 3, samples, draws, batch, columns, rows, 0 if shared else x.stride(0), x.stride(-2),
            BIAS=(bias_mean is not None) + (bias_std is not None),
            MASKED=columns % tile["IN"] != 0 or rows % tile["OUT"] != 0,
            PRECISION=precision_of(precision), FAST=fast_math(x), INTERPRET=interpreting(),
            enable_fp_fusion=True, **tile,
        )  # fmt: skip
    return y
