"""The Triton kernel that writes random words and normals to memory, for operations that do not draw them themselves."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vbdl_kernels.dispatch import fast_math, on_device
from vbdl_kernels.noise_kernel import box_muller, columns_of, load_key, philox


@triton.jit(do_not_specialize=["tag"])
def noise(
    key, out, tag, rows, columns,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, NORMAL: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Write out[s, r, c], contiguous: int64 words, or float32 normals if NORMAL."""
    group_tiles = tl.cdiv(columns, 4 * GROUPS)
    tile = tl.program_id(0)
    row = (tile // group_tiles * ROWS + tl.arange(0, ROWS))[:, None]
    group = (tile % group_tiles * GROUPS + tl.arange(0, GROUPS))[None, :]
    sample = tl.program_id(1)
    k0, k1, draw = load_key(key, sample)
    zero = (row * 0 + group * 0).to(tl.uint32)
    w0, w1, w2, w3 = philox(
        k0, k1, row.to(tl.uint32) + zero, group.to(tl.uint32) + zero, draw + zero, tag.to(tl.uint32) + zero, FAST
    )
    if NORMAL:
        v0, v1 = box_muller(w0, w1, FAST)
        v2, v3 = box_muller(w2, w3, FAST)
    else:
        v0, v1, v2, v3 = w0.to(tl.int64), w1.to(tl.int64), w2.to(tl.int64), w3.to(tl.int64)
    column = columns_of(group)
    to = out + sample.to(tl.int64) * rows * columns + row.to(tl.int64) * columns + column
    tl.store(to, v0, mask=(row < rows) & (column < columns))
    tl.store(to + 32, v1, mask=(row < rows) & (column < columns - 32))
    tl.store(to + 64, v2, mask=(row < rows) & (column < columns - 64))
    tl.store(to + 96, v3, mask=(row < rows) & (column < columns - 96))


def _noise(key: Tensor, layer: int, stream: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    out = torch.empty((*key.shape[:-1], rows, columns), dtype=dtype, device=key.device)
    if out.numel() == 0:
        return out
    flat = key.reshape(-1, 2).contiguous()
    tile = dict(ROWS=8, GROUPS=32) if rows >= 8 else dict(ROWS=1, GROUPS=128)
    grid = (triton.cdiv(rows, tile["ROWS"]) * triton.cdiv(columns, 4 * tile["GROUPS"]), len(flat))
    with on_device(key):
        noise[grid](
            flat, out, layer << 4 | stream, rows, columns,
            NORMAL=dtype == torch.float32, FAST=fast_math(key), enable_fp_fusion=True, **tile,
        )  # fmt: skip
    return out


def words(key: Tensor, layer: int, stream: int, rows: int, columns: int) -> Tensor:
    return _noise(key, layer, stream, rows, columns, torch.int64)


def normal(key: Tensor, layer: int, stream: int, rows: int, columns: int) -> Tensor:
    return _noise(key, layer, stream, rows, columns, torch.float32)
