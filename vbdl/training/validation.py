"""The validation loss of each member, by which early stopping selects an epoch."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from vbdl.calling.each import call_each
from vbdl.calling.inputs import map_inputs
from vbdl.calling.mapping import why_not_mapped
from vbdl.calling.stacking import call_stacked
from vbdl.data.stored import StoredRows
from vbdl.model import Model
from vbdl.training.processes import Sharing

# draws per member of a posterior that samples: validation scores their mixture
_DRAWS = 8
_ROWS_COMPARED = 32  # rows on which `vmap` over draws is compared, once, with running draws one by one
_ROWS_AT_ONCE = 1024


class Validation:
    """The mean -log p(y | x) of each member on the validation rows, in nats.

    sharing: the members and rows whose losses this process computes.
    together: score the mixture of all members in place of each one. A parameter that they share and train has one best
        epoch, which is that of the mixture.
    """

    def __init__(self, model: Model, seed: int, rows: StoredRows, sharing: Sharing, together: bool = False):
        self.model, self.seed, self.rows, self._together = model, seed, rows, together
        self._sharing = sharing
        self._execute: Callable[..., Tensor] | None = None  # runs all draws, by `vmap` or one by one

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """The loss of each member, (members,), for the posterior's current state; leaves it in training mode.

        If members are scored together, each has the loss of their mixture.
        """
        model, posterior = self.model, self.model.posterior
        draws = 1 if posterior.n_draws is not None else _DRAWS
        posterior.eval()
        total, members, mine = (
            torch.zeros(posterior.n_members),
            self._sharing.members,
            self._sharing.rows(len(self.rows)),
        )
        # draw d of member m is number d * n_members + m
        numbers = torch.arange(posterior.n_members * draws).view(draws, -1)[:, members.start : members.stop].flatten()
        entries = model.entries(numbers, self.seed)
        shared = model.shared(entries)
        for start in range(mine.start, mine.stop, _ROWS_AT_ONCE):
            x, y = self.rows.take(torch.arange(start, min(start + _ROWS_AT_ONCE, mine.stop)))
            if self._execute is None:
                some = map_inputs(lambda t: t[:_ROWS_COMPARED], x)
                self._execute = call_each if why_not_mapped(model, entries, shared, some) else call_stacked
            parameters = self._execute(model, entries, shared, x)
            each = torch.stack([-model.likelihood.nll(p, y) for p in parameters])
            each = torch.logsumexp(each.view(draws, len(members), -1), dim=0) - math.log(draws)
            if self._together:  # members that train shared parameters are all in one process
                each = torch.logsumexp(each, dim=0, keepdim=True) - math.log(len(members))
            total[members.start : members.stop] -= each.sum(1).cpu()
        posterior.train()
        return self._sharing.processes.sum(total) / len(self.rows)
