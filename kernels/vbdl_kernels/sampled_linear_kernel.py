"""The Triton kernel of `sampled_linear`, which draws weights inside the matrix product.

The drawn weights are the register operand of the tensor-core product (outputs on M), so they are in neither shared nor
global memory. Samples are the fastest axis of the grid: programs that read the same tile of parameters run side by side
and read it from L2. Two samples for each program would halve that traffic, but were slower on an H100: fewer warps fit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vbdl_kernels import regime
from vbdl_kernels.dispatch import fast_math, interpreting, on_device
from vbdl_kernels.noise_kernel import (
    columns_of,
    load_inputs,
    load_key,
    load_tile,
    matmul,
    noise4,
    normal_at,
    tile_of,
    weight,
    zero_like,
)
from vbdl_kernels.philox import BIAS, WEIGHT
from vbdl_kernels.sample_weights_kernel import sample_weights


@triton.jit(do_not_specialize=["tag", "bias_tag"])
def sampled_linear_forward(
    x, mean, std, bias_mean, bias_std, key, y,
    tag, bias_tag, samples, batch, columns, rows, x_sample, x_batch,
    OUT: tl.constexpr, BATCH: tl.constexpr, GROUPS: tl.constexpr, BIAS: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Compute one tile of y[s, b, o] = sum_i x[s, b, i] w[s, o, i] + bias[s, o].

    BIAS: 0 none, 1 fixed, 2 drawn. x_sample: the stride of samples in x, 0 if all share it.
    """
    sample = tl.program_id(0) % samples
    row, example = tile_of(tl.program_id(0) // samples, rows, OUT, BATCH)
    in_rows = row < rows
    in_batch = example < batch
    k0, k1, draw = load_key(key, sample)
    source = x + sample.to(tl.int64) * x_sample + example.to(tl.int64)[None, :] * x_batch
    product = tl.zeros((OUT, BATCH), tl.float32)
    for start in range(0, tl.cdiv(columns, 128) * 32, GROUPS):
        group = start + tl.arange(0, GROUPS)
        base = columns_of(group)
        offset = row[:, None] * columns + base[None, :]
        m = load_tile(mean + offset, in_rows[:, None] & (base < columns)[None, :], MASKED)
        zero = zero_like(m, FAST)
        n0, n1, n2, n3 = noise4(k0, k1, draw, tag, row[:, None] + zero, group[None, :] + zero, FAST)
        n0, n1, n2, n3 = n0.to(m.dtype), n1.to(m.dtype), n2.to(m.dtype), n3.to(m.dtype)
        for j in tl.static_range(4):
            column = base + 32 * j
            offset = row[:, None] * columns + column[None, :]
            in_weight = in_rows[:, None] & (column < columns)[None, :]
            if j > 0:
                m = load_tile(mean + offset, in_weight, MASKED)
            s = load_tile(std + offset, in_weight, MASKED)
            noise = n0 if j == 0 else (n1 if j == 1 else (n2 if j == 2 else n3))
            value = load_inputs(source, column, columns, in_batch, MASKED)
            product = matmul(weight(m, s, noise, FAST), value, product, PRECISION, INTERPRET)
    if BIAS > 0:
        bias = tl.load(bias_mean + row, mask=in_rows, other=0.0)
        if BIAS == 2:
            s = tl.load(bias_std + row, mask=in_rows, other=0.0)
            bias = weight(bias, s, normal_at(k0, k1, draw, bias_tag, row * 0, row, FAST), FAST)
        product += bias.to(tl.float32)[:, None]
    to = y + sample.to(tl.int64) * batch * rows + (example.to(tl.int64) * rows)[None, :] + row[:, None]
    tl.store(to, product.to(y.dtype.element_ty), mask=in_rows[:, None] & in_batch[None, :])


def batch_tile(batch: int, largest: int) -> int:
    return max(16, min(largest, triton.next_power_of_2(batch)))


def forward_config(batch: int, dtype: torch.dtype, precision: str) -> dict:
    """The kernel's tile sizes, measured on an H100.

    tests/kernels/test_compiled.py checks that no register spills and how many instructions there are. Few rows are
    multiplied by independent warps, many by Hopper's warp groups.
    """
    half = dtype != torch.float32
    tile = batch_tile(batch, 128 if half else 64)
    if not half and precision == "ieee":  # scalar products take registers and instructions for each pair of numbers
        return dict(OUT=64, BATCH=max(32, tile), GROUPS=16, num_warps=4, num_stages=2)
    narrow = dict(OUT=32, num_warps=2) if tile <= 32 else dict(OUT=64, num_warps=4)
    return narrow | dict(BATCH=tile, GROUPS=32 if half else 16, num_stages=2)


def precision_of(precision: str) -> str:
    """The precision of float32 products, "ieee" or "tf32"; "" becomes that of `torch.set_float32_matmul_precision`."""
    return precision or ("ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32")


def last_contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def sampled_linear(x, mean, std, bias_mean, bias_std, key, layer, precision, bias_layer) -> Tensor:
    samples, batch, (rows, columns) = len(key), x.shape[-2], mean.shape
    y = x.new_empty((samples, batch, rows))
    if y.numel() == 0:
        return y
    if at_once := regime.draws_at_once(samples, batch, columns, rows, x.element_size(), precision):
        return _by_weights(y, x, mean, std, bias_mean, bias_std, key, layer, bias_layer, at_once)
    x = last_contiguous(x)
    precision = precision_of(precision)
    config = forward_config(batch, x.dtype, precision)
    grid = (samples * triton.cdiv(rows, config["OUT"]) * triton.cdiv(batch, config["BATCH"]),)
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


def _by_weights(y, x, mean, std, bias_mean, bias_std, key, layer, bias_layer, at_once) -> Tensor:
    """Compute `sampled_linear` by `sample_weights` and the library's product, for `at_once` draws at a time.

    It is for batches so large that fused programs would draw the same weights many times.
    """
    bias = bias_mean
    if bias_std is not None:
        bias = sample_weights(bias_mean, bias_std, key, bias_layer, BIAS)[:, None]  # (samples, 1, out)
    for start in range(0, len(key), at_once):
        some = slice(start, start + at_once)
        weights = sample_weights(mean, std, key[some], layer, WEIGHT)
        inputs = x[some] if x.ndim == 3 else x.expand(len(weights), *x.shape)
        torch.bmm(inputs, weights.mT, out=y[some])
    return y if bias is None else y.add_(bias)
