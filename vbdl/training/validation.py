"""The validation likelihood of each member, which early stopping goes by."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from vbdl.calling.stacking import call_each, call_stacked, why_not_mapped
from vbdl.data.rows import take
from vbdl.model import Model
from vbdl.types import Inputs

# draws a member is judged by where it has draws: their mixture's likelihood, not one draw's
_DRAWS = 8
_ROWS_COMPARED = 32  # on which mapped draws are compared with draws one after the other, once
_ROWS_AT_ONCE = 1024


class Validation:
    """Mean -log p(y | x) of each member on rows that are not trained on; nats."""

    def __init__(self, model: Model, seed: int, x: Inputs, y: Tensor):
        self.model, self.seed, self.x, self.y = model, seed, x, y
        self._execute: Callable[..., Tensor] | None = None  # of all draws

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """(members,) with the posterior as it is now; it is in training mode afterwards"""
        model, posterior = self.model, self.model.posterior
        draws = 1 if posterior.n_draws is not None else _DRAWS
        posterior.eval()
        total = torch.zeros(posterior.n_members)
        entries = model.entries(torch.arange(posterior.n_members * draws), self.seed)
        shared = model.shared(entries)
        for start in range(0, len(self.y), _ROWS_AT_ONCE):
            rows = torch.arange(start, min(start + _ROWS_AT_ONCE, len(self.y)))
            if self._execute is None:
                some = take(self.x, rows[:_ROWS_COMPARED])
                self._execute = call_each if why_not_mapped(model, entries, shared, some) else call_stacked
            parameters = self._execute(model, entries, shared, take(self.x, rows))
            each = torch.stack([-model.likelihood.nll(p, self.y[rows]) for p in parameters])
            each = torch.logsumexp(each.view(draws, posterior.n_members, -1), dim=0) - math.log(draws)
            total -= each.sum(1).cpu()
        posterior.train()
        return total / len(self.y)
