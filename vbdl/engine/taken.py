"""Rows that most networks cannot compute with, and some can: not finite ones, and numbers of another dtype.

A float mask has -inf where attention may not look, a network may replace NaN itself, and one may begin with
`x.float()`. Whether a network takes such rows is found by running a draw on them.
"""

import torch

from vbdl.calling.inputs import Flat
from vbdl.calling.stacking import call
from vbdl.engine.prepared import prepared
from vbdl.model import Model
from vbdl.types import Likelihood, Posterior


def takes(posterior: Posterior, likelihood: Likelihood, rows: Flat, autocast: torch.dtype | None = None) -> bool:
    """Whether draw 0 of every architecture of a posterior is finite on all of these rows."""
    rows = rows.map(lambda t: t.detach().clone())  # the network may write to them
    for part in posterior.parts:
        try:
            with torch.no_grad():
                model = prepared(Model(part, likelihood, autocast), rows.nested)
                own = model.one_draw(0, seed=0)
                outputs = call(model.twin(), {**model.shared(own), **own}, rows.nested)
        except Exception:  # of the user's network, of any type: it does not take them
            return False
        if not bool(outputs.isfinite().all()):
            return False
    return True
