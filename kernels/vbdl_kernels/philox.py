"""Counter-based random numbers: each is a pure function of (seed, layer, stream, draw, row, column).

After Salmon, Moraes, Dror and Shaw, *Parallel Random Numbers: As Easy as 1, 2, 3*, SC 2011
(https://doi.org/10.1145/2063384.2063405): Philox4x32 with 7 rounds, the fewest that pass all known statistical tests
(Random123's documentation). The counter layout is fixed and has the version number `CONTRACT`:

    key     (seed low 32 bits, seed high 32 bits)
    counter (row, group, draw, layer << 4 | stream)      -> four 32-bit words w0 w1 w2 w3
    column  c of a row uses   group (c // 128) * 32 + c % 32,   word (c // 32) % 4
    normals (n0, n1) = box_muller(w0, w1),   (n2, n3) = box_muller(w2, w3)

A weight (out, in) has row = out and column = in; a convolution's column is the flat (in, kh, kw); a bias or another
vector is one row; a dropout mask has column = last axis and row = the axes before it without the batch. The four words
of a counter are 32 columns apart, so that a kernel can use each as a separate tile.

`words` and `normal` are opaque operators, so that no compiler rewrites their 64-bit integer products in a narrower
type. Each has a specification in plain torch (`reference_words`, `reference_normal`), for any device and correct under
`torch.compile` too, and an implementation for the CPU in C (`native.py`) or, where that was not built, in NumPy, which
has the same bits and takes several times as long.
"""

import math

import numpy as np
import torch
from torch import Tensor

from vbdl_kernels import native
from vbdl_kernels.dispatch import has_triton, kernel_of, kernels_in, library

CONTRACT = 1  # the version of the layout above; any change of a bit needs a new one, and artifacts store theirs
ROUNDS = 7

WEIGHT, BIAS, DROPOUT, ACTIVATION, SIGN, UNIFORM = range(6)  # streams: the purposes of a layer's noise

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_GROUP = 32  # columns between two words of one counter

compiled = native.load(native.PATH)
"""The compiled functions that draw words on the CPU; None: NumPy draws them."""


