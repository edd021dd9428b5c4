"""Layers that training leaves as they are: those whose parameters are all frozen, with what they keep in buffers."""

from collections.abc import Iterator

from torch import nn

_NORMALIZATION = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


def frozen_modules(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules, by name, that have parameters and none that is trained, with all that is inside them."""
    inside: set[int] = set()
    for name, m in module.named_modules():
        parameters = list(m.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            inside.update(id(part) for part in m.modules())
        if id(m) in inside:
            yield name, m


def hold_frozen(module: nn.Module) -> None:
    """Put frozen layers that keep statistics of their batches in evaluation, so that training does not move these.

    Dropout inside a frozen backbone stays on, as the rest of training has it.
    """
    for _, m in frozen_modules(module):
        if isinstance(m, _NORMALIZATION) or any(b is not None for b in m._buffers.values()):
            m.training = False
