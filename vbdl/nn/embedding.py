"""Embeddings of stacked networks: what `torch.func` leaves out of `F.embedding` is written in plain operations.

Under `vmap` the rows of all members become one table, and an index of its own is then only member 0's: its padding row
alone would get no gradient. `max_norm` writes to the table, for which `vmap` has no rule.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from vbdl.nn.dropout import CounterDropout


def embedding(
    mode: "CounterDropout",
    func,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """`F.embedding`, the rows of `padding_idx` without a gradient and rows longer than `max_norm` made shorter."""
    table = weight if max_norm is None else _renormed(input, weight, max_norm, norm_type)
    found = func(input, table, None, None, norm_type, scale_grad_by_freq, False)
    if padding_idx is None or not torch.is_grad_enabled():
        return found
    row = padding_idx if padding_idx >= 0 else weight.shape[0] + padding_idx
    return torch.where((input == row).unsqueeze(-1), found.detach(), found)


def _renormed(input: Tensor, weight: Tensor, max_norm: float, norm_type: float) -> Tensor:
    """The table with the rows that are looked up no longer than `max_norm`; the module's own is changed to it."""
    with torch.no_grad():
        own = weight.detach()
        length = torch.linalg.vector_norm(own, norm_type, dim=-1, keepdim=True)
        none = own.new_zeros(weight.shape[0])
        used = none.index_fill(0, input.reshape(-1), 1.0).unsqueeze(-1) > 0
        shorter = torch.where(used & (length > max_norm), own * (max_norm / (length + 1e-7)), own)
    if torch.is_grad_enabled():
        with torch.no_grad():
            weight.copy_(shorter)
        return weight
    return shorter


def padding_rows(module: nn.Module) -> dict[str, int]:
    """The row that pads, of every parameter that is nothing but the table of embeddings with one `padding_idx`.

    A table that another layer uses too (tied weights) has no such row: there it is a weight like any other.
    """
    holders: dict[int, set[int | None]] = {}
    for owner in module.modules():
        for leaf, p in owner._parameters.items():
            if p is not None:
                is_table = isinstance(owner, nn.Embedding | nn.EmbeddingBag) and leaf == "weight"
                holders.setdefault(id(p), set()).add(owner.padding_idx if is_table else None)  # type: ignore[arg-type]
    found = {}
    for name, p in module.named_parameters():
        rows = holders[id(p)]
        if len(rows) == 1 and (row := next(iter(rows))) is not None:
            found[name] = row
    return found
