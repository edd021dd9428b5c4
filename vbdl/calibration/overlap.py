"""Which rows a predictor was trained on, known by the fingerprints that `vbdl.fit` records."""

import torch
from torch import Tensor

from vbdl.calling.inputs import flatten
from vbdl.data.fingerprint import fingerprints
from vbdl.engine.predictor import Predictor
from vbdl.types import Inputs


def trained_on(predictor: Predictor, rows: Tensor) -> Tensor:
    """Whether the posterior was trained on each of these rows, (rows,) bool; rows: fingerprints, (rows,) int64."""
    # an ensemble of several architectures may be trained as a whole or part by part
    posterior = predictor.posterior
    seen = [trained.training_rows for trained in (posterior, *posterior.parts)]
    known = [trained.cpu() for trained in seen if trained is not None]
    return torch.isin(rows.cpu(), torch.cat(known)) if known else torch.zeros(len(rows), dtype=torch.bool)


def unseen(predictor: Predictor, x: Inputs) -> Tensor:
    """The numbers of the rows of x that the predictor was not trained on, (rows,) int64: x[vbdl.unseen(predict, x)].

    Rows to calibrate, choose thresholds and measure on must not be training rows. Training rows are known by the
    fingerprints that `vbdl.fit` records, which are of the exact numbers of a row; a predictor that was trained in
    another way has none, and every row is returned.

    >>> net, x, y = nn.Linear(4, 3), torch.randn(30, 4), torch.randint(3, (30,))
    >>> q, likelihood = vbdl.DeepEnsemble(net, 2), vbdl.Categorical()
    >>> history = vbdl.fit(q, (x[:20], y[:20]), likelihood, epochs=1, compile=False, progress=False)
    >>> vbdl.unseen(vbdl.Predictor(q, likelihood), x[18:])  # x[18] and x[19] were trained on
    tensor([ 2,  3,  4,  5,  6,  7,  8,  9, 10, 11])
    """
    return (~trained_on(predictor, fingerprints(flatten(x).nested))).nonzero().squeeze(1)


def row_numbers(chosen: Tensor) -> str:
    """The numbers of the chosen rows in words, at most five of them: "rows 3, 8"; chosen: (rows,) bool."""
    numbers = chosen.nonzero().squeeze(1).tolist()
    more = ", ..." if len(numbers) > 5 else ""
    return f"{'row' if len(numbers) == 1 else 'rows'} {', '.join(map(str, numbers[:5]))}{more}"
