"""Triton: weights drawn inside the matrix product, forward, gradient of the input, gradient of the parameters.

The drawn weight is the register operand of the tensor-core product (out on M), so it never touches shared or global
memory as a weight. A program draws two samples of the mean and std it reads, which halves their traffic. Samples are
the fastest axis of the grid: programs that read one tile of parameters run side by side and find it in L2.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vbdl_kernels.dispatch import fast_math, interpreting, on_device
from vbdl_kernels.noise_kernel import (
    columns_of,
    load_key,
    load_tile,
    matmul,
    noise4,
    normal_at,
    store_tile,
    weight,
    zero_like,
)


@triton.jit(do_not_specialize=["tag", "bias_tag"])
def sampled_linear_forward(
    x, mean, std, bias_mean, bias_std, key, y,
    tag, bias_tag, samples, batch, columns, rows, x_sample, x_batch,
    OUT: tl.constexpr, BATCH: tl.constexpr, GROUPS: tl.constexpr, DRAWS: tl.constexpr, BIAS: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """y[s, b, o] = sum_i x[s, b, i] w[s, o, i] + bias[s, o].  BIAS: 0 none, 1 fixed, 2 drawn.  x_sample 0: shared."""
    pairs = tl.cdiv(samples, DRAWS)
    out_tiles = tl.cdiv(rows, OUT)
    program = tl.program_id(0)
    first = program % pairs * DRAWS
    second = tl.minimum(first + DRAWS - 1, samples - 1)  # of an odd number of samples, the last twice
    row = program // pairs % out_tiles * OUT + tl.arange(0, OUT)
    example = program // pairs // out_tiles * BATCH + tl.arange(0, BATCH)
    lane = tl.arange(0, GROUPS)
    in_rows = row < rows
    in_batch = example < batch

    ka0, ka1, draw_a = load_key(key, first)
    xa = x + first.to(tl.int64) * x_sample + example.to(tl.int64)[None, :] * x_batch
    ya = tl.zeros((OUT, BATCH), tl.float32)
    if DRAWS == 2:
        kb0, kb1, draw_b = load_key(key, second)
        xb = x + second.to(tl.int64) * x_sample + example.to(tl.int64)[None, :] * x_batch
        yb = tl.zeros((OUT, BATCH), tl.float32)

    for start in range(0, tl.cdiv(columns, 128) * 32, GROUPS):
        group = start + lane
        base = columns_of(group)
        offset = row[:, None] * columns + base[None, :]
        m = load_tile(mean + offset, in_rows[:, None] & (base < columns)[None, :], MASKED)
        zero = zero_like(m, FAST)
        a0, a1, a2, a3 = noise4(ka0, ka1, draw_a, tag, row[:, None] + zero, group[None, :] + zero, FAST)
        a0, a1, a2, a3 = a0.to(m.dtype), a1.to(m.dtype), a2.to(m.dtype), a3.to(m.dtype)
        if DRAWS == 2:
            b0, b1, b2, b3 = noise4(kb0, kb1, draw_b, tag, row[:, None] + zero, group[None, :] + zero, FAST)
            b0, b1, b2, b3 = b0.to(m.dtype), b1.to(m.dtype), b2.to(m.dtype), b3.to(m.dtype)
        for j in tl.static_range(4):
            column = base + 32 * j
            offset = row[:, None] * columns + column[None, :]
            in_weight = in_rows[:, None] & (column < columns)[None, :]
            if j > 0:
                m = load_tile(mean + offset, in_weight, MASKED)
            s = load_tile(std + offset, in_weight, MASKED)
            if MASKED:
                in_x = (column < columns)[:, None] & in_batch[None, :]
            else:
                in_x = in_batch[None, :]
            noise = a0 if j == 0 else (a1 if j == 1 else (a2 if j == 2 else a3))
            value = tl.load(xa + column[:, None], mask=in_x, other=0.0)
            ya = matmul(weight(m, s, noise, FAST), value, ya, PRECISION, INTERPRET)
            if DRAWS == 2:
                noise = b0 if j == 0 else (b1 if j == 1 else (b2 if j == 2 else b3))
                value = tl.load(xb + column[:, None], mask=in_x, other=0.0)
                yb = matmul(weight(m, s, noise, FAST), value, yb, PRECISION, INTERPRET)

    inside = in_rows[:, None] & in_batch[None, :]
    to = y + (example.to(tl.int64) * rows)[None, :] + row[:, None]
    if BIAS > 0:
        m = tl.load(bias_mean + row, mask=in_rows, other=0.0)
        if BIAS == 2:
            s = tl.load(bias_std + row, mask=in_rows, other=0.0)
            bias_a = weight(m, s, normal_at(ka0, ka1, draw_a, bias_tag, row * 0, row, FAST), FAST)
            if DRAWS == 2:
                bias_b = weight(m, s, normal_at(kb0, kb1, draw_b, bias_tag, row * 0, row, FAST), FAST)
        else:
            bias_a = m
            if DRAWS == 2:
                bias_b = m
        ya += bias_a.to(tl.float32)[:, None]
        if DRAWS == 2:
            yb += bias_b.to(tl.float32)[:, None]
    tl.store(to + first.to(tl.int64) * batch * rows, ya.to(y.dtype.element_ty), mask=inside)
    if DRAWS == 2:
        tl.store(to + second.to(tl.int64) * batch * rows, yb.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tag"])
def sampled_linear_input_gradient(
    gradient, mean, std, key, d_x,
    tag, samples, batch, columns, rows, g_sample, g_batch,
    OUT: tl.constexpr, BATCH: tl.constexpr, GROUPS: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """d_x[s, b, i] = sum_o gradient[s, b, o] w[s, o, i]: the weights drawn transposed, four input tiles at a time."""
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
    """With p[s] = gradient[s]^T x[s]: d_mean = sum_s p[s], d_std = sum_s noise[s] p[s]. The draws are a loop inside
    the program, so that no p[s] reaches memory and no sum needs an atomic."""
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


def _batch_tile(batch: int, largest: int) -> int:
    return max(16, min(largest, triton.next_power_of_2(batch)))


def forward_config(batch: int, samples: int, dtype: torch.dtype, precision: str) -> dict:
    """Tile sizes that tests/kernels/test_compiled.py holds to no spills and to the instruction budget."""
    half = dtype != torch.float32
    tile = _batch_tile(batch, 128 if half else 64)
    if not half and precision == "ieee":  # scalar products: registers and instructions for each pair
        return dict(OUT=64, BATCH=max(32, tile), GROUPS=16, DRAWS=1, num_warps=4, num_stages=2)
    draws = 2 if tile <= (32 if half else 16) and samples > 1 else 1
    # two draws of 32 groups spill at 32 rows under Triton 3.6; at 128 rows they take more shared memory than sm_89 has
    groups = 32 if half and tile in (16, 64) else 16
    return dict(OUT=64, BATCH=tile, GROUPS=groups, DRAWS=draws, num_warps=4, num_stages=2)


def input_gradient_config(batch: int, dtype: torch.dtype, precision: str) -> dict:
    half = dtype != torch.float32
    largest = 64 if half or precision == "tf32" else 32
    return dict(OUT=32 if half else 16, BATCH=_batch_tile(batch, largest), GROUPS=64, num_warps=4, num_stages=2)


def parameter_gradient_config(batch: int, dtype: torch.dtype) -> dict:
    # four warps along out: with more, cards before Hopper repeat the noise in each
    return dict(OUT=64, BATCH=_batch_tile(batch, 32), GROUPS=16, num_warps=4, num_stages=2)


def precision_of(precision: str) -> str:
    """ "" follows torch: `torch.set_float32_matmul_precision`."""
    return precision or ("ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32")


def last_contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def sampled_linear(x, mean, std, bias_mean, bias_std, key, layer, precision, bias_layer) -> Tensor:
    samples, batch, (rows, columns) = len(key), x.shape[-2], mean.shape
    y = x.new_empty((samples, batch, rows))
    if y.numel() == 0:
        return y
    x = last_contiguous(x)
    precision = precision_of(precision)
    config = forward_config(batch, samples, x.dtype, precision)
    grid = (
        triton.cdiv(samples, config["DRAWS"]) * triton.cdiv(rows, config["OUT"]) * triton.cdiv(batch, config["BATCH"]),
    )
    mean = mean.contiguous()
    with on_device(x):
        sampled_linear_forward[grid](
            x, mean, std.contiguous(), mean if bias_mean is None else bias_mean.contiguous(),
            mean if bias_std is None else bias_std.contiguous(), key.contiguous(), y,
            layer << 4, bias_layer << 4 | 1, samples, batch, columns, rows,
            x.stride(0) if x.ndim == 3 else 0, x.stride(-2),
            BIAS=(bias_mean is not None) + (bias_std is not None),
            MASKED=columns % 128 != 0 or rows % config["OUT"] != 0,
            PRECISION=precision, FAST=fast_math(x), INTERPRET=interpreting(), enable_fp_fusion=True, **config,
        )  # fmt: skip
    return y


def sampled_linear_input(gradient, mean, std, key, layer, precision) -> Tensor:
    samples, batch, rows = gradient.shape
    columns = mean.shape[1]
    d_x = gradient.new_empty((samples, batch, columns))
    if d_x.numel() == 0:
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
    d_mean = gradient.new_empty((rows, columns), dtype=torch.float32)
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
