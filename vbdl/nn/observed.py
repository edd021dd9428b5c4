"""Network and likelihood as one module: what is learned about p(y | x) is stacked and traced with the network."""

import torch
from torch import Tensor, nn


class Observed(nn.Module):
    """Network and likelihood as one module: inputs -> parameters of p(y | x)."""

    def __init__(self, network: nn.Module, likelihood: nn.Module, autocast: torch.dtype | None = None):
        super().__init__()
        self.network, self.likelihood, self._autocast = network, likelihood, autocast

    def forward(self, *args, **kwargs) -> Tensor:
        if self._autocast is None:
            outputs = self.network(*args, **kwargs)
        else:
            device = next(iter([*args, *kwargs.values()])).device.type
            with torch.autocast(device, dtype=self._autocast, cache_enabled=False):
                outputs = self.network(*args, **kwargs)
        if not isinstance(outputs, Tensor):
            raise TypeError(
                f"the module returned {type(outputs).__name__}, vbdl needs one Tensor (batch, ...): "
                f"wrap it in a module that picks the output to predict from"
            )
        if outputs.dtype in (torch.bfloat16, torch.float16):
            outputs = outputs.float()  # statistics are float32 or better
        return self.likelihood(outputs)
