"""What training minimises, as one module, so that it can be stacked, mapped and compiled like any other."""

from torch import Tensor, nn

from vbdl.stacking import call
from vbdl.types import Inputs


class Objective(nn.Module):
    """mean over the batch of -log p(y | x, w), plus the network's own regularization where it has one (the KL).

    n_samples: draws of the network's weights a step, averaged, where it has draws.
    """

    def __init__(self, network: nn.Module, likelihood: nn.Module, n_samples: int = 1):
        super().__init__()
        self.network, self.likelihood, self.n_samples = network, likelihood, n_samples

    def forward(self, inputs: Inputs, y: Tensor) -> Tensor:
        """-> () nats a row"""
        if self.n_samples == 1:
            return self._at(self.network, {}, inputs, y)
        terms = []
        for k in range(self.n_samples):
            offset = self.network.key.new_tensor([0, k])
            terms.append(self._at(self.network, {"key": self.network.key + offset}, inputs, y))
        return sum(terms) / self.n_samples  # type: ignore[return-value]

    def _at(self, network: nn.Module, draw: dict[str, Tensor], inputs: Inputs, y: Tensor) -> Tensor:
        parameters = self.likelihood(call(network, draw, inputs))
        loss = self.likelihood.training_loss(parameters, y).mean()
        regularization = getattr(network, "regularization", None)
        return loss if regularization is None else loss + regularization()
