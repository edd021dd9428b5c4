"""What training minimises, as one module, so that it can be stacked, mapped and compiled like any other."""

from typing import Any

import torch
from torch import Tensor, nn
from vbdl_kernels import make_key

from vbdl.nn.drawn import draws_of_one_step
from vbdl.nn.dropout import CounterDropout
from vbdl.stacking import call
from vbdl.types import Inputs

_TRAINING = 1 << 62  # training draws come from seeds of their own, never from those of a prediction


def training_keys(seed: int, n_members: int, number: Tensor) -> Tensor:
    """The keys of a training step, (members, 2): member m draws from seed + m. number: () its first draw."""
    return torch.cat([make_key((seed + m) ^ _TRAINING, number.reshape(1)) for m in range(n_members)])


class Objective(nn.Module):
    """mean over the batch of -log p(y | x, w), plus the network's own regularization where it has one (the KL).

    Everything random in it (dropout, a mask a row; drawn weights) is drawn from `key`, (2,) int64: a step is a pure
    function of its key, the same eager or compiled, alone or stacked with other members.

    n_samples: draws of the network a step, averaged.
    """

    key: Tensor

    def __init__(self, network: nn.Module, likelihood: Any, n_samples: int = 1):
        super().__init__()
        self.network, self.n_samples = network, n_samples
        self.likelihood: Any = likelihood
        self.register_buffer("key", torch.zeros(2, dtype=torch.int64))

    def forward(self, inputs: Inputs, y: Tensor) -> Tensor:
        """-> () nats a row"""
        with draws_of_one_step():
            terms = [self._at(self.key + self.key.new_tensor([0, k]), inputs, y) for k in range(self.n_samples)]
        return terms[0] if len(terms) == 1 else torch.stack(terms).mean()

    def _at(self, key: Tensor, inputs: Inputs, y: Tensor) -> Tensor:
        root = getattr(self.network, "inner", self.network)  # rates are overridden by the names of the user's modules
        with CounterDropout(key, root, getattr(self.network, "rate", None), per_row=True):
            outputs = call(self.network, {"key": key} if hasattr(self.network, "key") else {}, inputs)
        loss = self.likelihood.training_loss(self.likelihood(outputs), y).mean()
        regularization = getattr(self.network, "regularization", None)
        # at the same key, since the KL of some priors is estimated at the weights drawn
        return loss if regularization is None else loss + regularization(key)
