"""Predict all splits in one call: each member of a stacked posterior predicts the rows of its split."""

from collections.abc import Iterator

import torch
from torch import Tensor

from vbdl.calling.each import call_each
from vbdl.calling.mapping import can_map
from vbdl.calling.stacking import call_stacked
from vbdl.model import Model
from vbdl.types import Likelihood, Posterior

_ROWS = 32_768  # rows times draws times members in one call, so that activations of a small network fit the cache


@torch.no_grad()
def stacked_parameters(
    posterior: Posterior, likelihood: Likelihood, x: Tensor, n_samples: int, per_split: int = 1, seed: int = 0
) -> Iterator[Tensor]:
    """Yield the parameters of p(y | x) of each draw, in chunks (draws, splits, rows, ...).

    posterior: an ensemble of splits * per_split members; member m belongs to split m // per_split.
    x: (splits, rows, ...), the rows of each split.
    n_samples: number of draws for posteriors with unlimited draws; others give one draw of each member.
    Draw s of member m is sample s * members + m of `vbdl.Predictor`.
    """
    splits, rows = x.shape[:2]
    members = posterior.n_members
    if members != splits * per_split:
        raise ValueError(f"{splits} splits of {per_split} members need {splits * per_split} members, not {members}")
    endless = posterior.n_draws is None
    rounds = -(-n_samples // per_split) if endless else 1
    posterior.eval()
    posterior.prepare(x[0])
    model = Model(posterior, likelihood)
    execute = call_stacked if can_map(model) else call_each
    width = min(rows, max(1, _ROWS // members))
    chunk = max(1, min(rounds, _ROWS // (members * width)))
    inputs = x.repeat_interleave(per_split, dim=0)  # (members, rows, ...)
    for start in range(0, rounds, chunk):
        count = min(chunk, rounds - start)
        state = model.entries(torch.arange(start * members, (start + count) * members), seed)
        shared = {n: t.detach() for n, t in model.shared(state).items()}
        tiles = []
        for first in range(0, rows, width):
            tile = inputs[:, first : first + width]
            tile = tile.repeat(count, *[1] * (tile.ndim - 1)) if count > 1 else tile
            tiles.append(execute(model, state, shared, tile, inputs_stacked=True))
        parameters = torch.cat(tiles, dim=1)  # (count * members, rows, ...)
        yield parameters.unflatten(0, (count, splits, per_split)).transpose(1, 2).flatten(0, 1)
