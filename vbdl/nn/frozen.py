"""Frozen layers: those whose parameters are all frozen, which training leaves as they are, buffers included."""

from collections.abc import Iterator

from torch import nn

_NORMALIZATION = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


def frozen_modules(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield, with their names, the modules whose parameters are all frozen, and every module inside them."""
    inside: set[int] = set()
    for name, m in module.named_modules():
        parameters = list(m.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            inside.update(id(part) for part in m.modules())
        if id(m) in inside:
            yield name, m


def hold_frozen(module: nn.Module) -> None:
    """Put frozen layers that have buffers in evaluation mode, so that training does not move their statistics.

    Dropout inside a frozen backbone stays on, as the rest of training has it.
    """
    for _, m in frozen_modules(module):
        if isinstance(m, _NORMALIZATION) or any(b is not None for b in m._buffers.values()):
            m.training = False
