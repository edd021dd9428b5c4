"""Frozen layers: layers whose parameters are all frozen; training leaves their buffers unchanged too."""

from collections.abc import Iterator

from torch import nn

from vbdl.calling.traversing import buffers_of, is_sparse, modules_of, parameters_of
from vbdl.nn.normalization import NORMALIZATION_LAYERS


def frozen_modules(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the name and module of every module whose parameters are all frozen, and of the modules inside it."""
    kinds: dict[int, set[bool]] = {}  # by id of a module, whether parameters in it are trained

    def of(m: nn.Module) -> set[bool]:
        if id(m) not in kinds:
            kinds[id(m)] = own = {p.requires_grad for p in m._parameters.values() if p is not None}
            for child in m._modules.values():
                if child is not None:
                    own |= of(child)
        return kinds[id(m)]

    inside: set[int] = set()
    for name, m in modules_of(module):
        if id(m) not in inside and of(m) == {False}:
            inside.update(id(part) for _, part in modules_of(m))
        if id(m) in inside:
            yield name, m


def frozen_names(module: nn.Module) -> set[str]:
    """The names of frozen parameters, of the buffers of layers whose parameters are all frozen, and of sparse buffers.

    Sparse ones, such as the adjacency of a graph, have no stacked or averaged form.
    """
    names = {name for name, p in parameters_of(module).items() if not p.requires_grad}
    sparse = {name for name, b in buffers_of(module).items() if is_sparse(b)}
    if not names:
        return sparse
    names |= sparse
    for path, m in frozen_modules(module):
        names |= {f"{path}.{leaf}" if path else leaf for leaf, b in m._buffers.items() if b is not None}
    return names


def hold_frozen(module: nn.Module) -> None:
    """Put frozen layers that have buffers in evaluation mode, so that training does not change their statistics.

    Dropout inside a frozen backbone stays on in training.
    """
    for _, m in frozen_modules(module):
        if isinstance(m, NORMALIZATION_LAYERS) or any(b is not None for b in m._buffers.values()):
            m.training = False
