"""The Triton kernels of the gradients of `sampled_linear` for the input and for mean and std; noise is drawn again."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vbdl_kernels import regime
from vbdl_kernels.dispatch import fast_math, interpreting, on_device
from vbdl_kernels.noise_kernel import columns_of, load_key, load_tile, matmul, noise4, store_tile, weight, zero_like
from vbdl_kernels.philox import WEIGHT
from vbdl_kernels.sample_weights_kernel import sample_weights
from vbdl_kernels.sampled_linear_kernel import batch_tile, last_contiguous, precision_of


@triton.jit(do_not_specialize=["tag"])
def sampled_linear_input_gradient(
    gradient, mean, std, key, d_x,
    tag, samples, batch, columns, rows, g_sample, g_batch,
    OUT: tl.constexpr, BATCH: tl.constexpr, GROUPS: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Compute d_x[s, b, i] = sum_o gradient[s, b, o] w[s, o, i], with weights drawn transposed, four tiles a step."""
    group_tiles = tl.cdiv(columns, 4 * GROUPS)
    program = tl.program_id(0)
    sample = program % samples
    group = program // samples % group_tiles * GROUPS + tl.arange(0, GROUPS)
    example = program // samples // group_tiles * BATCH + tl.arange(0, BATCH)
    base = columns_of(group)
    in_batch = (example < batch)[None, :]
    k0, k1, draw = load_key(key, sample)
    x0 = tl.zeros((GROUPS, BATCH), tl.float32)
    x1 = tl.zeros((GROUPS, BATCH), tl.float32)
    x2 = tl.zeros((GROUPS, BATCH), tl.float32)
    x3 = tl.zeros((GROUPS, BATCH), tl.float32)
    source = gradient + sample.to(tl.int64) * g_sample + example.to(tl.int64)[None, :] * g_batch
    for start in range(0, rows, OUT):
        row = start + tl.arange(0, OUT)
        in_rows = (row < rows)[None, :]
        if MASKED:
            g = tl.load(source + row[:, None], mask=(row < rows)[:, None] & in_batch, other=0.0)
        else:
            g = tl.load(source + row[:, None], mask=in_batch, other=0.0)
        offset = row[None, :] * columns + base[:, None]
        inside = (base < columns)[:, None] & in_rows
        m = load_tile(mean + offset, inside, MASKED)
        zero = zero_like(m, FAST)
        n0, n1, n2, n3 = noise4(k0, k1, draw, tag, row[None, :] + zero, group[:, None] + zero, FAST)
        w = weight(m, load_tile(std + offset, inside, MASKED), n0, FAST)
        x0 = matmul(w, g, x0, PRECISION, INTERPRET)
        offset += 32
        inside = (base < columns - 32)[:, None] & in_rows
        w = weight(load_tile(mean + offset, inside, MASKED), load_tile(std + offset, inside, MASKED), n1, FAST)
        x1 = matmul(w, g, x1, PRECISION, INTERPRET)
        offset += 32
        inside = (base < columns - 64)[:, None] & in_rows
        w = weight(load_tile(mean + offset, inside, MASKED), load_tile(std + offset, inside, MASKED), n2, FAST)
        x2 = matmul(w, g, x2, PRECISION, INTERPRET)
        offset += 32
        inside = (base < columns - 96)[:, None] & in_rows
        w = weight(load_tile(mean + offset, inside, MASKED), load_tile(std + offset, inside, MASKED), n3, FAST)
        x3 = matmul(w, g, x3, PRECISION, INTERPRET)
    to = d_x + sample.to(tl.int64) * batch * columns + (example.to(tl.int64) * columns)[None, :] + base[:, None]
    tl.store(to, x0.to(d_x.dtype.element_ty), mask=(base < columns)[:, None] & in_batch)
    tl.store(to + 32, x1.to(d_x.dtype.element_ty), mask=(base < columns - 32)[:, None] & in_batch)
    tl.store(to + 64, x2.to(d_x.dtype.element_ty), mask=(base < columns - 64)[:, None] & in_batch)
    tl.store(to + 96, x3.to(d_x.dtype.element_ty), mask=(base < columns - 96)[:, None] & in_batch)


