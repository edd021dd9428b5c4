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
def predictive_statistics_forward(
    logits, mean_out, variance_out, total_out, aleatoric_out,
    samples, batch, classes, sample_stride, batch_stride,
    BATCH: tl.constexpr, CLASSES: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    example = tl.program_id(0) * BATCH + tl.arange(0, BATCH)
    label = tl.arange(0, CLASSES)
    inside = (example < batch)[:, None] & (label < classes)[None, :]
    source = logits + example.to(tl.int64)[:, None] * batch_stride + label[None, :]
    mean = tl.zeros((BATCH, CLASSES), tl.float32)
    squares = tl.zeros((BATCH, CLASSES), tl.float32)
    entropies = tl.zeros((BATCH,), tl.float32)
    for sample in range(0, samples):
        step = (tl.zeros((1, 1), tl.int64) + sample) * sample_stride
        z = tl.load(source + step, mask=inside, other=float("-inf")).to(tl.float32)
        largest = tl.where(example < batch, tl.max(z, 1), 0.0) * _LOG2_E
        # in powers of two, which is what the hardware has. Below -200 they are 0 in float32, and 0 times a finite
        # number is the 0 the entropy wants
        z = tl.maximum(z * _LOG2_E - largest[:, None], -200.0)
        e = exp2(z, FAST)
        norm = tl.where(example < batch, tl.sum(e, 1), 1.0)
        inverse = 1.0 / norm
        p = e * inverse[:, None]
        entropies += tl.log2(norm) - tl.sum(e * z, 1) * inverse
        # Welford: the variance of nearly equal draws is not lost between two large sums
        delta = p - mean
        mean += delta * (1.0 / (sample + 1.0))
        squares += delta * (p - mean)
    total = -tl.sum(mean * tl.log(tl.maximum(mean, 1e-38)), 1)
    to = example.to(tl.int64)[:, None] * classes + label[None, :]
    tl.store(mean_out + to, mean, mask=inside)
    tl.store(variance_out + to, squares * (1.0 / samples), mask=inside)
    tl.store(total_out + example, total, mask=example < batch)
    tl.store(aleatoric_out + example, entropies * (_LN_2 / samples), mask=example < batch)


def config(classes: int) -> dict:
    """About 2048 elements a program of four warps: 16 a thread."""
    padded = triton.next_power_of_2(classes)
    return dict(
        BATCH=max(1, min(64, 2048 // padded)), CLASSES=padded, num_warps=4 if padded <= 2048 else min(16, padded // 512)
    )


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
