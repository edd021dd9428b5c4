"""Kernels that draw and sum normals in registers, to measure drawing without memory traffic.

`sixteen_bits` is the experiment of P9, which no operator uses: a radius from 16 bits of a word, an angle from 10 bits,
and polynomials for the sine and cosine of two half-precision numbers at once, so that a normal takes one
special-function operation instead of two. It has half precision, 65536 radii (none beyond 4.9) and 1024 angles.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from vbdl_kernels.noise_kernel import noise4, philox

_TILE, _TURNS = 1024, 64


@triton.jit
def ours(out, TILE: tl.constexpr, TURNS: tl.constexpr, FAST: tl.constexpr):
    pid = tl.program_id(0)
    lane = tl.arange(0, TILE)
    total = tl.zeros((TILE,), tl.float32)
    seed = (tl.zeros((1,), tl.int32) + 17).to(tl.uint32)
    draw = (tl.zeros((1,), tl.int32) + pid).to(tl.uint32)
    for turn in range(TURNS):
        row = tl.zeros((TILE,), tl.int32) + turn
        a, b, c, d = noise4(seed, seed, draw, draw * 0, row, lane, FAST)
        total += a + b + c + d
    tl.store(out + pid, tl.sum(total, 0))


@triton.jit
def randn4x(out, TILE: tl.constexpr, TURNS: tl.constexpr, FAST: tl.constexpr):
    pid = tl.program_id(0)
    lane = tl.arange(0, TILE)
    total = tl.zeros((TILE,), tl.float32)
    for turn in range(TURNS):
        a, b, c, d = tl.randn4x(17, (pid * TURNS + turn) * TILE + lane)
        total += a + b + c + d
    tl.store(out + pid, tl.sum(total, 0))


@triton.jit
def randn(out, TILE: tl.constexpr, TURNS: tl.constexpr, FAST: tl.constexpr):
    pid = tl.program_id(0)
    lane = tl.arange(0, TILE)
    total = tl.zeros((TILE,), tl.float32)
    for turn in range(TURNS):
        for j in tl.static_range(4):
            total += tl.randn(17, ((pid * TURNS + turn) * 4 + j) * TILE + lane)
    tl.store(out + pid, tl.sum(total, 0))


# sin(pi v) = v (c1 + c3 v^2 + c5 v^4 + c7 v^6) on [-1/2, 1/2] by least squares, in halves
_SINE = (3.14158, -5.16725, 2.54288, -0.55716)
# two words -> cosine and sine normals of both: (cos a, cos b) and (sin a, sin b), halves
_ASM = """{
.reg .b32 t, r, x, v, y, p, m;
.reg .f32 ua, ub;
and.b32 t, $2, 0xFFFF;
cvt.rn.f32.u32 ua, t;
fma.rn.f32 ua, ua, 0f37800000, 0f37000000;
lg2.approx.ftz.f32 ua, ua;
mul.f32 ua, ua, 0fBFB17218;
sqrt.approx.ftz.f32 ua, ua;
and.b32 t, $3, 0xFFFF;
cvt.rn.f32.u32 ub, t;
fma.rn.f32 ub, ub, 0f37800000, 0f37000000;
lg2.approx.ftz.f32 ub, ub;
mul.f32 ub, ub, 0fBFB17218;
sqrt.approx.ftz.f32 ub, ub;
cvt.rn.f16x2.f32 r, ub, ua;
prmt.b32 t, $2, $3, 0x7632;
shr.u32 t, t, 6;
and.b32 m, t, 0x03FF03FF;
or.b32 x, m, 0x3C003C00;
@HALF@
mul.f16x2 $0, p, r;
add.u32 m, m, 0x01000100;
and.b32 m, m, 0x03FF03FF;
or.b32 x, m, 0x3C003C00;
@HALF@
mul.f16x2 $1, p, r;
}"""
# x in [1, 2) is a turn from its middle on: |2 x - 3| is the angle by pi, 1/2 less it what the sine is taken of
_HALF = """mov.b32 v, 0x40004000;
mov.b32 y, 0xC200C200;
fma.rn.f16x2 x, x, v, y;
abs.f16x2 x, x;
mov.b32 v, 0x38003800;
sub.f16x2 v, v, x;
mul.f16x2 y, v, v;
mov.b32 p, 0xB875B875;
mov.b32 t, 0x41164116;
fma.rn.f16x2 p, p, y, t;
mov.b32 t, 0xC52BC52B;
fma.rn.f16x2 p, p, y, t;
mov.b32 t, 0x42484248;
fma.rn.f16x2 p, p, y, t;
mul.f16x2 p, p, v;"""
_BOX_MULLER = tl.constexpr(_ASM.replace("@HALF@", _HALF))


@triton.jit
def halves(a, b):
    """Draw four normals from two random words, as two pairs of halves."""
    return tl.inline_asm_elementwise(
        _BOX_MULLER, "=r,=r,r,r", [a, b], dtype=(tl.uint32, tl.uint32), is_pure=True, pack=1
    )


@triton.jit
def add_halves(a, b):
    return tl.inline_asm_elementwise("add.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.uint32, is_pure=True, pack=1)


@triton.jit
def sixteen_bits(out, TILE: tl.constexpr, TURNS: tl.constexpr, FAST: tl.constexpr):
    """Draw eight normals from each counter, with half as many counters."""
    pid = tl.program_id(0)
    lane = tl.arange(0, TILE).to(tl.uint32)
    total = tl.zeros((TILE,), tl.uint32)
    seed = (tl.zeros((1,), tl.int32) + 17).to(tl.uint32)
    draw = (tl.zeros((1,), tl.int32) + pid).to(tl.uint32)
    for turn in range(TURNS // 2):
        row = (tl.zeros((TILE,), tl.int32) + turn).to(tl.uint32)
        w0, w1, w2, w3 = philox(seed, seed, row, lane, draw + lane * 0, lane * 0, FAST)
        a, b = halves(w0, w1)
        c, d = halves(w2, w3)
        total = add_halves(add_halves(total, add_halves(a, b)), add_halves(c, d))
    tl.store(out + pid, tl.sum(total & 0xFFFF, 0).to(tl.float32))


@triton.jit
def halves_of(words, out, count, TILE: tl.constexpr):
    """out[:, i] of words[2 i], words[2 i + 1]: the four normals, for a comparison with `reference_halves`."""
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    a = tl.load(words + 2 * at, mask=at < count, other=0).to(tl.uint32, bitcast=True)
    b = tl.load(words + 2 * at + 1, mask=at < count, other=0).to(tl.uint32, bitcast=True)
    c, d = halves(a, b)
    tl.store(out + at, c.to(tl.int32, bitcast=True), mask=at < count)
    tl.store(out + count + at, d.to(tl.int32, bitcast=True), mask=at < count)


def reference_halves(words: torch.Tensor) -> torch.Tensor:
    """What `halves` computes, in float32 from (n,) words as int64: (2, n) cosine and sine normals."""
    radius = ((words & 0xFFFF).float() * 2.0**-16 + 2.0**-17).log2().mul(-1.3862943611198906).sqrt()
    angle = words >> 22 & 0x3FF

    def sine(number: torch.Tensor) -> torch.Tensor:
        v = 0.5 - (2 * (1 + (number & 0x3FF).float() / 1024) - 3).abs()
        y = v * v
        c1, c3, c5, c7 = _SINE
        return v * (c1 + y * (c3 + y * (c5 + y * c7)))

    return torch.stack([sine(angle), sine(angle + 256)]) * radius


def providers(count: int) -> dict[str, Callable[[], torch.Tensor]]:
    """About `count` normals each."""
    programs = max(1, count // (4 * _TILE * _TURNS))
    out = torch.empty(programs, device="cuda")
    fast = torch.version.hip is None

    def launch(kernel):
        return lambda: kernel[(programs,)](out, TILE=_TILE, TURNS=_TURNS, FAST=fast, enable_fp_fusion=True) and out

    return {f"registers, {k.__name__}": launch(k) for k in (ours, sixteen_bits, randn4x, randn)}
