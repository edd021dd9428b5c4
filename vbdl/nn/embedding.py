"""Embeddings of stacked networks: `padding_idx` and `max_norm` of `F.embedding` in plain operations.

Under `vmap` the tables of all members become one, in which `padding_idx` is a row of member 0: the padding rows of the
other members would get gradients. `max_norm` writes to the table, for which `vmap` has no rule.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vbdl.nn.masks import Masks


def embedding(
    masks: Masks,
    func: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """`F.embedding` with no gradient for the row `padding_idx` and with rows scaled down to a norm of `max_norm`."""
    table = weight if max_norm is None else _renormed(input, weight, max_norm, norm_type)
    vectors = func(input, table, None, None, norm_type, scale_grad_by_freq, False)
    if padding_idx is None or not torch.is_grad_enabled():
        return vectors
    row = padding_idx if padding_idx >= 0 else weight.shape[0] + padding_idx
    return torch.where((input == row).unsqueeze(-1), vectors.detach(), vectors)


def _renormed(input: Tensor, weight: Tensor, max_norm: float, norm_type: float) -> Tensor:
    """The table with the rows that are looked up scaled down to `max_norm`; in training it is changed in place."""
    with torch.no_grad():
        table = weight.detach()
        length = torch.linalg.vector_norm(table, norm_type, dim=-1, keepdim=True)
        none = table.new_zeros(weight.shape[0])
        used = none.index_fill(0, input.reshape(-1), 1.0).unsqueeze(-1) > 0
        shorter = torch.where(used & (length > max_norm), table * (max_norm / (length + 1e-7)), table)
    if torch.is_grad_enabled():
        with torch.no_grad():
            weight.copy_(shorter)
        return weight
    return shorter


def without_row(t: Tensor, row: int | None) -> Tensor:
    """A table without one of its rows, or the table if row is None."""
    return t if row is None else torch.cat([t[:row], t[row + 1 :]])


def padding_rows(module: nn.Module) -> dict[str, int]:
    """The padding row of every embedding table that has one, by name of the parameter.

    A table that another layer uses too (tied weights) is left out: there the row is a weight like any other.
    """
    holders: dict[int, set[int | None]] = {}
    for owner in module.modules():
        for leaf, p in owner._parameters.items():
            if p is not None:
                is_table = isinstance(owner, nn.Embedding | nn.EmbeddingBag) and leaf == "weight"
                holders.setdefault(id(p), set()).add(owner.padding_idx if is_table else None)  # type: ignore[arg-type]
    padding = {}
    for name, p in module.named_parameters():
        rows = holders[id(p)]
        if len(rows) == 1 and (row := next(iter(rows))) is not None:
            padding[name] = row
    return padding
