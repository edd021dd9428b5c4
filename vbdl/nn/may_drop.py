"""Whether a network might call dropout or other functions that vbdl replaces, judged without running it."""

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.modules.module as torchs
from torch import nn

from vbdl.calling.traversing import modules_of

DROPOUT_LAYERS = (nn.modules.dropout._DropoutNd,)
# layers of torch whose forward calls no function that `vbdl.nn.interception` replaces, and draws nothing
_PLAIN_LAYERS = frozenset(
    getattr(nn, name)
    for name in """Sequential ModuleList ModuleDict Identity Flatten Unflatten Linear Bilinear Conv1d Conv2d Conv3d
    ConvTranspose1d ConvTranspose2d ConvTranspose3d LayerNorm RMSNorm GroupNorm MaxPool1d MaxPool2d MaxPool3d AvgPool1d
    AvgPool2d AvgPool3d AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d AdaptiveMaxPool1d AdaptiveMaxPool2d
    AdaptiveMaxPool3d ReLU ReLU6 LeakyReLU PReLU ELU SELU CELU GELU SiLU Mish Tanh Sigmoid LogSigmoid Softplus Softsign
    Softmax LogSoftmax Hardtanh Hardswish Hardsigmoid Tanhshrink""".split()
)


def is_plain(module: nn.Module) -> bool:
    """Whether all layers are torch's own without dropout, normalization over the batch, attention, recurrence or hooks.

    Only then no function that a forward calls needs the masks of a draw.
    """
    return all(type(m) in _PLAIN_LAYERS and has_only_its_forward(m) for m in module.modules())


# layers of torch that read their parameters and never write to them; embeddings with `max_norm` do
READING_LAYERS = (
    _PLAIN_LAYERS
    | {nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout}
    | {nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d}
)


def runs_code_of_others(module: nn.Module) -> bool:
    """Whether a forward may run code that is not torch's: of a class of the user's, or of a hook."""
    return any(not (is_part_of_torch(m) and has_only_its_forward(m)) for _, m in modules_of(module))


def has_only_its_forward(module: nn.Module) -> bool:
    """Whether a call of a module runs no hook, and no function in place of a method of its class."""
    return not (_added(vars(torchs), "_global") or _added(vars(module), "") or _replaced(module))


def _added(holder: Mapping[str, Any], prefix: str) -> list[Callable]:
    """The hooks that run around the forward of one module, or around those of all."""
    return [hook for kind in ("_forward_pre_hooks", "_forward_hooks") for hook in holder[prefix + kind].values()]


def _replaced(module: nn.Module) -> list[Callable]:
    """The functions that a module has in place of methods of its class, such as `forward` or `_conv_forward`."""
    values = vars(module).items()
    return [own for name, own in values if callable(own) and inspect.isroutine(getattr(type(module), name, None))]


def is_part_of_torch(module: nn.Module) -> bool:
    """Whether torch defines the module's class and all its base classes."""
    return _is_of_torch(type(module))


@functools.lru_cache(maxsize=1024)
def _is_of_torch(kind: type) -> bool:
    return all(c.__module__.partition(".")[0] in ("torch", "builtins", "typing") for c in kind.__mro__)


def may_drop(module: nn.Module) -> bool:
    """Whether a forward might call dropout, judged by its layers and source code, without running it."""
    functions = _added(vars(torchs), "_global")
    homes = []
    for _, m in modules_of(module):
        if isinstance(m, DROPOUT_LAYERS) or getattr(m, "dropout", None):
            return True
        functions += [*_added(vars(m), ""), *_replaced(m)]
        homes += [] if is_part_of_torch(m) else [type(m).__module__]
    homes += [getattr(getattr(function, "func", function), "__module__", "") for function in functions]
    for home in dict.fromkeys(homes):
        try:
            # the whole file, because a forward may call functions of its file
            if "drop" in inspect.getsource(sys.modules[home]).lower():
                return True
        except (OSError, TypeError, KeyError):
            return True  # without source, only running the module can tell
    return False
