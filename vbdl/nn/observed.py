"""Network and likelihood as one module: what is learned about p(y | x) is stacked and traced with the network."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_CONVOLUTIONS = {F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d}
_NORMALISATIONS = {F.batch_norm, F.instance_norm, F.group_norm, F.layer_norm}


class MappedAutocast(TorchFunctionMode):
    """What autocast does to convolutions and normalisation, for those that `vmap` takes past it.

    The batching rules call operations that autocast has no rule for: a convolution would stay in float32, and the
    scale of a normalisation, in float32, would make all that follows float32 again.
    """

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self._dtype = dtype

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _CONVOLUTIONS:
            low = lambda a: a.to(self._dtype) if isinstance(a, Tensor) and a.is_floating_point() else a
            return func(*map(low, args), **{k: low(a) for k, a in kwargs.items()})
        if func in _NORMALISATIONS and args and args[0].dtype == self._dtype:
            return func(args[0].float(), *args[1:], **kwargs).to(self._dtype)  # float32 inside, as unmapped
        return func(*args, **kwargs)


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
            with torch.autocast(device, dtype=self._autocast, cache_enabled=False), MappedAutocast(self._autocast):
                outputs = self.network(*args, **kwargs)
        if not isinstance(outputs, Tensor):
            raise TypeError(
                f"the module returned {type(outputs).__name__}, vbdl needs one Tensor (batch, ...): "
                f"wrap it in a module that picks the output to predict from"
            )
        if outputs.dtype in (torch.bfloat16, torch.float16):
            outputs = outputs.float()  # statistics are float32 or better
        return self.likelihood(outputs)
