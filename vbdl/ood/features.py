"""What a network makes of its inputs on the way to its outputs: what Mahalanobis and KNN measure distances in."""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from vbdl.calling.inputs import arguments, flatten
from vbdl.types import Inputs


def check_features(features: Tensor, width: int) -> Tensor:
    """Rows to score, as float64; ValueError where they are not (batch, features), as many features as were fitted."""
    if not isinstance(features, Tensor):
        raise TypeError(f"features must be a torch.Tensor, not {type(features).__name__}")
    if features.ndim != 2 or features.shape[1] != width:
        raise ValueError(f"features must be (batch, {width}), as in fit, not {tuple(features.shape)}")
    return features.to(torch.float64)


def features(module: nn.Module, layer: str, batches: Iterable[Inputs]) -> Tensor:
    """Input of the layer of that name, (rows, features) float32, over batches: of the last layer, the penultimate
    features.

    The module is run as it is, in evaluation mode and without gradients, and left in the mode it was in. Everything
    but the rows is flattened. batches: a list of them, [x] for one, or what yields them. ValueError for a layer that
    is not there, or was not called exactly once.
    """
    if isinstance(batches, Tensor | np.ndarray | Mapping):
        raise TypeError("features takes batches, one after the other: [x] for one")
    submodule = dict(module.named_modules()).get(layer)
    if submodule is None or layer == "":
        raise ValueError(f"there is no layer {layer!r}; named layers: {[n for n, _ in module.named_modules() if n]}")
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
                raise ValueError(f"layer {layer!r} was called {len(seen)} times in one forward, and once is needed")
            rows.append(seen[0].flatten(1).to(torch.float32))
    finally:
        handle.remove()
        for m, training in modes.items():
            m.training = training
    if not rows:
        raise ValueError("there are no batches to take features of")
    return torch.cat(rows)
