"""The Triton kernels of `sample_weights` and its gradient, which computes the noise again."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vbdl_kernels.dispatch import fast_math, on_device
from vbdl_kernels.noise_kernel import columns_of, load_key, load_tile, noise4, store_tile, weight, zero_like
from vbdl_kernels.sample_weights import rows_columns

_DRAWS = 4  # the number of draws that a program makes from one read of mean and std


@triton.jit(do_not_specialize=["tag"])
def sample_weights_forward(
    mean, std, key, weights,
    tag, samples, rows, columns,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, DRAWS: tl.constexpr, MASKED: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Write weights[s, r, c] = mean[r, c] + std[r, c] * noise[s, r, c], all contiguous.

    Draws are the fast axis of the grid: the programs that read the same tile run side by side, so all but the first
    read it from L2.
    """
    group_tiles = tl.cdiv(columns, 4 * GROUPS)
    draws = tl.cdiv(samples, DRAWS)
    tile = tl.program_id(0) // draws
    row = tile // group_tiles * ROWS + tl.arange(0, ROWS)
    group = tile % group_tiles * GROUPS + tl.arange(0, GROUPS)
    column = columns_of(group)
    offset = row[:, None] * columns + column[None, :]
    in_rows = (row < rows)[:, None]
    mask0 = in_rows & (column < columns)[None, :]
    mask1 = in_rows & (column < columns - 32)[None, :]
    mask2 = in_rows & (column < columns - 64)[None, :]
    mask3 = in_rows & (column < columns - 96)[None, :]
    m0 = load_tile(mean + offset, mask0, MASKED)
    m1 = load_tile(mean + offset + 32, mask1, MASKED)
    m2 = load_tile(mean + offset + 64, mask2, MASKED)
    m3 = load_tile(mean + offset + 96, mask3, MASKED)
    s0 = load_tile(std + offset, mask0, MASKED)
    s1 = load_tile(std + offset + 32, mask1, MASKED)
    s2 = load_tile(std + offset + 64, mask2, MASKED)
    s3 = load_tile(std + offset + 96, mask3, MASKED)
    zero = zero_like(m0, FAST)
    first = tl.program_id(0) % draws * DRAWS
    for sample in range(first, tl.minimum(first + DRAWS, samples)):
        k0, k1, draw = load_key(key, sample)
        n0, n1, n2, n3 = noise4(k0, k1, draw, tag, row[:, None] + zero, group[None, :] + zero, FAST)
        to = weights + (tl.zeros((1, 1), tl.int64) + sample) * rows * columns + offset
        store_tile(to, weight(m0, s0, n0, FAST), mask0, MASKED)
        store_tile(to + 32, weight(m1, s1, n1, FAST), mask1, MASKED)
        store_tile(to + 64, weight(m2, s2, n2, FAST), mask2, MASKED)
        store_tile(to + 96, weight(m3, s3, n3, FAST), mask3, MASKED)


