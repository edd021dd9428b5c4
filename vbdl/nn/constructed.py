"""Initializations that only a network's constructor knows, read from the numbers of an untrained network.

torchvision's networks set a class token, a layer scale or the spread of their convolutions in `__init__`, which cannot
be called again without its arguments. The numbers of an untrained network are one draw of that initialization: a
constant stays, and independent numbers of one distribution are reordered at random, which gives another draw with the
same distribution. Numbers with an order (a table of sines, an orthogonal matrix) are recognized and not reordered.
"""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_FEWEST = 64  # numbers; fewer say too little about the standard deviation of their distribution
_FEWEST_ORDERED = 8  # numbers; fewer may be in one order by chance
_RARE = 1e-6  # a probability at which independent numbers are taken for ordered ones
_STEPS = 5.0  # standard errors of a correlation between neighbors
_ALIKE = 1.25  # the largest ratio of two standard deviations of one initialization


def is_untrained(network: nn.Module) -> bool:
    """Whether the network's normalization layers are as constructors leave them: constant, nothing tracked.

    False if it has no trainable normalization layer, because nothing else shows it.
    """
    norms = [m for m in network.modules() if isinstance(m, _NORMS)]
    trainable = [p for m in norms for p in m.parameters(recurse=False) if p.requires_grad]
    tracked = [m.running_mean for m in norms if isinstance(m, _NormBase) and m.running_mean is not None]
    return bool(trainable) and all(map(is_constant, trainable)) and not any(bool(t.any()) for t in tracked)


def again(constructed: Tensor) -> Tensor | None:
    """Another draw of the initialization that these numbers are a draw of, or None if they do not show it."""
    if is_constant(constructed):
        return constructed.clone()
    if constructed.numel() < _FEWEST_ORDERED or constructed.is_complex() or not _is_exchangeable(constructed):
        return None
    return constructed.flatten()[torch.randperm(constructed.numel()).to(constructed.device)].view_as(constructed)


def differs(constructed: Tensor, reset: Tensor) -> bool:
    """Whether a constructor's numbers are clearly no draw of the initialization that `reset` is a draw of."""
    if is_constant(constructed) or is_constant(reset):
        return not torch.equal(constructed, reset)
    if constructed.numel() < _FEWEST or constructed.is_complex():
        return False
    ratio = float(constructed.float().std() / reset.float().std())
    return not 1 / _ALIKE < ratio < _ALIKE


def is_constant(t: Tensor) -> bool:
    """Whether all numbers of a tensor are equal."""
    return bool((t == t.flatten()[0]).all()) if t.numel() else True


def _is_exchangeable(t: Tensor) -> bool:
    """Whether numbers may be independent draws of one distribution.

    Along each axis, means and mean squares vary as much as those of independent numbers do, neither more nor less, and
    neighbors are uncorrelated; they are not sorted. The test is wrong about independent numbers with a probability of
    about 1e-6, about eight of them 5e-5.
    """
    t = t.detach().double()
    steps = t.flatten().diff()
    if bool((steps >= 0).all()) or bool((steps <= 0).all()):
        return False
    for values in (t, t.square()):
        values = values - values.mean()
        variance = values.square().mean()
        if variance == 0:  # numbers of one size with signs: their squares say nothing
            continue
        for axis, size in enumerate(t.shape):
            if size == 1:
                continue
            along = values.movedim(axis, 0).reshape(size, -1)
            if along.shape[1] > 1:
                spread = along.mean(1).square().sum() * along.shape[1] / variance  # chi-squared with size - 1 degrees
                half = torch.tensor((size - 1) / 2, dtype=torch.float64, device=t.device)
                if min(torch.special.gammainc(half, spread / 2), torch.special.gammaincc(half, spread / 2)) < _RARE:
                    return False
            neighbors = (along[1:] * along[:-1]).mean() / variance * (along[1:].numel() ** 0.5)
            if neighbors.abs() > _STEPS:
                return False
    return True
