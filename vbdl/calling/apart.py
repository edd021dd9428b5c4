"""The parameters of several networks of one architecture, which are stacked when somebody asks for the stack.

An ensemble that predicts member after member needs no stack, and making it takes as much memory as the networks and,
for large ones, more time than the first prediction. So the members' large parameters stay where they are: an ensemble
reads those of the networks it was given (`vbdl.calling.lending`), and a predictor those of its ensemble.
"""

import contextlib
import copy
import threading
import weakref
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vbdl.calling.freed import give_back
from vbdl.calling.lending import HELD, LEAST, PassedOn, held_by_one, lend, lendable, lock, reads
from vbdl.calling.traversing import modules_of, parameters_of

_ENOUGH = 2**20  # bytes of all networks together; finding out whether fewer can be lent takes longer than to copy them
_FREED = 2**24  # bytes; giving memory back takes about as long as copying a few MiB


class Source:
    """The parameters of several networks by name, one tensor each, which nobody writes to.

    Several modules may read them. They are stacked once for all, which frees those that no network holds any more.
    """

    def __init__(self, apart: dict[str, list[Tensor]]):
        self._apart, self._stacked = apart, {}
        self._freed = 0  # bytes that stacking may have freed since memory was given back
        self._lock = threading.RLock()
        # by id, because a dict has no hash
        self._readers: weakref.WeakValueDictionary[int, Apart] = weakref.WeakValueDictionary()

    def add(self, reader: "Apart") -> None:
        """Count a module that reads these parameters."""
        self._readers[id(reader)] = reader

    def of_one(self, name: str, index: int) -> Tensor:
        """Return the parameter of one network, to read."""
        with self._lock:
            return self._apart[name][index] if name in self._apart else self._stacked[name][index]

    def stack(self, name: str) -> Tensor:
        """Stack the parameter of all networks, (networks, ...), to read."""
        with self._lock, _as_usual():
            if name not in self._stacked:
                self._stacked[name] = stack = _stack(self._apart.pop(name))
                self._freed += stack.nbytes
                if self._freed >= _FREED:
                    self._freed = 0
                    give_back()
            return self._stacked[name]

    def lay_out(self, names: Collection[str], layout: torch.memory_format, copying: bool) -> bool:
        """Lay out these parameters in the memory format, one after the other, and return whether they are.

        copying: whether to do so even if a network or another thread holds one, whose memory is not freed then.
        """
        with self._lock, _as_usual():
            if any(name not in self._apart for name in names):
                return False
            places = [(self._apart[name], index) for name in names for index in range(len(self._apart[name]))]
            places = [(t, i) for t, i in places if not t[i].is_contiguous(memory_format=layout)]
            if not copying and not all(held_by_one(tensors, index) for tensors, index in places):
                return False
            for tensors, index in places:
                tensors[index] = tensors[index].contiguous(memory_format=layout)
            return True

    def own(self, reader: "Apart", name: str) -> Tensor:
        """Return a stack that the reader may write to, which is a copy if others read the parameter too."""
        with self._lock, _as_usual():
            if any(other is not reader for other in list(self._readers.values())):
                return (
                    torch.stack(self._apart[name]).contiguous() if name in self._apart else self._stacked[name].clone()
                )
            return self.stack(name)

    def leave(self, reader: "Apart") -> None:
        """Count a module no more, which has stacks of its own now."""
        self._readers.pop(id(reader), None)


@contextlib.contextmanager
def _as_usual() -> Iterator[None]:
    """A context for tensors that outlive the caller's: of those made in its inference mode no gradient can be taken."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _stack(tensors: list[Tensor]) -> Tensor:
    """Stack tensors, (tensors, ...), removing each from the list when it is copied, which frees it."""
    stack = tensors[0].new_empty((len(tensors), *tensors[0].shape))
    for index in reversed(range(len(tensors))):
        stack[index].copy_(tensors.pop())
    return stack


class Apart(PassedOn):
    """The stacked parameters of a module, some of which are not stacked until one is asked for.

    It is then replaced by a plain dict, to which it passes on whatever is asked of it. A thread that only reads
    (`lending.only_reading`) gets stacks that all readers share, of what it asks for by name; listing stacks nothing,
    and leaves out what is held apart, unless the thread says so.

    source: those of the parameters that are not stacked. trained: the names of those that require a gradient.
    """

    def __init__(self, tensors: dict[str, Any], owner: Any, source: Source, trained: Collection[str]):
        super().__init__(tensors, owner)
        self.source, self.trained = source, trained
        source.add(self)

    def is_apart(self, name: str) -> bool:
        """Whether the parameter of this name is not stacked."""
        return self._own is None and dict.__getitem__(self, name) is None

    def of_one(self, name: str, index: int) -> Tensor:
        """Return the parameter of one network, to read."""
        if self._own is not None:
            return self._own[name][index]
        stacked = dict.__getitem__(self, name)
        return self.source.of_one(name, index) if stacked is None else stacked[index]

    def _made(self) -> dict[str, Any]:
        with _as_usual():
            own = {
                name: nn.Parameter(self.source.own(self, name), name in self.trained) if t is None else t
                for name, t in dict.items(self)
            }
        self.source.leave(self)
        return own

    def _read(self) -> dict[str, Any]:
        if reads() == HELD:
            return _Reading(self)
        return {name: self.source.stack(name) if t is None else t for name, t in dict.items(self)}

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        with lock:
            if self._own is not None:
                return copy.deepcopy(self._own, memo)
            tensors = {name: copy.deepcopy(t, memo) for name, t in dict.items(self)}
            return Apart(tensors, copy.deepcopy(self._owner(), memo), self.source, self.trained)


class _Reading(dict):
    """What a thread sees of `Apart` that only reads, and lists what is held."""

    def __init__(self, held: Apart):
        super().__init__({name: t for name, t in dict.items(held) if t is not None})
        self._source, self._names = held.source, dict.keys(held)

    def __missing__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._source.stack(name)


def hold_apart(networks: Sequence[nn.Module], without: Collection[str]) -> dict[str, list[Tensor]]:
    """The large parameters of networks of one architecture by name, as the networks hold them, to read.

    Empty unless each network can lend all of them. without: names to leave out.
    """
    with lock:
        modules = [modules_of(network) for network in networks]
        named = parameters_of(networks[0])
        sizes = {n: p.nbytes for n, p in named.items() if n not in without and p.is_floating_point()}
        named.clear()
        if sum(sizes.values()) * len(networks) < _ENOUGH:
            return {}
        smallest = min(sizes, key=lambda name: sizes[name], default="")  # one stack shows the dtype and the device
        large = {n for n, size in sizes.items() if size * len(networks) >= LEAST and n != smallest}
        if not large:
            return {}
        if any(not large <= lendable(of_one, LEAST // len(networks)) for of_one in modules):
            return {}
        tensors = (p for of_one in modules for _, m in of_one for p in m._parameters.values() if p is not None)
        if len({(p.dtype, p.device) for p in tensors}) > 1:
            return {}
        lent = [lend(of_one, large) for of_one in modules]
        return {name: [one[name] for one in lent] for name in sizes if name in large}


def read_only(module: nn.Module) -> None:
    """Let the parameters that a copy of a module holds apart require no gradient."""
    for _, m in modules_of(module):
        if isinstance(held := vars(m)["_parameters"], Apart):
            held.trained = ()
