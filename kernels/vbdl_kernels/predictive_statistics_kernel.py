"""Triton: softmax, entropies and running moments of a tile of examples, draw by draw, in registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vbdl_kernels.dispatch import fast_math, on_device
from vbdl_kernels.predictive_statistics import reference_predictive_statistics

_LARGEST = 16384  # classes whose running moments fit the registers of a program

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
_LOWEST = tl.constexpr(-1e38)  # stands for minus infinity: times log2(e), less the largest, it is still finite


@triton.jit
def exp2(z, FAST: tl.constexpr):
    """Triton's own keeps numbers below 2**-126, for three instructions more; a probability may lose them."""
    if FAST:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [z], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(z)


@triton.jit
def log2(z, FAST: tl.constexpr):
    """Of numbers from 1 up: Triton's own is a polynomial of twenty instructions."""
    if FAST:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [z], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(z)


@triton.jit
def reciprocal(z, FAST: tl.constexpr):
    """Of numbers from 1 up, to a bit: Triton's own first scales what could overflow."""
    if FAST:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [z], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / z


@triton.jit
def finite(z, FAST: tl.constexpr):
    """Logits in float32, none below _LOWEST: 0 * -inf would be NaN. A NaN stays one."""
    if FAST and z.dtype == tl.bfloat16:
        # two logits at once, and the upper one is its own float32 but for the bits of the lower
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 pair, low;
            mov.b32 low, 0xFE96FE96;
            max.NaN.bf16x2 pair, $2, low;
            shl.b32 $0, pair, 16;
            and.b32 $1, pair, 0xFFFF0000;
            }""",
            "=r,=r,r",
            [z],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    else:
        return tl.maximum(z.to(tl.float32), _LOWEST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def predictive_statistics_forward(
    logits, mean_out, variance_out, total_out, aleatoric_out,
    samples, batch, classes, sample_stride, batch_stride,
    BATCH: tl.constexpr, CLASSES: tl.constexpr, PADDED: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """PADDED: CLASSES, a power of two, is more than there are."""
    example = tl.program_id(0) * BATCH + tl.arange(0, BATCH)
    label = tl.arange(0, CLASSES)
    # past the last example the last one is read again, which takes no mask in the loop
    source = logits + tl.minimum(example, batch - 1).to(tl.int64)[:, None] * batch_stride + label[None, :]
    mean = tl.zeros((BATCH, CLASSES), tl.float32)
    squares = tl.zeros((BATCH, CLASSES), tl.float32)
    entropies = tl.zeros((BATCH,), tl.float32)
    for sample in range(0, samples):
        if PADDED:
            z = tl.load(source, mask=(label < classes)[None, :], other=float("-inf"))
        else:
            z = tl.load(source)
        source += sample_stride
        z = finite(z, FAST)
        # in powers of two, which is what the hardware has
        largest = tl.max(z, 1)
        z = z * _LOG2_E - (largest * _LOG2_E)[:, None]
        e = exp2(z, FAST)
        norm = tl.sum(e, 1)
        inverse = reciprocal(norm, FAST)
        inverse = tl.where(largest == _LOWEST, float("nan"), inverse)  # no class is possible
        entropies += log2(norm, FAST) - tl.sum(e * z, 1) * inverse
        # Welford: the variance of nearly equal draws is not lost between two large sums
        share = reciprocal(sample + 1.0, FAST)
        delta = e * inverse[:, None] - mean
        mean += delta * share
        squares += delta * (1.0 - share) * delta
    total = -tl.sum(mean * tl.log(tl.maximum(mean, 1e-38)), 1)
    inside = (example < batch)[:, None] & (label < classes)[None, :]
    to = example.to(tl.int64)[:, None] * classes + label[None, :]
    tl.store(mean_out + to, mean, mask=inside)
    tl.store(variance_out + to, squares * (1.0 / samples), mask=inside)
    tl.store(total_out + example, total, mask=example < batch)
    tl.store(aleatoric_out + example, entropies * (_LN_2 / samples), mask=example < batch)


def config(classes: int) -> dict:
    """16 or 32 elements a thread, and a row of up to 1024 classes in one warp, whose sums need no shared memory."""
    padded = triton.next_power_of_2(classes)
    if padded <= 128:
        tile = dict(BATCH=min(128, 2048 // padded), num_warps=4)
    else:
        tile = dict(BATCH=max(1, 512 // padded), num_warps=max(1, padded // 1024))
    return dict(CLASSES=padded, PADDED=padded != classes) | tile


def predictive_statistics(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    samples, batch, classes = logits.shape
    if classes > _LARGEST or classes == 0:
        return reference_predictive_statistics(logits)
    new = lambda *shape: logits.new_empty(shape, dtype=torch.float32)
    found = new(batch, classes), new(batch, classes), new(batch), new(batch)
    if batch == 0:
        return found
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    tile = config(classes)
    with on_device(logits):
        predictive_statistics_forward[(triton.cdiv(batch, tile["BATCH"]),)](
            logits, *found, samples, batch, classes, logits.stride(0), logits.stride(1),
            FAST=fast_math(logits), enable_fp_fusion=True, **tile,
        )  # fmt: skip
    return found
