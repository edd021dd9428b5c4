"""The inputs of an inner layer of a network (its features), as the outputs of a network that ends before that layer."""

import torch
from torch import Tensor, nn


class _Reached(Exception):
    """Raised when a forward pass reaches the layer, to end it there."""

    def __init__(self, inputs: Tensor):
        super().__init__()
        self.inputs = inputs


def _stop(layer: nn.Module, inputs: tuple) -> None:
    if not inputs or not isinstance(inputs[0], Tensor):
        raise ValueError(f"the layer {type(layer).__name__} has no tensor as its first input: choose another layer")
    raise _Reached(inputs[0])


def check_layer(module: nn.Module, layer: str) -> nn.Module:
    """The submodule of this name. Raises ValueError, with the names that there are, if there is none."""
    submodule = dict(module.named_modules()).get(layer)
    if submodule is None or layer == "":
        named = ", ".join(f"{name!r} {type(m).__name__}" for name, m in module.named_modules() if name)
        raise ValueError(f"the module has no layer {layer!r}; it has {named}")
    return submodule


class LayerInputs(nn.Module):
    """A network that returns the inputs of one of its layers, (batch, features) float32; nothing after it is computed.

    network: the network, in which a hook is registered: pass a copy. layer: the layer's name in `named_modules()`.
    """

    def __init__(self, network: nn.Module, layer: str):
        super().__init__()
        check_layer(network, layer).register_forward_pre_hook(_stop)
        self.network, self.layer = network, layer

    def forward(self, *args, **kwargs) -> Tensor:
        try:
            self.network(*args, **kwargs)
        except _Reached as reached:
            return reached.inputs.flatten(1).to(torch.float32)
        raise ValueError(f"the network did not call its layer {self.layer!r}: choose one that every row passes")