def _multiply(a: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """The high and the low 32 bits of a * constant, both factors below 2**32.

    No intermediate value exceeds 2**49. A simple product with int64 wrap-around is shorter and right in eager mode, but
    silently wrong under some compilers.
    """
    low = a * (constant & 0xFFFF)
    middle = (low >> 16) + a * (constant >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor],
    key: tuple[Tensor, Tensor],
    rounds: int = ROUNDS,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the four random 32-bit words of each counter, in plain torch.

    counter, key: int64 tensors that broadcast, values in [0, 2**32)  ->  four int64 tensors, values in [0, 2**32)
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _counter_shape(columns: int) -> tuple[int, int]:
    """The number of blocks of 128 columns in a row, and the number of counters in a row."""
    blocks = -(-columns // (4 * _GROUP))
    return blocks, blocks * _GROUP


def reference_words(key: Tensor, layer: int, stream: int, rows: int, columns: int, first_row: int = 0) -> Tensor:
    """The specification of `words`, in plain torch on any device."""
    blocks, counters = _counter_shape(columns)
    seed, draw = key[..., 0, None, None], key[..., 1, None, None]
    row = (torch.arange(rows, device=key.device)[:, None] + first_row) & _MASK
    group = torch.arange(counters, device=key.device)[None, :]
    zero = row * 0 + group * 0 + (draw & _MASK) * 0  # the common shape, (..., rows, counters)
    last = zero + ((layer << 4) | stream)
    w = philox4x32(
        (row + zero, group + zero, (draw & _MASK) + zero, last),
        (seed & _MASK, (seed >> 32) & _MASK),
    )
    tile = torch.stack([word.unflatten(-1, (blocks, _GROUP)) for word in w], dim=-2)
    return tile.flatten(-3)[..., :columns]


def reference_keep(
    key: Tensor, layer: int, stream: int, rows: int, columns: int, threshold: int, first_row: int = 0
) -> Tensor:
    """The specification of the operator `vbdl::keep`, in plain torch on any device."""
    return reference_words(key, layer, stream, rows, columns, first_row) >= threshold


def box_muller(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Transform two words (int64) into two standard normals (float32). Box and Muller, 1958.

    u is in (0, 1], so its logarithm is finite. The angle is computed from the word as a signed number, which keeps
    float32's precision around zero.
    """
    u = (a.to(torch.float32) + 0.5) * 2.0**-32
    angle = ((b ^ 0x80000000) - 0x80000000).to(torch.float32) * (2 * math.pi * 2.0**-32)
    radius = torch.sqrt(-2 * torch.log(u))
    return radius * torch.cos(angle), radius * torch.sin(angle)


def reference_normal(key: Tensor, layer: int, stream: int, rows: int, columns: int) -> Tensor:
    """The specification of `normal`, in plain torch on any device."""
    blocks, _ = _counter_shape(columns)
    # whole blocks, because the two words that make a pair of normals are 32 columns apart
    w = reference_words(key, layer, stream, rows, blocks * 4 * _GROUP)
    w = w.unflatten(-1, (blocks, 4, _GROUP))
    n0, n1 = box_muller(w[..., 0, :], w[..., 1, :])
    n2, n3 = box_muller(w[..., 2, :], w[..., 3, :])
    return torch.stack((n0, n1, n2, n3), dim=-2).flatten(-3)[..., :columns]


def _numpy_box_muller(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    u = (a.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)
    signed = b.astype(np.uint32).view(np.int32).astype(np.float32)
    angle = signed * np.float32(2 * math.pi * 2.0**-32)
    radius = np.sqrt(np.float32(-2) * np.log(u))
    return radius * np.cos(angle), radius * np.sin(angle)


def _numpy_noise(
    key: Tensor, layer: int, stream: int, rows: int, columns: int, normals: bool, first_row: int = 0
) -> Tensor:
    """`reference_words` or, if `normals`, `reference_normal` in NumPy, whose uint64 products are exact.

    first_row: the number of the first row; row numbers begin again after 2**32.
    """
    blocks, counters = _counter_shape(columns)
    dtype = torch.float32 if normals else torch.int64
    if key.numel() * rows * columns == 0:
        return torch.empty((*key.shape[:-1], rows, columns), dtype=dtype)
    if columns < _GROUP:  # a narrow row uses only the first word of its first counters
        counters = columns
    seed, draw = key.reshape(-1, 2).contiguous().numpy().view(np.uint64).T
    lines = len(draw) * rows  # the rows of all draws, so that many small draws cost no more than a large one
    used = min(4, -(-columns // _GROUP))  # words of a counter
    out = np.empty((lines, blocks, used, counters // blocks), np.float32 if normals else np.int64)
    mask, half = np.uint64(_MASK), np.uint64(32)
    multiplier0, multiplier1 = (np.uint64(m) for m in _MULTIPLIERS)
    weyl = [np.uint64(w) for w in _WEYL]
    group = np.arange(counters, dtype=np.uint64)[None, :]
    last = np.uint64((layer << 4) | stream)
    tile = min(lines, max(1, 16384 // counters))  # lines at a time
    buffers = np.empty((6, tile, counters), np.uint64)  # written in place: new arrays take longer than the operations
    for start in range(0, lines, tile):
        line = np.arange(start, min(start + tile, lines))
        which = line // rows
        c0, c1, c2, c3, product0, product1 = buffers[:, : len(line)]
        c0[...] = ((first_row + line % rows) & _MASK).astype(np.uint64)[:, None]
        c1[...] = group
        c2[...] = (draw[which] & mask)[:, None]
        c3[...] = last
        k0, k1 = (seed[which] & mask)[:, None], (seed[which] >> half)[:, None]
        for _ in range(ROUNDS):
            np.multiply(c0, multiplier0, out=product0)
            np.multiply(c2, multiplier1, out=product1)
            np.right_shift(product1, half, out=c0)
            c0 ^= c1
            c0 ^= k0
            np.right_shift(product0, half, out=c2)
            c2 ^= c3
            c2 ^= k1
            np.bitwise_and(product1, mask, out=c1)
            np.bitwise_and(product0, mask, out=c3)
            k0, k1 = (k0 + weyl[0]) & mask, (k1 + weyl[1]) & mask
        w = (c0, c1, c2, c3)
        if normals:
            first = _numpy_box_muller(c0, c1)
            w = (*first, *(_numpy_box_muller(c2, c3) if columns > 2 * _GROUP else first))
        for j, word in enumerate(w[:used]):
            out[start : start + len(line), :, j] = word.reshape(len(line), blocks, -1)
    flat_columns = out.reshape(lines, -1)[:, :columns]
    return torch.from_numpy(np.ascontiguousarray(flat_columns)).reshape(*key.shape[:-1], rows, columns)


def _processor_words(key: Tensor, layer: int, stream: int, rows: int, columns: int, first_row: int = 0) -> Tensor:
    """`reference_words` on the CPU."""
    if compiled is None:
        return _numpy_noise(key, layer, stream, rows, columns, normals=False, first_row=first_row)
    keys = key.reshape(-1, 2).contiguous().numpy()
    drawn = compiled.words(keys, (layer << 4) | stream, first_row, rows, columns)
    return torch.from_numpy(drawn).view(*key.shape[:-1], rows, columns)


def _processor_normal(key: Tensor, layer: int, stream: int, rows: int, columns: int) -> Tensor:
    """`reference_normal` on the CPU."""
    if compiled is None:
        return _numpy_noise(key, layer, stream, rows, columns, normals=True)
    shape = (*key.shape[:-1], rows, columns)
    keys = key.reshape(-1, 2).contiguous().numpy()
    lines, last = len(keys) * rows, (layer << 4) | stream
    out = np.empty((lines, columns), np.float32)
    if out.size == 0:
        return torch.from_numpy(out).view(shape)
    width, pairs = min(columns, _GROUP), 1 if columns <= 2 * _GROUP else 2 * -(-columns // (4 * _GROUP))
    whole = columns % (2 * _GROUP) == 0 if pairs == 1 else columns % (4 * _GROUP) == 0
    tile = min(lines, max(1, 8192 // (pairs * width)))  # lines at a time, which the cache of a core holds
    buffers = np.empty((3, tile, pairs, width), np.float32)
    normals = None if whole else np.empty((tile, pairs, 2, width), np.float32)
    for begin in range(0, lines, tile):
        end = min(begin + tile, lines)
        radius, angle, wave = buffers[:, : end - begin]
        compiled.pairs(keys, last, rows, columns, range(begin, end), (radius, angle))
        np.log(radius, out=radius)
        np.multiply(radius, np.float32(-2), out=radius)
        np.sqrt(radius, out=radius)
        into = out[begin:end].reshape(-1, pairs, 2, width) if normals is None else normals[: end - begin]
        np.multiply(radius, np.cos(angle, out=wave), out=into[:, :, 0])
        np.multiply(radius, np.sin(angle, out=wave), out=into[:, :, 1])
        if normals is not None:
            out[begin:end] = into.reshape(end - begin, -1)[:, :columns]
    return torch.from_numpy(out).view(shape)


def _register(name: str, reference, cpu, dtype: torch.dtype) -> None:
    """Register an opaque operator: C or NumPy on the CPU, Triton on an accelerator if installed, else plain torch."""
    operator = f"vbdl::{name}"
    library.define(f"{name}(Tensor key, int layer, int stream, int rows, int columns) -> Tensor")

    def accelerated(*arguments):
        return kernel_of(name)(*arguments) if has_triton() else reference(*arguments)

    library.impl(name, cpu, "CPU")
    library.impl(name, accelerated, "CUDA")
    library.impl(name, accelerated, "XPU")
    library.impl(name, reference, "MPS")
    kernels_in("philox_kernel", name)

    @torch.library.register_fake(operator, lib=library)
    def shape(key, layer, stream, rows, columns):
        return key.new_empty((*key.shape[:-1], rows, columns), dtype=dtype)

    @torch.library.register_vmap(operator, lib=library)
    def mapped(info, in_dims, key, layer, stream, rows, columns):
        packet = getattr(torch.ops.vbdl, name)
        return packet(key.movedim(in_dims[0], 0), layer, stream, rows, columns), 0


def _processor_keep(
    key: Tensor, layer: int, stream: int, rows: int, columns: int, threshold: int, first_row: int
) -> Tensor:
    """Whether each word is at least a threshold, on the CPU."""
    if compiled is None:
        return _numpy_noise(key, layer, stream, rows, columns, normals=False, first_row=first_row) >= threshold
    keys = key.reshape(-1, 2).contiguous().numpy()
    out = torch.empty((*key.shape[:-1], rows, columns), dtype=torch.bool)  # in the memory that other tensors leave
    compiled.keep(keys, (layer << 4) | stream, first_row, rows, columns, threshold, out.data_ptr())
    return out


def _register_keep() -> None:
    """Register the opaque operator that draws masks on the CPU, without their words, which are eight times as large."""
    operator = "vbdl::keep"
    library.define(
        "keep(Tensor key, int layer, int stream, int rows, int columns, int threshold, int first_row) -> Tensor"
    )
    library.impl("keep", _processor_keep, "CPU")

    @torch.library.register_fake(operator, lib=library)
    def shape(key, layer, stream, rows, columns, threshold, first_row):
        return key.new_empty((*key.shape[:-1], rows, columns), dtype=torch.bool)

    @torch.library.register_vmap(operator, lib=library)
    def mapped(info, in_dims, key, *others):
        return torch.ops.vbdl.keep(key.movedim(in_dims[0], 0), *others), 0


_register("words", reference_words, _processor_words, torch.int64)
_register("normal", reference_normal, _processor_normal, torch.float32)
_register_keep()


def _check(key: Tensor, layer: int, stream: int, rows: int, columns: int) -> None:
    if key.dtype != torch.int64 or key.ndim < 1 or key.shape[-1] != 2:
        raise ValueError(f"key must be int64 of shape (..., 2), (seed, draw) last; got {key.dtype} {tuple(key.shape)}")
    if not 0 <= layer < 2**28 or not 0 <= stream < 16 or rows < 0 or columns < 0:
        raise ValueError(
            f"layer {layer}, stream {stream}, rows {rows} or columns {columns} out of range: layer must be below "
            f"2**28, stream below 16, and none negative"
        )


def words(key: Tensor, layer: int, stream: int, rows: int, columns: int) -> Tensor:
    """Draw uniform 32-bit words for one layer and stream.

    key: (..., 2) int64, (seed, draw) last  ->  (..., rows, columns) int64, values in [0, 2**32)

    Takes any number of draws at once. Works under `vmap`, `torch.compile(fullgraph=True)` and `make_fx`, with the same
    bits in all of them. Raises ValueError for a key of another dtype or shape.
    """
    _check(key, layer, stream, rows, columns)
    return torch.ops.vbdl.words(key, layer, stream, rows, columns)


def normal(key: Tensor, layer: int, stream: int, rows: int, columns: int) -> Tensor:
    """Draw standard normals for one layer and stream.

    key: (..., 2) int64, (seed, draw) last  ->  (..., rows, columns) float32

    An opaque operator like `words`: on one device, eager, compiled and mapped calls give the same bits. On different
    devices the words are equal and the normals agree up to float rounding (about 1e-6).
    """
    _check(key, layer, stream, rows, columns)
    return torch.ops.vbdl.normal(key, layer, stream, rows, columns)


def keep_mask(
    key: Tensor, layer: int, rows: int, columns: int, p: float, stream: int = DROPOUT, first: int = 0
) -> Tensor:
    """Draw a dropout mask of rate p: True keeps a unit, with probability 1 - round(p * 2**32) / 2**32.

    key: (..., 2) int64, (seed, draw) last  ->  (..., rows, columns) bool
    first: the number of the first row, for a part of a longer mask; computed on the CPU.
    """
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"the dropout rate is a probability from 0 to 1, got {p}")
    _check(key, layer, stream, rows, columns)
    threshold = round(p * 2**32)
    if key.device.type == "cpu":
        return torch.ops.vbdl.keep(key, layer, stream, rows, columns, threshold, first)
    if first:
        return torch.ops.vbdl.keep(key.cpu(), layer, stream, rows, columns, threshold, first).to(key.device)
    return torch.ops.vbdl.words(key, layer, stream, rows, columns) >= threshold


def make_key(seed: int, draws: Tensor | range | list[int], device=None) -> Tensor:
    """Make the key (seed, draw) of each draw.  draws: (samples,) draw numbers  ->  (samples, 2) int64"""
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must fit in 64 bits, got {seed}")
    numbers = torch.as_tensor(list(draws) if isinstance(draws, range) else draws, dtype=torch.int64, device=device)
    return torch.stack((torch.full_like(numbers, seed), numbers), dim=-1)
