"""A plan says how the draws are executed: mapped together or one by one, in chunks of how many, and what is kept.

Chosen from the traced graph alone: its sizes say what memory a draw takes, its cut what depends on the draw only.
"""

from dataclasses import dataclass

import torch

from vbdl.compiling.graph import BODY, DRAWN, ONCE, PREFIX, Cut, Region

# Activations of a chunk. On a CPU past a few MiB a larger chunk saves no more overhead and leaves every cache
# (`docs/speed.md`); an accelerator wants many rows in flight, and few launches.
_CHUNK_BYTES, _ACCELERATOR_CHUNK_BYTES = 8 * 2**20, 256 * 2**20
_PRODUCT_BYTES = 2 * 2**20  # of matrix products on a CPU, where one call would not do: they lose little by more calls


@dataclass(frozen=True)
class Plan:
    """How the draws of one architecture are executed on one shape of input, with the reasons."""

    strategy: str  # "stacked": draws mapped with vmap; "loop": one after the other
    n_samples: int
    chunk: int  # draws in one call
    tile: int  # rows in one call
    keep_draws: bool  # masks and weights are made once and kept; otherwise made again for every call
    draw_bytes: int  # of one draw's masks and weights
    activation_bytes: int  # of one draw's activations, for one tile
    once_flops: int  # paid when the plan is made
    draw_flops: int  # for one draw, paid once if kept
    prefix_flops: int  # for one tile, whatever the number of draws
    body_flops: int  # for one draw and one tile
    reasons: tuple[str, ...]  # of each choice, and of what was rejected

    def explain(self) -> str:
        """The plan in words and figures, a line each."""
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
) -> Plan:
    """The plan for a graph traced with `traced_draws` draws.

    Half the budget is for kept draws and half for activations. Raises ValueError where one draw alone is over it.
    """
    draw_bytes = cut.kept_bytes() // traced_draws
    activation_bytes = max(1, cut.regions[BODY].peak_bytes() // traced_draws)
    half = memory_budget // 2
    if activation_bytes > half:
        raise ValueError(
            f"one draw of {tile} rows needs {_bytes(activation_bytes)} of activations, more than half of the "
            f"memory budget of {_bytes(memory_budget)}: use smaller tiles or a larger memory_budget"
        )
    said = list(reasons)
    keep = n_samples * draw_bytes <= half
    if chunk_size is not None:
        chunk = min(chunk_size, n_samples)
        said.append(f"chunk_size={chunk_size} was asked for")
    elif strategy == "loop":
        chunk = 1
    else:
        within = _chunk_bytes(cut.regions[BODY], n_samples * activation_bytes)
        most = max(1, min(n_samples, min(half, max(within, activation_bytes)) // activation_bytes))
        if not keep:  # a chunk's draws are made for every call, and are in memory while it runs
            most = max(1, min(most, half // draw_bytes))
        chunk = -(-n_samples // -(-n_samples // most))  # the same number of calls, as even as can be
        if chunk < n_samples:
            said.append(f"chunks keep the activations of a call within {_bytes(min(half, within))}")
    if not keep:
        said.append(f"{_bytes(n_samples * draw_bytes)} of draws are more than half of memory_budget, so none is kept")
    if not cut.regions[PREFIX].empty and cut.regions[PREFIX].flops():
        said.append("layers before the first random one run once for all draws")
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
        reasons=tuple(said),
    )


def _chunk_bytes(body: Region, total: int) -> int:
    """The most bytes that the activations of one call may take; total: those of all draws.

    All draws go in one call if they fit. Otherwise a call takes what the cache next to a core holds, but more for a
    convolution, which lays its weights out anew in every call, and on an accelerator, which has to be filled."""
    values = [n.meta.get("val") for n in body.nodes]
    if any(v.device.type != "cpu" for v in values if isinstance(v, torch.Tensor)):
        return _ACCELERATOR_CHUNK_BYTES
    convolves = any(n.target is torch.ops.aten.convolution.default for n in body.nodes)
    return _PRODUCT_BYTES if not convolves and total > _CHUNK_BYTES else _CHUNK_BYTES


def _bytes(n: int) -> str:
    size = float(n)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def _count(n: int) -> str:
    size = float(n)
    for unit in ("", " K", " M"):
        if size < 1000:
            return f"{size:.3g}{unit}flop"
        size /= 1000
    return f"{size:.3g} Gflop"