@triton.jit(do_not_specialize=["tag"])
def sample_weights_backward(
    gradient, key, d_mean, d_std,
    tag, samples, rows, columns,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, MASKED: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Compute d_mean = sum of gradient over draws and d_std = sum of gradient * noise, in float32, in one read."""
    group_tiles = tl.cdiv(columns, 4 * GROUPS)
    tile = tl.program_id(0)
    row = tile // group_tiles * ROWS + tl.arange(0, ROWS)
    group = tile % group_tiles * GROUPS + tl.arange(0, GROUPS)
    column = columns_of(group)
    offset = row[:, None] * columns + column[None, :]
    in_rows = (row < rows)[:, None]
    mask0 = in_rows & (column < columns)[None, :]
    mask1 = in_rows & (column < columns - 32)[None, :]
    mask2 = in_rows & (column < columns - 64)[None, :]
    mask3 = in_rows & (column < columns - 96)[None, :]
    m0 = tl.zeros((ROWS, GROUPS), tl.float32)
    m1, m2, m3, s0, s1, s2, s3 = m0, m0, m0, m0, m0, m0, m0
    for sample in range(0, samples):
        k0, k1, draw = load_key(key, sample)
        source = gradient + (tl.zeros((1, 1), tl.int64) + sample) * rows * columns + offset
        g0 = load_tile(source, mask0, MASKED).to(tl.float32)
        g1 = load_tile(source + 32, mask1, MASKED).to(tl.float32)
        g2 = load_tile(source + 64, mask2, MASKED).to(tl.float32)
        g3 = load_tile(source + 96, mask3, MASKED).to(tl.float32)
        zero = zero_like(g0, FAST)
        n0, n1, n2, n3 = noise4(k0, k1, draw, tag, row[:, None] + zero, group[None, :] + zero, FAST)
        m0 += g0
        m1 += g1
        m2 += g2
        m3 += g3
        s0 = tl.fma(g0, n0, s0)
        s1 = tl.fma(g1, n1, s1)
        s2 = tl.fma(g2, n2, s2)
        s3 = tl.fma(g3, n3, s3)
    store_tile(d_mean + offset, m0, mask0, MASKED)
    store_tile(d_mean + offset + 32, m1, mask1, MASKED)
    store_tile(d_mean + offset + 64, m2, mask2, MASKED)
    store_tile(d_mean + offset + 96, m3, mask3, MASKED)
    store_tile(d_std + offset, s0, mask0, MASKED)
    store_tile(d_std + offset + 32, s1, mask1, MASKED)
    store_tile(d_std + offset + 64, s2, mask2, MASKED)
    store_tile(d_std + offset + 96, s3, mask3, MASKED)


def _config(rows: int) -> dict:
    """The tile sizes for a parameter of this many rows: few rows (a vector has one) get wide tiles."""
    if rows < 8:
        return dict(ROWS=1, GROUPS=128, num_warps=4)
    return dict(ROWS=min(16, triton.next_power_of_2(rows)), GROUPS=32, num_warps=2)


def forward_config(rows: int) -> dict:
    return _config(rows) | dict(DRAWS=_DRAWS)


def gradient_config(rows: int) -> dict:
    return _config(rows) | dict(num_warps=4)


def sample_weights(mean: Tensor, std: Tensor, key: Tensor, layer: int, stream: int) -> Tensor:
    samples, (rows, columns) = len(key), rows_columns(mean.shape)
    weights = mean.new_empty((samples, *mean.shape))
    if weights.numel() == 0:
        return weights
    config = forward_config(rows)
    masked = rows % config["ROWS"] != 0 or columns % (4 * config["GROUPS"]) != 0
    tiles = triton.cdiv(rows, config["ROWS"]) * triton.cdiv(columns, 4 * config["GROUPS"])
    with on_device(mean):
        sample_weights_forward[(tiles * triton.cdiv(samples, _DRAWS),)](
            mean.contiguous(), std.contiguous(), key.contiguous(), weights,
            layer << 4 | stream, samples, rows, columns,
            MASKED=masked, FAST=fast_math(mean), enable_fp_fusion=True, **config,
        )  # fmt: skip
    return weights


def sample_weights_gradient(gradient: Tensor, key: Tensor, layer: int, stream: int) -> tuple[Tensor, Tensor]:
    samples, (rows, columns) = len(key), rows_columns(gradient.shape[1:])
    d_mean = gradient.new_empty(gradient.shape[1:], dtype=torch.float32)
    d_std = torch.empty_like(d_mean)
    if gradient.numel() == 0:
        return d_mean.zero_(), d_std.zero_()
    config = gradient_config(rows)
    masked = rows % config["ROWS"] != 0 or columns % (4 * config["GROUPS"]) != 0
    tiles = triton.cdiv(rows, config["ROWS"]) * triton.cdiv(columns, 4 * config["GROUPS"])
    with on_device(gradient):
        sample_weights_backward[(tiles,)](
            gradient.contiguous(), key.contiguous(), d_mean, d_std,
            layer << 4 | stream, samples, rows, columns,
            MASKED=masked, FAST=fast_math(gradient), enable_fp_fusion=True, **config,
        )  # fmt: skip
    return d_mean, d_std
