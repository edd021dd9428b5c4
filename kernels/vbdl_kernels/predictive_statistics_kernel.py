"""The Triton kernel of `predictive_statistics`: softmax, entropies and running moments draw by draw, in registers."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from vbdl_kernels.dispatch import fast_math, on_device
from vbdl_kernels.predictive_statistics import reference_predictive_statistics

_LARGEST = 16384  # the most classes whose running moments fit the registers of a program

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
_LOWEST = tl.constexpr(-1e38)  # in place of minus infinity: still finite times log2(e) and minus the largest logit


@triton.jit
def exp2(z, FAST: tl.constexpr):
    """Compute 2**z; results below 2**-126 become 0, which saves three instructions and is harmless here."""
    if FAST:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [z], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(z)


@triton.jit
def log2(z, FAST: tl.constexpr):
    """Compute log2(z) for z >= 1; Triton's own log2 is a polynomial of twenty instructions."""
    if FAST:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [z], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(z)


@triton.jit
def reciprocal(z, FAST: tl.constexpr):
    """Compute 1 / z for z >= 1, exact up to one bit; Triton's own division first scales against overflow."""
    if FAST:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [z], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / z


@triton.jit
def finite(z, FAST: tl.constexpr):
    """Convert logits to float32 and raise them to at least _LOWEST, because 0 * -inf would be NaN; a NaN stays NaN."""
    if FAST and z.dtype == tl.bfloat16:
        # two logits at once; the upper one, with the lower bits cleared, is already the float32 number
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
def offset_of(row, step, samples, batch, sample_stride, batch_stride,
              DRAWS: tl.constexpr, BATCH: tl.constexpr, ALIGN: tl.constexpr):  # fmt: skip
    """The offset of the logits of a row of the tile.

    Beyond the last draw or the last example, the last one is read again, so that no mask is needed.
    """
    example = tl.minimum(tl.program_id(0) * BATCH + row % BATCH, batch - 1)
    sample = tl.minimum(step * DRAWS + row // BATCH, samples - 1)
    offset = sample.to(tl.int64) * sample_stride + example.to(tl.int64) * batch_stride
    return tl.multiple_of(offset, ALIGN)  # here, because Triton 3.6 loses the hint on the function's result


@triton.jit
def load_logits(logits, step, samples, batch, sample_stride, batch_stride,
                DRAWS: tl.constexpr, BATCH: tl.constexpr, CLASSES: tl.constexpr, COLUMNS: tl.constexpr,
                ALIGN: tl.constexpr, LANES: tl.constexpr):  # fmt: skip
    """Load the logits of a step, (rows, COLUMNS)."""
    ROWS: tl.constexpr = DRAWS * BATCH
    if LANES > 0:  # neighboring threads hold LANES classes of a row, then those of the next row
        at = tl.arange(0, COLUMNS * ROWS)
        start = offset_of(at // LANES % ROWS, step, samples, batch, sample_stride, batch_stride, DRAWS, BATCH, 1)
        label = at // (LANES * ROWS) * LANES + at % LANES
        z = tl.load(logits + (start + label), mask=label < CLASSES, other=float("-inf"))
        z = tl.reshape(z, (COLUMNS // LANES, ROWS, LANES))
        return tl.reshape(tl.permute(z, (1, 0, 2)), (ROWS, COLUMNS))
    else:
        label = tl.arange(0, COLUMNS)
        start = offset_of(tl.arange(0, ROWS), step, samples, batch, sample_stride, batch_stride, DRAWS, BATCH, ALIGN)
        at = logits + start[:, None] + label[None, :]
        if COLUMNS > CLASSES:
            return tl.load(at, mask=(label < CLASSES)[None, :], other=float("-inf"))
        else:
            return tl.load(at)


@triton.jit
def predictive_statistics_forward(
    logits, mean_out, variance_out, total_out, aleatoric_out,
    samples, batch, sample_stride, batch_stride,
    DRAWS: tl.constexpr, BATCH: tl.constexpr, CLASSES: tl.constexpr, COLUMNS: tl.constexpr,
    ALIGN: tl.constexpr, LANES: tl.constexpr, AHEAD: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Compute the statistics of one tile of examples.

    A row of the tile is one example in one of DRAWS slots; the slots divide the draws and are merged at the end.
    COLUMNS: CLASSES, rounded up to a power of two. ALIGN: a number that the strides are multiples of (Triton detects
    just multiples of 16). LANES: the number of threads that share a row and exchange partial sums; 0: Triton's choice.
    """
    mean = tl.zeros((DRAWS * BATCH, COLUMNS), tl.float32)
    squares = mean
    entropies = tl.zeros((DRAWS * BATCH,), tl.float32)
    slot = tl.arange(0, DRAWS * BATCH) // BATCH
    steps = tl.cdiv(samples, DRAWS)
    if AHEAD:
        ahead = load_logits(
            logits, 0, samples, batch, sample_stride, batch_stride, DRAWS, BATCH, CLASSES, COLUMNS, ALIGN, LANES
        )  # fmt: skip
    for step in range(0, steps):
        coming = tl.minimum(step + 1, steps - 1) if AHEAD else step  # AHEAD loads the next step while this one computes
        loaded = load_logits(
            logits, coming, samples, batch, sample_stride, batch_stride,
            DRAWS, BATCH, CLASSES, COLUMNS, ALIGN, LANES,
        )  # fmt: skip
        if AHEAD:
            z = ahead
            ahead = loaded
        else:
            z = loaded
        z = finite(z, FAST)
        # with powers of two, which the hardware computes fastest
        largest = tl.max(z, 1)
        z = z * _LOG2_E - (largest * _LOG2_E)[:, None]
        e = exp2(z, FAST)
        norm = tl.sum(e, 1)
        inverse = reciprocal(norm, FAST)
        inverse = tl.where(largest == _LOWEST, float("nan"), inverse)  # no class is possible
        entropy = log2(norm, FAST) - tl.sum(e * z, 1) * inverse
        # Welford's update: the variance of nearly equal draws does not cancel as in a difference of two large sums
        share = reciprocal(step + 1.0, FAST)
        delta = e * inverse[:, None] - mean
        if DRAWS > 1:  # beyond the last draw, the last one is read again and must not count
            sample = step * DRAWS + slot
            entropy = tl.where(sample < samples, entropy, 0.0)
            delta = tl.where((sample < samples)[:, None], delta, 0.0)
        entropies += entropy
        mean += delta * share
        squares += delta * (1.0 - share) * delta
    if DRAWS > 1:  # merge the moments of the slots (Chan, Golub and LeVeque)
        count = ((samples - slot + DRAWS - 1) // DRAWS).to(tl.float32)  # the number of draws of each slot, may be 0
        means = tl.reshape(mean, (DRAWS, BATCH, COLUMNS))
        counts = tl.reshape(tl.broadcast_to(count[:, None], mean.shape), (DRAWS, BATCH, COLUMNS))
        mean = tl.sum(means * counts, 0) * (1.0 / samples)
        apart = means - tl.expand_dims(mean, 0)
        squares = tl.sum(tl.reshape(squares, (DRAWS, BATCH, COLUMNS)) + counts * apart * apart, 0)
        entropies = tl.sum(tl.reshape(entropies, (DRAWS, BATCH)), 0)
    example = tl.program_id(0) * BATCH + tl.arange(0, BATCH)
    label = tl.arange(0, COLUMNS)
    total = 0.0 - tl.sum(mean * tl.log(tl.maximum(mean, 1e-38)), 1)
    inside = (example < batch)[:, None] & (label < CLASSES)[None, :]
    to = (example.to(tl.int64) * CLASSES)[:, None] + label[None, :]
    tl.store(mean_out + to, mean, mask=inside)
    tl.store(variance_out + to, squares * (1.0 / samples), mask=inside)
    tl.store(total_out + example, total, mask=example < batch)
    tl.store(aleatoric_out + example, entropies * (_LN_2 / samples), mask=example < batch)


_PROGRAMS = 256  # programs that keep a card busy; with fewer examples, rows of a tile become slots of draws


def config(classes: int, align: int, size: int, batch: int, samples: int) -> dict:
    """The kernel's tile sizes.

    align: a number that classes and strides are multiples of. size: bytes of a logit. If the classes are not whole
    vectors of 16 bytes, neighboring threads take 16 each, which needs the fewest instructions. Otherwise one or two
    warps take a row of up to 1024 classes, with 4 to 16 elements for each thread, as measured on an H100.
    """
    columns = triton.next_power_of_2(classes)
    lanes = max(1, columns // 16) if align * size < 16 and 4 <= columns <= 512 else 0
    if lanes:
        rows, warps = 64 // lanes, 2
    else:
        elements = 16 if columns >= 256 else 4 if columns <= 64 and align == 4 else 8
        rows, warps = max(1, 64 * elements // columns), min(16, max(2, columns // 512))
    if batch < _PROGRAMS * rows and warps < 8 and lanes != 1:  # more warps make room for more slots
        more = min(8 // warps, triton.next_power_of_2(samples))
        rows, warps = rows * more, warps * more
    examples = 2 ** (max(1, batch // _PROGRAMS).bit_length() - 1)
    draws = min(max(1, rows // examples), triton.next_power_of_2(samples))
    tile = dict(DRAWS=draws, BATCH=rows // draws, CLASSES=classes, COLUMNS=columns, ALIGN=align)
    return tile | dict(LANES=lanes, AHEAD=lanes > 0 or columns >= 128, num_warps=warps)


def predictive_statistics(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    samples, batch, classes = logits.shape
    if classes > _LARGEST or classes == 0:
        return reference_predictive_statistics(logits)
    new = lambda *shape: logits.new_empty(shape, dtype=torch.float32)
    outputs = new(batch, classes), new(batch, classes), new(batch), new(batch)
    if batch == 0:
        return outputs
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    strides = logits.stride(0), logits.stride(1)
    size = logits.element_size()
    tile = config(classes, math.gcd(classes, *strides, 16 // size), size, batch, samples)
    with on_device(logits):
        predictive_statistics_forward[(triton.cdiv(batch, tile["BATCH"]),)](
            logits, *outputs, samples, batch, *strides,
            FAST=fast_math(logits), enable_fp_fusion=True, **tile,
        )  # fmt: skip
    return outputs
