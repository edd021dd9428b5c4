"""The Triton kernels of `ensemble_mlp` and `bayesian_mlp`: small networks in registers, weights stored or drawn."""

import triton
import triton.language as tl
from torch import Tensor

from vbdl_kernels.dispatch import fast_math, interpreting, on_device
from vbdl_kernels.noise_kernel import load_key, matmul, noise4, normal_at, weight, zero_like
from vbdl_kernels.sampled_linear_kernel import precision_of


@triton.jit
def activate(a, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        return tl.maximum(a, 0.0)
    elif ACTIVATION == "silu":
        return a / (1.0 + tl.exp(-a))
    else:
        # tanh through a decaying exponential, which cannot overflow
        e = tl.exp(-2.0 * tl.abs(a))
        t = (1.0 - e) / (1.0 + e)
        return tl.where(a < 0, -t, t)


@triton.jit
def dense(h, weights, biases, member, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
          PADDED_COLUMNS: tl.constexpr, PADDED_ROWS: tl.constexpr,
          BATCH: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr):  # fmt: skip
    """Compute h weights^T + biases for one layer of one member, with widths padded to powers of two."""
    row = tl.arange(0, PADDED_ROWS)
    column = tl.arange(0, PADDED_COLUMNS)
    inside = (row < ROWS)[None, :] & (column < COLUMNS)[:, None]
    source = weights + member.to(tl.int64) * (COLUMNS * ROWS) + row[None, :] * COLUMNS + column[:, None]
    w = tl.load(source, mask=inside, other=0.0)
    b = tl.load(biases + member * ROWS + row, mask=row < ROWS, other=0.0)
    start = tl.zeros((BATCH, PADDED_ROWS), tl.float32)
    return matmul(h, w, start, PRECISION, INTERPRET) + b.to(tl.float32)[None, :]


@triton.jit
def ensemble_mlp_forward(
    x, weights, biases, y, batch, x_member, x_batch,
    WIDTHS: tl.constexpr, PADDED: tl.constexpr, LAYERS: tl.constexpr, BATCH: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Run h[l + 1] = activation(h[l] weights[l]^T + biases[l]) for one member and tile of the batch.

    Every width is padded to a power of two.
    """
    member = tl.program_id(0)
    example = tl.program_id(1) * BATCH + tl.arange(0, BATCH)
    in_batch = (example < batch)[:, None]
    unit = tl.arange(0, PADDED[0])
    source = x + member.to(tl.int64) * x_member + example.to(tl.int64)[:, None] * x_batch + unit[None, :]
    h = tl.load(source, mask=in_batch & (unit < WIDTHS[0])[None, :], other=0.0)
    for layer in tl.static_range(LAYERS):
        row = tl.arange(0, PADDED[layer + 1])
        a = dense(
            h, weights[layer], biases[layer], member, WIDTHS[layer], WIDTHS[layer + 1],
            PADDED[layer], PADDED[layer + 1], BATCH, PRECISION, INTERPRET,
        )  # fmt: skip
        if layer < LAYERS - 1:
            h = activate(a, ACTIVATION).to(x.dtype.element_ty)
        else:
            to = y + (member.to(tl.int64) * batch + example)[:, None] * WIDTHS[LAYERS] + row[None, :]
            tl.store(to, a.to(y.dtype.element_ty), mask=in_batch & (row < WIDTHS[LAYERS])[None, :])


@triton.jit
def quarter(mean, std, row, group, k0, k1, draw, tag, h0, h1, h2, h3,
            ROWS: tl.constexpr, COLUMNS: tl.constexpr, BATCH: tl.constexpr,
            PRECISION: tl.constexpr, FAST: tl.constexpr, INTERPRET: tl.constexpr):  # fmt: skip
    """Compute 32 outputs of a layer: the sum over j of (weights of columns 32 j + group) @ (units h_j before)."""
    offset = row[:, None] * COLUMNS + group[None, :]
    rows = (row < ROWS)[:, None]
    inside = rows & (group < COLUMNS)[None, :]
    m = tl.load(mean + offset, mask=inside, other=0.0)
    zero = zero_like(m, FAST)
    n0, n1, n2, n3 = noise4(k0, k1, draw, tag, row[:, None] + zero, group[None, :] + zero, FAST)
    a = tl.zeros((32, BATCH), tl.float32)
    s = tl.load(std + offset, mask=inside, other=0.0)
    a = matmul(weight(m, s, n0, FAST), h0, a, PRECISION, INTERPRET)
    if COLUMNS > 32:
        inside = rows & (group < COLUMNS - 32)[None, :]
        m = tl.load(mean + offset + 32, mask=inside, other=0.0)
        s = tl.load(std + offset + 32, mask=inside, other=0.0)
        a = matmul(weight(m, s, n1, FAST), h1, a, PRECISION, INTERPRET)
    if COLUMNS > 64:
        inside = rows & (group < COLUMNS - 64)[None, :]
        m = tl.load(mean + offset + 64, mask=inside, other=0.0)
        s = tl.load(std + offset + 64, mask=inside, other=0.0)
        a = matmul(weight(m, s, n2, FAST), h2, a, PRECISION, INTERPRET)
    if COLUMNS > 96:
        inside = rows & (group < COLUMNS - 96)[None, :]
        m = tl.load(mean + offset + 96, mask=inside, other=0.0)
        s = tl.load(std + offset + 96, mask=inside, other=0.0)
        a = matmul(weight(m, s, n3, FAST), h3, a, PRECISION, INTERPRET)
    return a


@triton.jit
def bayesian_mlp_forward(
    x, means, stds, bias_means, bias_stds, key, y, batch, x_sample, x_batch,
    TAGS: tl.constexpr, BIAS_TAGS: tl.constexpr, WIDTHS: tl.constexpr, LAYERS: tl.constexpr, BATCH: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Run the network of one draw on one tile of the batch.

    Activations are in four tiles of 32 units, because the four words of a counter are 32 columns apart.
    """
    sample = tl.program_id(0)
    example = tl.program_id(1) * BATCH + tl.arange(0, BATCH)
    in_batch = (example < batch)[None, :]
    unit = tl.arange(0, 32)
    k0, k1, draw = load_key(key, sample)
    source = x + sample.to(tl.int64) * x_sample + example.to(tl.int64)[None, :] * x_batch + unit[:, None]
    h0 = tl.load(source, mask=in_batch & (unit < WIDTHS[0])[:, None], other=0.0)
    h1 = tl.load(source + 32, mask=in_batch & (unit < WIDTHS[0] - 32)[:, None], other=0.0)
    h2 = tl.load(source + 64, mask=in_batch & (unit < WIDTHS[0] - 64)[:, None], other=0.0)
    h3 = tl.load(source + 96, mask=in_batch & (unit < WIDTHS[0] - 96)[:, None], other=0.0)
    for layer in tl.static_range(LAYERS):
        tag = (draw.to(tl.int64) * 0 + TAGS[layer]).to(tl.uint32)
        bias_tag = (draw.to(tl.int64) * 0 + BIAS_TAGS[layer]).to(tl.uint32)
        g0, g1, g2, g3 = h0, h1, h2, h3
        for j in tl.static_range(4):
            if WIDTHS[layer + 1] > 32 * j:
                row = 32 * j + unit
                a = quarter(
                    means[layer], stds[layer], row, unit, k0, k1, draw, tag, g0, g1, g2, g3,
                    WIDTHS[layer + 1], WIDTHS[layer], BATCH, PRECISION, FAST, INTERPRET,
                )  # fmt: skip
                m = tl.load(bias_means[layer] + row, mask=row < WIDTHS[layer + 1], other=0.0)
                s = tl.load(bias_stds[layer] + row, mask=row < WIDTHS[layer + 1], other=0.0)
                b = weight(m, s, normal_at(k0, k1, draw, bias_tag, row * 0, row, FAST), FAST)
                a += b.to(tl.float32)[:, None]
                if layer < LAYERS - 1:
                    # rounded once before and once after, as separate layers would
                    a = activate(a.to(x.dtype.element_ty).to(tl.float32), ACTIVATION).to(x.dtype.element_ty)
                    if j == 0:
                        h0 = a
                    elif j == 1:
                        h1 = a
                    elif j == 2:
                        h2 = a
                    else:
                        h3 = a
                else:
                    to = y + (sample.to(tl.int64) * batch + example)[None, :] * WIDTHS[LAYERS] + row[:, None]
                    tl.store(to, a.to(y.dtype.element_ty), mask=in_batch & (row < WIDTHS[LAYERS])[:, None])


def batch_tile(batch: int) -> int:
    return max(16, min(64, triton.next_power_of_2(batch)))


def ensemble_mlp(x, weights, biases, activation) -> Tensor:
    members, batch = weights[0].shape[0], x.shape[-2]
    widths = (x.shape[-1], *(w.shape[1] for w in weights))
    y = x.new_empty((members, batch, widths[-1]))
    if y.numel() == 0:
        return y
    x = x if x.stride(-1) == 1 else x.contiguous()
    tile = batch_tile(batch)
    with on_device(x):
        ensemble_mlp_forward[members, triton.cdiv(batch, tile)](
            x, tuple(w.contiguous() for w in weights), tuple(b.contiguous() for b in biases), y, batch,
            x.stride(0) if x.ndim == 3 else 0, x.stride(-2),
            WIDTHS=widths, PADDED=tuple(max(16, triton.next_power_of_2(w)) for w in widths), LAYERS=len(weights),
            BATCH=tile, ACTIVATION=activation, PRECISION=precision_of(""), INTERPRET=interpreting(),
            enable_fp_fusion=True, num_warps=4,
        )  # fmt: skip
    return y


def bayesian_mlp(x, means, stds, bias_means, bias_stds, key, layers, bias_layers, activation) -> Tensor:
    samples, batch = len(key), x.shape[-2]
    widths = (x.shape[-1], *(m.shape[0] for m in means))
    y = x.new_empty((samples, batch, widths[-1]))
    if y.numel() == 0:
        return y
    x = x if x.stride(-1) == 1 else x.contiguous()
    tile = batch_tile(batch)
    contiguous = lambda tensors: tuple(t.contiguous() for t in tensors)
    with on_device(x):
        bayesian_mlp_forward[samples, triton.cdiv(batch, tile)](
            x, contiguous(means), contiguous(stds), contiguous(bias_means), contiguous(bias_stds),
            key.contiguous(), y, batch, x.stride(0) if x.ndim == 3 else 0, x.stride(-2),
            # tags are constants, because a tensor would be copied from the host in every call
            TAGS=tuple(n << 4 for n in layers), BIAS_TAGS=tuple(n << 4 | 1 for n in bias_layers),
            WIDTHS=widths, LAYERS=len(means), BATCH=tile, ACTIVATION=activation,
            PRECISION=precision_of(""), FAST=fast_math(x), INTERPRET=interpreting(), enable_fp_fusion=True,
            num_warps=4 if max(widths) <= 64 else 8,
        )  # fmt: skip
    return y
