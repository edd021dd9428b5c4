"""The random numbers of `philox.py` as Triton functions, and the arithmetic that all kernels share.

`tl.randn` is not used: it discards three of four Philox words and calls a sine with a slow path, 131 instructions for a
normal; these functions take about 15. `FAST` uses PTX (NVIDIA); without it, Triton's own functions compute the same
map, for the interpreter and other vendors. The two differ by float rounding, by less than 1e-6 unless the radius is
nearly zero (lg2.approx near 1: up to 5e-4 absolute, in a normal of such a small radius).
"""

import triton
import triton.language as tl

_TWO_PI = tl.constexpr(1.4629180792671596e-09)  # 2 pi 2**-32
_SCALE = tl.constexpr(2.3283064365386963e-10)  # 2**-32
_MINUS_TWO_LN2 = tl.constexpr(-1.3862943611198906)  # -2 log(u) = this * log2(u)


@triton.jit
def multiply(a, CONSTANT: tl.constexpr, FAST: tl.constexpr):
    """The high and the low word of a * CONSTANT, by one widening product.

    PTX is faster than a 64-bit product, for which the assembler also adds the products of the high words unless it
    knows that they are zero.
    """
    if FAST:
        product = tl.inline_asm_elementwise(
            f"mul.wide.u32 $0, $1, {CONSTANT};", "=l,r", [a], dtype=tl.uint64, is_pure=True, pack=1
        )
    else:
        product = a.to(tl.uint64) * CONSTANT
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def philox(k0, k1, c0, c1, c2, c3, FAST: tl.constexpr):
    """Compute the four words of each counter by Philox4x32 with 7 rounds, on uint32 tensors."""
    for _ in tl.static_range(7):
        high0, low0 = multiply(c0, 0xD2511F53, FAST)
        high1, low1 = multiply(c2, 0xCD9E8D57, FAST)
        c0 = high1 ^ c1 ^ k0
        c2 = high0 ^ c3 ^ k1
        c1 = low1
        c3 = low0
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def box_muller(a, b, FAST: tl.constexpr):
    """Transform two words into two standard normals, as `philox.box_muller` does."""
    u = tl.fma(a.to(tl.float32), _SCALE, 0.5 * _SCALE)
    angle = b.to(tl.int32, bitcast=True).to(tl.float32) * _TWO_PI
    if FAST:
        # abs: lg2.approx near 1 may be slightly above 0, and the root of a negative number is NaN
        radius, cosine, sine = tl.inline_asm_elementwise(
            """{
            .reg .f32 l;
            lg2.approx.ftz.f32 l, $3;
            mul.f32 l, l, 0fBFB17218;
            abs.f32 l, l;
            sqrt.approx.ftz.f32 $0, l;
            cos.approx.ftz.f32 $1, $4;
            sin.approx.ftz.f32 $2, $4;
            }""",
            "=f,=f,=f,f,f",
            [u, angle],
            dtype=(tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    else:
        radius = tl.sqrt(tl.log2(u) * _MINUS_TWO_LN2)
        cosine = tl.cos(angle)
        sine = tl.sin(angle)
    return radius * cosine, radius * sine


@triton.jit
def load_key(key, sample):
    """The words (seed low, seed high, draw) of one entry of key, (samples, 2) int64."""
    seed = tl.load(key + 2 * sample)
    draw = tl.load(key + 2 * sample + 1)
    return seed.to(tl.uint32), (seed >> 32).to(tl.uint32), draw.to(tl.uint32)


@triton.jit
def zero_like(tile, FAST: tl.constexpr):
    """Make int32 zeros in the register layout of a loaded tile.

    Noise computed from them is in the same registers as the tile's elements. Computed from plain ranges, it would be in
    the compiler's default layout, one element wide, and cross shared memory two bytes at a time.
    """
    if FAST:
        if tile.dtype == tl.float32:
            return tl.inline_asm_elementwise("mov.b32 $0, 0;", "=r,r", [tile], dtype=tl.int32, is_pure=True, pack=1)
        else:
            return tl.inline_asm_elementwise("mov.b32 $0, 0;", "=r,h", [tile], dtype=tl.int32, is_pure=True, pack=1)
    else:
        return tl.zeros(tile.shape, tl.int32)


@triton.jit
def noise4(k0, k1, draw, tag, row, group, FAST: tl.constexpr):
    """Compute the four normals of each (row, group), for columns 32 apart (`columns_of`); row and group broadcast."""
    zero = (row * 0 + group * 0).to(tl.uint32)
    w0, w1, w2, w3 = philox(
        k0, k1, row.to(tl.uint32) + zero, group.to(tl.uint32) + zero, draw + zero, tag.to(tl.uint32) + zero, FAST
    )
    n0, n1 = box_muller(w0, w1, FAST)
    n2, n3 = box_muller(w2, w3, FAST)
    return n0, n1, n2, n3


@triton.jit
def columns_of(group):
    """The column of word 0 of a group; word j belongs to the column 32 * j further."""
    return group // 32 * 128 + group % 32


@triton.jit
def words_at(k0, k1, draw, tag, row, column, FAST: tl.constexpr):
    """The four words of the counter that (row, column) belongs to, and the index of its own word among them."""
    group = column // 128 * 32 + column % 32
    zero = (row * 0 + column * 0).to(tl.uint32)
    w0, w1, w2, w3 = philox(
        k0, k1, row.to(tl.uint32) + zero, group.to(tl.uint32) + zero, draw + zero, tag.to(tl.uint32) + zero, FAST
    )
    return w0, w1, w2, w3, column // 32 % 4


@triton.jit
def normal_at(k0, k1, draw, tag, row, column, FAST: tl.constexpr):
    """Compute the normal of each (row, column), for vectors (biases, activations); four times the work of `noise4`."""
    w0, w1, w2, w3, word = words_at(k0, k1, draw, tag, row, column, FAST)
    even, odd = box_muller(tl.where(word < 2, w0, w2), tl.where(word < 2, w1, w3), FAST)
    return tl.where(word % 2 == 0, even, odd)


@triton.jit
def keep_at(k0, k1, draw, tag, row, column, threshold, FAST: tl.constexpr):
    """Draw a dropout mask: 1.0 if (row, column) is kept, otherwise 0.0. threshold: int64, round(p * 2**32).

    The mask is float and not bool because Triton 3.6 cannot select an operand of tl.dot by a mask of random integers.
    """
    w0, w1, w2, w3, word = words_at(k0, k1, draw, tag, row, column, FAST)
    own = tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3))
    return (own.to(tl.int64) >= threshold).to(tl.float32)


