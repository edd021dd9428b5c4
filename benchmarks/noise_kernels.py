"""Normals made and summed in registers: what drawing costs with no memory in the way."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from vbdl_kernels.noise_kernel import noise4

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


def providers(count: int) -> dict[str, Callable[[], torch.Tensor]]:
    """About `count` normals each."""
    programs = max(1, count // (4 * _TILE * _TURNS))
    out = torch.empty(programs, device="cuda")
    fast = torch.version.hip is None

    def launch(kernel):
        return lambda: kernel[(programs,)](out, TILE=_TILE, TURNS=_TURNS, FAST=fast, enable_fp_fusion=True) and out

    return {f"registers, {k.__name__}": launch(k) for k in (ours, randn4x, randn)}
