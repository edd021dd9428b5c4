"""The execution plan: it maps draws together or runs them one by one, sets their number in a call, and may keep them.

A plan is chosen from the traced graph alone: its tensor sizes give the memory of a draw, and its regions say what
depends on the draw but not on the input.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import fx

from vbdl.compiling.graph import BODY, DRAWN, ONCE, PREFIX, Cut, Region, flops_of, name_of, own_bytes

# Activations of a chunk, in bytes. On a CPU, chunks beyond a few MiB save no more overhead and fit into no cache
# (`docs/speed.md`); an accelerator needs many rows at once and few kernel launches.
_CHUNK_BYTES, _ACCELERATOR_CHUNK_BYTES = 8 * 2**20, 256 * 2**20
_PRODUCT_BYTES = 2 * 2**20  # for a network without convolutions on a CPU that needs several calls: they cost it little
_KEPT = 16 * 2**20  # bytes; more draws are kept only if making them again would take a share of a call's time
_SHARE = 1 / 20
_NS = {"keep": 1.0, "words": 2.0, "normal": 8.0}  # nanoseconds of a core for a number; others take about one
_FLOPS = 2e10  # floating-point operations of a core in a second
_FEW = 8  # times the bytes of the convolutions' weights in the activations of a draw, where the weights cost little


@dataclass(frozen=True)
class Plan:
    """The plan for the draws of one model on one shape of input, with the reasons for it."""

    strategy: str  # "stacked": draws mapped with vmap; "loop": one after the other
    n_samples: int
    chunk: int  # draws in one call
    tile: int  # rows in one call
    keep_draws: bool  # True: masks and weights are drawn once and kept; False: drawn again in every call
    draw_bytes: int  # bytes of one draw's masks and weights
    activation_bytes: int  # bytes of one draw's activations, for one tile
    once_flops: int  # flops of what depends on neither draw nor input, computed once
    draw_flops: int  # flops of one draw's masks and weights, computed once if kept
    prefix_flops: int  # flops of one tile before the first random layer, whatever the number of draws
    body_flops: int  # flops of one draw and one tile
    reasons: tuple[str, ...]  # one sentence for each choice

    def because(self, reason: str) -> "Plan":
        """The same plan with one more reason."""
        return dataclasses.replace(self, reasons=(*self.reasons, reason))

    def explain(self) -> str:
        """Describe the plan in words and figures, one line for each."""
        kept = self.n_samples * self.draw_bytes
        per_tile = self.prefix_flops + self.n_samples * (self.body_flops + (0 if self.keep_draws else self.draw_flops))
        lines = [
            f"strategy       {self.strategy}: {self.n_samples} draws in {-(-self.n_samples // self.chunk)} "
            f"call(s) of {self.chunk}, {self.tile} rows a tile",
            f"draws          {_bytes(self.draw_bytes)} each, "
            + (f"made once and kept ({_bytes(kept)})" if self.keep_draws else "made again in every call"),
            f"activations    {_bytes(self.chunk * self.activation_bytes)} a call",
            f"operations     {_count(per_tile)} a tile: {_count(self.prefix_flops)} once for all draws, "
            f"{_count(self.body_flops)} for each draw",
        ]
        return "\n".join(lines + [f"because        {reason}" for reason in self.reasons])


def choose(
    cut: Cut,
    strategy: str,
    traced_draws: int,
    n_samples: int,
    tile: int,
    memory_budget: int,
    chunk_size: int | None,
    reasons: tuple[str, ...] = (),
    entry_bytes: int = 0,
) -> Plan:
    """Choose the plan for a graph that was traced with `traced_draws` draws.

    memory_budget: bytes; half is for kept draws, half for activations. entry_bytes: of a draw's entries that `draws`
    makes and a call reads. Raises ValueError if the activations of a single
    draw need more than their half.
    """
    draw_bytes = cut.kept_bytes() // traced_draws + entry_bytes
    activation_bytes = max(1, cut.regions[BODY].peak_bytes() // traced_draws)
    half = memory_budget // 2
    if activation_bytes > half:
        raise ValueError(
            f"one draw of {tile} rows needs {_bytes(activation_bytes)} of activations, more than half of the "
            f"memory budget of {_bytes(memory_budget)}: use smaller tiles or a larger memory_budget"
        )
    reasons_so_far = list(reasons)
    fits = n_samples * draw_bytes <= half
    quick = n_samples * draw_bytes > _KEPT and not entry_bytes and _are_quick(cut)
    keep = fits and not quick
    if chunk_size is not None:
        chunk = min(chunk_size, n_samples)
        reasons_so_far.append(f"chunk_size={chunk_size} was asked for")
    elif strategy == "loop":
        chunk = 1
    else:
        within = _chunk_bytes(cut.regions[BODY], activation_bytes, n_samples)
        alone = activation_bytes + (draw_bytes if quick else 0)
        most = max(1, min(n_samples, min(half, max(within, alone)) // alone))
        if not keep:  # the draws of a chunk are in memory while its call runs
            most = max(1, min(most, half // draw_bytes))
        chunk = -(-n_samples // -(-n_samples // most))  # the same number of calls, of sizes as equal as possible
        if n_samples % chunk:  # or calls of one size, which share their code, if they are not many more
            equal = max(size for size in range(1, most + 1) if n_samples % size == 0)
            chunk = equal if 2 * equal > most else chunk
        if chunk < n_samples:
            reasons_so_far.append(f"chunks keep the activations of a call within {_bytes(min(half, within))}")
    total = _bytes(n_samples * draw_bytes)
    if not fits:
        reasons_so_far.append(f"{total} of draws are more than half of memory_budget, so none is kept")
    elif quick:
        reasons_so_far.append(f"making draws again takes a small share of a call, so {total} of them are not kept")
    if not cut.regions[PREFIX].empty and cut.regions[PREFIX].flops():
        reasons_so_far.append("layers before the first random one run once for all draws")
    return Plan(
        strategy=strategy,
        n_samples=n_samples,
        chunk=chunk,
        tile=tile,
        keep_draws=keep,
        draw_bytes=draw_bytes,
        activation_bytes=activation_bytes,
        once_flops=cut.regions[ONCE].flops(),
        draw_flops=cut.regions[DRAWN].flops() // traced_draws,
        prefix_flops=cut.regions[PREFIX].flops(),
        body_flops=cut.regions[BODY].flops() // traced_draws,
        reasons=tuple(reasons_so_far),
    )


def _are_quick(cut: Cut) -> bool:
    """Whether making draws takes a small share of the time of a call, on a CPU."""
    nodes = cut.regions[DRAWN].nodes
    values = [(n, v) for n in nodes if isinstance(v := n.meta.get("val"), torch.Tensor) and own_bytes(n)]
    if any(v.device.type != "cpu" for _, v in values):
        return False
    draws = sum(1e-9 * _NS.get(name_of(n), 1.0) * v.numel() for n, v in values)
    draws += cut.regions[DRAWN].flops() / _FLOPS
    return draws <= _SHARE * cut.regions[BODY].flops() / _FLOPS


def _chunk_bytes(body: Region, alone: int, n_samples: int) -> int:
    """The most bytes that the activations of one call may take.

    alone: the bytes of the activations of one draw. On a CPU all draws go into one call if their activations fit into
    8 MiB. Otherwise a call gets 2 MiB, which the cache of a core holds, or half as much as the weights that all draws
    share, if that is more: each call reads them from memory. With convolutions it gets 8 MiB, because a convolution
    rearranges its weights in every call, unless a draw fills the cache alone and its weights are few beside that. An
    accelerator gets 256 MiB to be fully used.
    """
    values = [n.meta.get("val") for n in body.nodes]
    if any(v.device.type != "cpu" for v in values if isinstance(v, torch.Tensor)):
        return _ACCELERATOR_CHUNK_BYTES
    inside = set(body.nodes)
    convolutions = (n for n in body.nodes if n.target is torch.ops.aten.convolution.default)
    kernels = {k for n in convolutions if isinstance(k := n.args[1], fx.Node)}
    if kernels:
        few = kernels.isdisjoint(inside) and _FEW * sum(k.meta["val"].nbytes for k in kernels) <= alone
        return _PRODUCT_BYTES if few and alone >= _PRODUCT_BYTES else _CHUNK_BYTES
    if n_samples * alone <= _CHUNK_BYTES:
        return _CHUNK_BYTES
    factors = {a for n in body.nodes if flops_of(n) for a in n.all_input_nodes if a not in inside}
    weights = sum(a.meta["val"].nbytes for a in factors if a.meta["val"].ndim == 2)
    return max(_PRODUCT_BYTES, weights // 2)


def _bytes(n: int) -> str:
    size = float(n)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def _count(n: int) -> str:
    size = float(n)
    for unit in ("", "K", "M"):
        if size < 1000:
            return f"{size:.3g} {unit}flop"
        size /= 1000
    return f"{size:.3g} Gflop"