@triton.jit
def weight(mean, std, noise, FAST: tl.constexpr):
    """mean + std * noise with one rounding, in the dtype of mean; the noise is rounded to that dtype first."""
    if mean.dtype == tl.float32:
        return tl.fma(std, noise, mean)
    elif FAST and mean.dtype == tl.bfloat16:
        # two weights an instruction; Triton would unpack to float32, fma, and pack again
        return tl.inline_asm_elementwise(
            "fma.rn.bf16x2 $0, $1, $2, $3;",
            "=r,r,r,r",
            [std, noise.to(tl.bfloat16), mean],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    elif FAST and mean.dtype == tl.float16:
        return tl.inline_asm_elementwise(
            "fma.rn.f16x2 $0, $1, $2, $3;",
            "=r,r,r,r",
            [std, noise.to(tl.float16), mean],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    else:
        rounded = noise.to(mean.dtype).to(tl.float32)
        return tl.fma(std.to(tl.float32), rounded, mean.to(tl.float32)).to(mean.dtype)


@triton.jit
def matmul(a, b, accumulator, PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    """Compute accumulator + a @ b in float32.

    Triton's interpreter multiplies the bits of bfloat16 numbers (triton#11584), so there they are cast to float32.
    """
    if INTERPRET:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator, input_precision="ieee")
    else:
        return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def load_tile(pointer, mask, MASKED: tl.constexpr):
    """Load a tile, with a mask only if its shape needs one: a mask costs one or two instructions for each element."""
    if MASKED:
        return tl.load(pointer, mask=mask, other=0.0)
    else:
        return tl.load(pointer)


@triton.jit
def store_tile(pointer, value, mask, MASKED: tl.constexpr):
    if MASKED:
        tl.store(pointer, value.to(pointer.dtype.element_ty), mask=mask)
    else:
        tl.store(pointer, value.to(pointer.dtype.element_ty))


@triton.jit
def tile_of(program, rows, OUT: tl.constexpr, BATCH: tl.constexpr):
    """The outputs and examples of a program; neighboring programs have the same examples and share them in L2."""
    out_tiles = tl.cdiv(rows, OUT)
    return program % out_tiles * OUT + tl.arange(0, OUT), program // out_tiles * BATCH + tl.arange(0, BATCH)


@triton.jit
def load_inputs(source, column, columns, in_batch, MASKED: tl.constexpr):
    """Load a tile of x, (columns, examples); source: pointers to the start of each example, (1, examples)."""
    if MASKED:
        inside = (column < columns)[:, None] & in_batch[None, :]
    else:
        inside = in_batch[None, :]
    return tl.load(source + column[:, None], mask=inside, other=0.0)
