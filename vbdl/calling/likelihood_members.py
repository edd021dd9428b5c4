"""Likelihoods whose parameters have a leading members axis, so that each member of an ensemble learns its own."""

from collections.abc import Iterator

from torch import nn

from vbdl.calling.copies import holding
from vbdl.types import Likelihood


def replicate(likelihood: Likelihood, n_members: int) -> None:
    """Give every parameter of a likelihood a leading members axis, in place, so that each member learns its own.

    Sets `likelihood.n_members`; a likelihood that has this number already stays as it is. Raises ValueError if it has
    another.
    """
    current = likelihood.n_members
    if current == n_members or not any(True for _ in likelihood.parameters()):
        return
    if current is not None:
        raise ValueError(f"the likelihood belongs to {current} members already, not to {n_members}: use a new one")
    for owner in likelihood.modules():
        for name, p in list(owner.named_parameters(recurse=False)):
            copies = p.detach().unsqueeze(0).repeat(n_members, *[1] * p.ndim)
            setattr(owner, name, nn.Parameter(copies, requires_grad=p.requires_grad))
    likelihood.n_members = n_members


def of_members(likelihood: Likelihood, members: range) -> Likelihood:
    """A likelihood of these members alone, whose parameters are parts of this one's: training it trains them.

    A likelihood whose parameters all members share is returned as it is.
    """
    if likelihood.n_members is None:
        return likelihood
    of_each = {id(p) for layer in _with_members(likelihood) for p in layer.parameters()}
    named = likelihood.named_parameters()
    parts = {n: p.detach()[members.start : members.stop] if id(p) in of_each else p for n, p in named}
    part: Likelihood = holding(likelihood, parts | dict(likelihood.named_buffers()))
    for layer in _with_members(part):
        layer.n_members = len(members)
    return part


def _with_members(likelihood: Likelihood) -> Iterator[Likelihood]:
    """Yield the layers that training set n_members on: those that it was given, inside calibrations made later."""
    layer: Likelihood | None = likelihood
    while layer is not None:
        if "n_members" in vars(layer):
            yield layer
        layer = layer.wrapped
