"""The trained network itself: a posterior that is one point, q(w) = delta(w - trained weights), with one draw."""

from typing import Any

import torch
from torch import nn

from vbdl.calling.copies import copied
from vbdl.nn.keyed import KeyedNetwork
from vbdl.nn.objective import KeyedPosterior, take_network
from vbdl.types import Output


class PointNetwork(KeyedNetwork):
    """A network that is the same in every draw: it ignores its `key`, and its dropout is off in prediction."""

    only_calls_inner = True
    numbers_places = False

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner
        device = next((p.device for p in inner.parameters()), None)
        self.register_buffer("key", torch.zeros(2, dtype=torch.int64, device=device), persistent=False)

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


class Deterministic(KeyedPosterior):
    """A trained network as it is: one draw, which is the network in evaluation mode.

    It gives a network without any posterior what vbdl needs to calibrate, decide, serve, run batches and export:

        predict = vbdl.Predictor(vbdl.Deterministic(network), vbdl.Categorical())
        predict = vbdl.calibrate(predict, (x, y), vbdl.Temperature())

    It knows no epistemic uncertainty: `epistemic` is 0, `aleatoric` equals `total`, and `standard_error` is NaN,
    because one draw says nothing about the spread of draws. A decision by kind="epistemic" is refused. For an epistemic
    part without another training see `vbdl.Laplace`, with a short one `vbdl.SWAG`.

    module: any network, trained or not; it is copied. `fit` trains it as a plain network, with its dropout on, whose
        masks are drawn from counters.
    seed: of the dropout masks in training.
    output: name or index of the module's output to predict from, or a function that returns it, if it returns several;
        "logits" are found without it.

    Raises TypeError or ValueError for a module that cannot be called with replaced weights, like one that
    `torch.compile` returned.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> x, y = torch.randn(20, 4), torch.randint(3, (20,))
    >>> predict = vbdl.Predictor(vbdl.Deterministic(net), vbdl.Categorical(), compile=False)
    >>> predict(x).epistemic.sum()
    tensor(0.)
    """

    module: PointNetwork
    n_draws = 1

    def __init__(self, module: nn.Module, seed: int = 0, *, output: Output = None):
        super().__init__()
        module = take_network(self, module, output)
        self.module = PointNetwork(copied(module))
        self.seed = seed
        device = next((p.device for p in module.parameters()), None)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=device))

    def config(self) -> dict[str, Any]:
        """The arguments that make it again, given its network."""
        return {"seed": self.seed} if self.output is None else {"seed": self.seed, "output": self.output}
