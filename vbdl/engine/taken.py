"""Some networks take rows that others cannot compute with: rows that are not finite, or of another dtype.

A float mask has -inf where attention may not look, a network may replace NaN itself, and one may begin with
`x.float()`. Whether a network takes such rows is found by running a draw on them.
"""

import torch
from torch import Tensor

from vbdl.calling.copies import holding
from vbdl.calling.inputs import Flat
from vbdl.calling.lending import only_reading
from vbdl.calling.stacking import call
from vbdl.calling.traversing import state_of
from vbdl.engine.prepared import prepared
from vbdl.model import Model
from vbdl.types import Likelihood, Posterior, State


def takes(posterior: Posterior, likelihood: Likelihood, rows: Flat, autocast: torch.dtype | None = None) -> bool:
    """Return whether draw 0 of every network computes finite outputs and gradients from all of these rows.

    A layer that saturates makes a finite number of an infinite one, and a gradient that is none: it does not take it.
    """
    rows = rows.map(lambda t: t.detach().clone())  # the network may write to them
    return all(_takes(part, likelihood, rows, autocast) for part in posterior.parts)


def _takes(posterior: Posterior, likelihood: Likelihood, rows: Flat, autocast: torch.dtype | None) -> bool:
    with only_reading():  # a copy, so that nothing is learned from rows that are refused
        posterior = holding(posterior, state_of(posterior))
    try:
        with torch.no_grad():
            model = prepared(Model(posterior, likelihood, autocast), rows.nested)
            own = model.one_draw(0, seed=0)
            state = {**model.shared(own), **own}
            outputs = call(model.twin(), state, rows.nested)
    except Exception:  # of the user's network, of any type: it does not take them
        return False
    return bool(outputs.isfinite().all()) and _has_gradients(model, state, rows)


def _has_gradients(model: Model, state: State, rows: Flat) -> bool:
    """Return whether the gradients of a draw's entries are finite, or there are none."""
    state = {n: t.detach().clone() for n, t in state.items()}
    entries: list[Tensor] = [t.requires_grad_() for t in state.values() if t.is_floating_point()]
    try:
        with torch.enable_grad():
            outputs = call(model.twin(), state, rows.nested)
            gradients = torch.autograd.grad(outputs.sum(), entries, allow_unused=True)
    except Exception:  # a forward that writes to an entry has none
        return True
    return all(g is None or bool(g.isfinite().all()) for g in gradients)
