"""The inputs of an inner layer of a network (its features), in which Mahalanobis and KNN measure distances."""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from vbdl.calling.copies import blueprint
from vbdl.calling.inputs import arguments, flatten
from vbdl.calling.layer_inputs import check_layer
from vbdl.curvature.choosing import last_layer
from vbdl.types import Inputs


def check_features(features: Tensor, width: int) -> Tensor:
    """Return features to score as float64; ValueError unless they are (batch, width), as many features as fitted."""
    if not isinstance(features, Tensor):
        raise TypeError(f"features must be a torch.Tensor, not {type(features).__name__}")
    if features.ndim != 2 or features.shape[1] != width:
        raise ValueError(f"features must be (batch, {width}), as in fit, not {tuple(features.shape)}")
    return features.to(torch.float64)


def last_layer_of(module: nn.Module) -> str:
    """The name of the last linear layer or convolution, whose inputs are the penultimate features."""
    return last_layer(blueprint(module).requires_grad_())


def features(module: nn.Module, layer: str | None, batches: Iterable[Inputs]) -> Tensor:
    """The inputs of a layer over batches, (rows, features) float32; all axes but the rows are flattened.

    layer: its name in `module.named_modules()`, which `print(module)` shows in brackets; None: the last linear layer or
        convolution, which gives the penultimate features.
    batches: an iterable of the module's inputs, [x] for one batch.

    The module runs in evaluation mode without gradients; its mode is restored afterwards. Raises ValueError if there is
    no such layer or a forward pass did not call it exactly once.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> vbdl.ood.features(net, None, [torch.randn(10, 4)]).shape  # the inputs of the last layer, here "2"
    torch.Size([10, 8])
    """
    if isinstance(batches, Tensor | np.ndarray | Mapping):
        raise TypeError("batches must be an iterable of batches; write [x] for one batch")
    layer = last_layer_of(module) if layer is None else layer
    submodule = check_layer(module, layer)
    seen: list[Tensor] = []
    handle = submodule.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    modes = {m: m.training for m in module.modules()}
    rows: list[Tensor] = []
    try:
        module.eval()
        for x in batches:
            seen.clear()
            args, kwargs = arguments(flatten(x).nested)
            with torch.no_grad():
                module(*args, **kwargs)
            if len(seen) != 1:
                raise ValueError(
                    f"layer {layer!r} was called {len(seen)} times in one forward pass; choose one that is called once"
                )
            rows.append(seen[0].flatten(1).to(torch.float32))
    finally:
        handle.remove()
        for m, training in modes.items():
            m.training = training
    if not rows:
        raise ValueError("batches is empty; give at least one batch")
    return torch.cat(rows)
