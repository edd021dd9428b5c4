"""Rewrites of traced graphs that compute the same predictive distribution with less work.

A network is traced with each linear layer as one node. Each rewrite finds its pattern in the graph and replaces it;
the linear layers that remain are lowered to matrix products. A rewrite looks at operations and at what they depend on
(draw, input), never at the method.

    draws      drawn weights written in any way get one form           same numbers
    local      normal layers draw outputs, not weights                same distribution of every row, other draws
    compact    dropped units are left out, masks folded into weights  same numbers, up to float rounding
    fused      kernels on an accelerator draw weights and masks       same draws, up to float rounding
    linear     the remaining linear layers become matrix products     same numbers
    loops      compiled loops between products run along memory       same numbers
"""

from collections.abc import Callable, Sequence

from torch import Tensor, fx

from vbdl.compiling.rewrite import local
from vbdl.compiling.rewrite.compact import compact
from vbdl.compiling.rewrite.draws import in_one_form
from vbdl.compiling.rewrite.fused import fuse

MANY_ROWS = 128  # from this many rows on, one product with kept weights is faster than two for mean and variance


def layers_that_draw_outputs(sentences: Sequence[str]) -> int:
    """The number of layers that draw outputs in a graph with these choices: other numbers than drawn weights give."""
    return sum(int(sentence.split()[0]) for sentence in sentences if local.draws_outputs(sentence))


def draws_outputs(sentences: Sequence[str]) -> bool:
    """Whether layers draw outputs in a graph with these choices."""
    return layers_that_draw_outputs(sentences) > 0


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
    """Rewrite a traced graph in place, and return a sentence on each choice.

    kinds: the region of each placeholder (`vbdl.compiling.graph.dependence`).
    rows: the rows of the tile.
    budget: bytes for values that are kept of all draws.
    joint: draw weights, so that a draw is one network for all rows.
    largest_tile: the rows of the predictor's largest tile. It decides which layers draw outputs, and neither this tile
        nor a timing does, so that a row has the same draws in every batch.
    measure: measure(node, of) is the maximum of `of` over blocks of a node's values in all draws.
    """
    sentences = []
    in_one_form(traced)
    if not joint:
        hidden = largest_tile < MANY_ROWS
        counts = local.reparameterize(traced, kinds, rows, hidden)
        sentences += [f"{count} {sentence}" for sentence, count in counts.items()]
    sentences += compact(traced, kinds, n_samples, budget, measure)
    return sentences + fuse(traced, n_samples=n_samples, budget=budget)
