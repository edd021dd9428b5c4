"""Rewrites of the traced call that give the same predictive for less work.

A network is traced with its linear layers whole, each rewrite looks for its pattern in the graph and replaces it, and
the layers that are left are lowered to products. A rewrite knows operations and what each depends on (draw, input),
never a method.

    local      mean-field layers draw outputs, not weights     same distribution of every row, other draws
    compact    dropped units are left out, masks are folded    the same numbers, to float rounding
    fused      on an accelerator, kernels that draw            the same draws, to float rounding
    linear     what is left becomes products                   the same numbers
    loops      compiled, what is between them runs along memory   the same numbers
"""

from collections.abc import Callable

from torch import Tensor, fx

from vbdl.compiling.rewrite.compact import compact
from vbdl.compiling.rewrite.fused import fuse
from vbdl.compiling.rewrite.local import reparameterize

_MANY_ROWS = 128  # from here on one product with kept weights beats two for mean and variance


def rewrite(
    traced: fx.GraphModule,
    kinds: list[int],
    *,
    rows: int,
    n_samples: int,
    budget: int,
    joint: bool,
    largest_tile: int,
    measure: Callable[[fx.Node, Callable[[Tensor], int]], int],
) -> list[str]:
    """Rewrite a traced call in place; returns a sentence on each choice.

    rows: of the tile. budget: bytes for what is kept of all draws. joint: keep joint draws of weights. largest_tile:
    of the predictor: which layers draw outputs is decided by it, never by this tile or a timing, so that a row has the
    same draws whatever batch it comes in. measure: the largest of a measure of blocks of a drawn value.
    """
    said = []
    if not joint:
        hidden = largest_tile < _MANY_ROWS
        if done := reparameterize(traced, kinds, rows, hidden):
            said.append(
                f"{len(done)} mean-field layers draw their outputs, not their weights: the same distribution of every "
                f"row; joint=True draws weights"
            )
    said += compact(traced, kinds, n_samples, budget, measure)
    return said + fuse(traced, n_samples=n_samples, budget=budget)