@triton.jit(do_not_specialize=["tag"])
def sampled_linear_parameter_gradient(
    gradient, x, key, d_mean, d_std,
    tag, samples, batch, columns, rows, g_sample, g_batch, x_sample, x_batch,
    OUT: tl.constexpr, BATCH: tl.constexpr, GROUPS: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Compute d_mean = sum_s p[s] and d_std = sum_s noise[s] p[s], with p[s] = gradient[s]^T x[s].

    Each program loops over the draws, so that no p[s] is written to memory and no sum needs atomics.
    """
    group_tiles = tl.cdiv(columns, 128) * 32 // GROUPS
    program = tl.program_id(0)
    group = program % group_tiles * GROUPS + tl.arange(0, GROUPS)
    row = program // group_tiles * OUT + tl.arange(0, OUT)
    base = columns_of(group)
    in_rows = (row < rows)[:, None]
    m0 = tl.zeros((OUT, GROUPS), tl.float32)
    m1, m2, m3, s0, s1, s2, s3 = m0, m0, m0, m0, m0, m0, m0
    for sample in range(0, samples):
        wide = tl.zeros((1, 1), tl.int64) + sample
        p0 = tl.zeros((OUT, GROUPS), tl.float32)
        p1, p2, p3 = p0, p0, p0
        for start in range(0, batch, BATCH):
            example = start + tl.arange(0, BATCH)
            in_batch = example < batch
            from_g = gradient + wide * g_sample + (example.to(tl.int64) * g_batch)[None, :] + row[:, None]
            if MASKED:
                g = tl.load(from_g, mask=in_rows & in_batch[None, :], other=0.0)
            else:
                g = tl.load(from_g, mask=in_batch[None, :], other=0.0)
            from_x = x + wide * x_sample + (example.to(tl.int64) * x_batch)[:, None] + base[None, :]
            if MASKED:
                x0 = tl.load(from_x, mask=in_batch[:, None] & (base < columns)[None, :], other=0.0)
                x1 = tl.load(from_x + 32, mask=in_batch[:, None] & (base < columns - 32)[None, :], other=0.0)
                x2 = tl.load(from_x + 64, mask=in_batch[:, None] & (base < columns - 64)[None, :], other=0.0)
                x3 = tl.load(from_x + 96, mask=in_batch[:, None] & (base < columns - 96)[None, :], other=0.0)
            else:
                x0 = tl.load(from_x, mask=in_batch[:, None], other=0.0)
                x1 = tl.load(from_x + 32, mask=in_batch[:, None], other=0.0)
                x2 = tl.load(from_x + 64, mask=in_batch[:, None], other=0.0)
                x3 = tl.load(from_x + 96, mask=in_batch[:, None], other=0.0)
            p0 = matmul(g, x0, p0, PRECISION, INTERPRET)
            p1 = matmul(g, x1, p1, PRECISION, INTERPRET)
            p2 = matmul(g, x2, p2, PRECISION, INTERPRET)
            p3 = matmul(g, x3, p3, PRECISION, INTERPRET)
        k0, k1, draw = load_key(key, sample)
        zero = zero_like(p0, FAST)
        n0, n1, n2, n3 = noise4(k0, k1, draw, tag, row[:, None] + zero, group[None, :] + zero, FAST)
        m0 += p0
        m1 += p1
        m2 += p2
        m3 += p3
        s0 = tl.fma(p0, n0, s0)
        s1 = tl.fma(p1, n1, s1)
        s2 = tl.fma(p2, n2, s2)
        s3 = tl.fma(p3, n3, s3)
    offset = row[:, None] * columns + base[None, :]
    store_tile(d_mean + offset, m0, in_rows & (base < columns)[None, :], MASKED)
    store_tile(d_mean + offset + 32, m1, in_rows & (base < columns - 32)[None, :], MASKED)
    store_tile(d_mean + offset + 64, m2, in_rows & (base < columns - 64)[None, :], MASKED)
    store_tile(d_mean + offset + 96, m3, in_rows & (base < columns - 96)[None, :], MASKED)
    store_tile(d_std + offset, s0, in_rows & (base < columns)[None, :], MASKED)
    store_tile(d_std + offset + 32, s1, in_rows & (base < columns - 32)[None, :], MASKED)
    store_tile(d_std + offset + 64, s2, in_rows & (base < columns - 64)[None, :], MASKED)
    store_tile(d_std + offset + 96, s3, in_rows & (base < columns - 96)[None, :], MASKED)


def input_gradient_config(batch: int, dtype: torch.dtype, precision: str) -> dict:
    """The tile sizes of the input's gradient, measured on an H100."""
    half = dtype != torch.float32
    tile = batch_tile(batch, 64 if half or precision == "tf32" else 32)
    if not half and precision == "ieee":
        return dict(OUT=16, BATCH=tile, GROUPS=64, num_warps=4, num_stages=2)
    return dict(OUT=16, BATCH=tile, GROUPS=64 if half and tile == 16 else 32, num_warps=2, num_stages=3 if half else 2)


def parameter_gradient_config(batch: int, dtype: torch.dtype) -> dict:
    """The tile sizes of the parameters' gradients, measured on an H100."""
    tile = batch_tile(batch, 32)
    if dtype == torch.float32:
        return dict(OUT=32, BATCH=tile, GROUPS=16, num_warps=2, num_stages=1)
    return dict(OUT=64, BATCH=tile, GROUPS=16, num_warps=4, num_stages=2)


def sampled_linear_input(gradient, mean, std, key, layer, precision) -> Tensor:
    samples, batch, rows = gradient.shape
    columns = mean.shape[1]
    d_x = gradient.new_empty((samples, batch, columns))
    if d_x.numel() == 0:
        return d_x
    if at_once := regime.draws_at_once(samples, batch, rows, columns, gradient.element_size(), precision):
        for start in range(0, samples, at_once):
            some = slice(start, start + at_once)
            weights = sample_weights(mean, std, key[some], layer, WEIGHT)
            torch.bmm(gradient[some], weights, out=d_x[some])
        return d_x
    gradient = last_contiguous(gradient)
    precision = precision_of(precision)
    config = input_gradient_config(batch, gradient.dtype, precision)
    grid = (samples * triton.cdiv(columns, 4 * config["GROUPS"]) * triton.cdiv(batch, config["BATCH"]),)
    with on_device(gradient):
        sampled_linear_input_gradient[grid](
            gradient, mean.contiguous(), std.contiguous(), key.contiguous(), d_x,
            layer << 4, samples, batch, columns, rows, gradient.stride(0), gradient.stride(1),
            MASKED=columns % (4 * config["GROUPS"]) != 0 or rows % config["OUT"] != 0,
            PRECISION=precision_of(precision), FAST=fast_math(gradient), INTERPRET=interpreting(),
            enable_fp_fusion=True, **config,
        )  # fmt: skip
    return d_x


def sampled_linear_parameters(gradient, x, key, layer, precision) -> tuple[Tensor, Tensor]:
    samples, batch, rows = gradient.shape
    columns = x.shape[-1]
    d_mean = gradient.new_empty((rows, columns))
    d_std = torch.empty_like(d_mean)
    if d_mean.numel() == 0:
        return d_mean, d_std
    gradient, x = last_contiguous(gradient), last_contiguous(x)
    config = parameter_gradient_config(batch, gradient.dtype)
    grid = (triton.cdiv(columns, 128) * 32 // config["GROUPS"] * triton.cdiv(rows, config["OUT"]),)
    with on_device(gradient):
        sampled_linear_parameter_gradient[grid](
            gradient, x, key.contiguous(), d_mean, d_std,
            layer << 4, samples, batch, columns, rows, gradient.stride(0), gradient.stride(1),
            x.stride(0) if x.ndim == 3 else 0, x.stride(-2),
            MASKED=columns % 128 != 0 or rows % config["OUT"] != 0,
            PRECISION=precision_of(precision), FAST=fast_math(gradient), INTERPRET=interpreting(),
            enable_fp_fusion=True, **config,
        )  # fmt: skip
    return d_mean, d_std
