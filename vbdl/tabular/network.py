"""The default network of a table: a small multilayer perceptron whose output is in the target's own unit."""

import math
from typing import TypedDict

import torch
from torch import Tensor, nn

INITIAL_STD = 0.02  # initial std of the weights of a mean-field network


class NetworkArguments(TypedDict):
    """The arguments of `TabularNetwork`, which an artifact stores."""

    inputs: int
    outputs: int
    width: int
    depth: int
    dropout: float
    log_variance: bool
    target_mean: float
    target_std: float


class TabularNetwork(nn.Module):
    """A multilayer perceptron, (batch, inputs) -> (batch, outputs), with ReLU and dropout after each hidden layer.

    log_variance: whether a regression also returns the log-variance of each row, (batch, 2).
    target_mean, target_std: a regression's outputs are target_mean + target_std * (output of the last layer), so that
        the layers compute with numbers of size one and the outputs are in the target's unit. With a likelihood that
        learns its noise, training is the same as on standardized targets.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        width: int = 128,
        depth: int = 2,
        dropout: float = 0.1,
        log_variance: bool = False,
        target_mean: float = 0.0,
        target_std: float = 1.0,
    ):
        super().__init__()
        if min(inputs, outputs, width, depth) < 1:
            raise ValueError(f"inputs, outputs, width and depth are at least 1: {inputs}, {outputs}, {width}, {depth}")
        if not target_std > 0:
            raise ValueError(f"target_std is positive, got {target_std}")
        layers: list[nn.Module] = []
        for size in [inputs, *[width] * (depth - 1)]:
            layers += [nn.Linear(size, width), nn.ReLU()]
            if dropout > 0:
                layers.append(nn.Dropout(dropout))
        self.layers = nn.Sequential(*layers, nn.Linear(width, outputs * (2 if log_variance else 1)))
        self.outputs, self.log_variance = outputs, log_variance
        self.target_mean, self.target_std = target_mean, target_std

    def prior(self) -> dict[str, float]:
        """Return {layer: std of its prior}, with the scale of the layer's initialization at this width."""
        return {f"layers.{i}": m.in_features**-0.5 for i, m in enumerate(self.layers) if isinstance(m, nn.Linear)}

    def forward(self, x: Tensor) -> Tensor:
        out = self.layers(x)
        if self.target_mean == 0.0 and self.target_std == 1.0:
            return out
        if not self.log_variance:
            return self.target_mean + self.target_std * out
        mean, log_variance = out.chunk(2, dim=-1)
        mean = self.target_mean + self.target_std * mean
        return torch.cat((mean, log_variance + 2 * math.log(self.target_std)), dim=-1)
