"""A predictor wrapped as an `nn.Module`, to use in place of the network."""

from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from vbdl.engine.predictor import Predictor


class PredictiveModule(nn.Module):
    """A module whose output is the predictive probabilities, or the predictive mean, as one Tensor (batch, ...)."""

    def __init__(self, predictor: "Predictor"):
        super().__init__()
        self.predictor = predictor

    def forward(self, *args, **kwargs) -> Tensor:
        if args and kwargs:
            raise TypeError("a predictor takes its inputs all by position or all by name, got both: use one of the two")
        x = kwargs if kwargs else (args[0] if len(args) == 1 else args)
        return self.predictor(x).mean
