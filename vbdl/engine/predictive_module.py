"""A predictor in the place of the network it came from, where an `nn.Module` is expected."""

from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from vbdl.engine.predictor import Predictor


class PredictiveModule(nn.Module):
    """model(x) returns the predictive probabilities, or the predictive mean, as one Tensor."""

    def __init__(self, predictor: "Predictor"):
        super().__init__()
        self.predictor = predictor

    def forward(self, *args, **kwargs) -> Tensor:
        if args and kwargs:
            raise TypeError("a predictor takes its inputs all by position or all by name")
        x = kwargs if kwargs else (args[0] if len(args) == 1 else args)
        return self.predictor(x).mean
