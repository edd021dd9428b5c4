"""The inputs of an inner layer of a network (its features), in which Mahalanobis and KNN measure distances."""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from vbdl.calling.inputs import arguments, flatten
from vbdl.types import Inputs


def check_features(features: Tensor, width: int) -> Tensor:
    """Return features to score as float64; ValueError unless they are (batch, width), as many features as fitted."""
    if not isinstance(features, Tensor):
        raise TypeError(f"features must be a torch.Tensor, not {type(features).__name__}")
    if features.ndim != 2 or features.shape[1] != width:
        raise ValueError(f"features must be (batch, {width}), as in fit, not {tuple(features.shape)}")
    return features.to(torch.float64)


def features(module: nn.Module, layer: str, batches: Iterable[Inputs]) -> Tensor:
    """The inputs of a layer over batches, (rows, features) float32; all axes but the rows are flattened.

    layer: its name in `module.named_modules()`; the last layer gives the penultimate features.
    batches: an iterable of the module's inputs, [x] for one batch.

    The module runs in evaluation mode without gradients; its mode is restored afterwards. Raises ValueError if there is
    no such layer or a forward pass did not call it exactly once.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> vbdl.ood.features(net, "2", [torch.randn(10, 4)]).shape  # the inputs of the last layer
    torch.Size([10, 8])
    """
    if isinstance(batches, Tensor | np.ndarray | Mapping):
        raise TypeError("batches must be an iterable of batches; write [x] for one batch")
    submodule = dict(module.named_modules()).get(layer)
    if submodule is None or layer == "":
        raise ValueError(f"the module has no layer {layer!r}; it has {[n for n, _ in module.named_modules() if n]}")
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
