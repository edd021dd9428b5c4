"""Copies of a module that read its tensors, until somebody asks the module for them.

A predictor must not change when its posterior is trained further, and a copy of every weight takes as much memory and,
for large networks, as much time as the first prediction. A tensor that nobody but its module holds can only be changed
by whoever gets it from there: so the copy reads the same memory, and the module makes a copy of its own when its
tensor is asked for (`parameters()`, `state_dict()`, `module.weight`, training, saving).
"""

import contextlib
import copy
import sys
import threading
import weakref
from collections.abc import Collection, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vbdl.calling.copies import holding
from vbdl.calling.traversing import Modules, modules_of
from vbdl.types import State

M = TypeVar("M", bound=nn.Module)

LEAST = 2**16  # bytes; smaller tensors are copied at once
HELD, ALL = "held", "all"
lock = threading.RLock()
_this_thread = threading.local()


@contextlib.contextmanager
def only_reading(stacks: bool = False) -> Iterator[None]:
    """A context in which this thread reads lent tensors and keeps and changes none: their modules need no copies.

    stacks: whether to list the parameters that are held apart (`vbdl.calling.apart`) too, which stacks them.
    """
    before = reads()
    _this_thread.reads = ALL if stacks else HELD
    try:
        yield
    finally:
        _this_thread.reads = before


def reads() -> str | None:
    """What this thread lists inside `only_reading`, HELD or ALL; None outside."""
    return getattr(_this_thread, "reads", None)


def lent_copy(module: M) -> M:
    """A deep copy of a module that reads those of the module's large parameters that nobody else holds.

    The copy must not write to its parameters. Buffers, which a forward pass may write to, are copied.
    """
    modules = modules_of(module)
    with lock, only_reading():
        return holding(module, lend(modules, lendable(modules, LEAST)))


def lendable(modules: Modules, least: int) -> set[str]:
    """The names of the parameters of at least so many bytes that a copy of a module could read.

    modules: its modules by name.
    """
    found = set()
    for prefix, owner in modules:
        if not (parameters := vars(owner)["_parameters"]):
            continue
        if isinstance(parameters, _Lent):
            names = set(parameters.lent())
        elif type(parameters) is dict:
            large = [name for name, p in parameters.items() if p is not None and _is_large(p, least)]
            names = {name for name in large if _held_once(parameters, name)}
        else:
            continue
        found |= {f"{prefix}.{name}" if prefix else name for name in names}
    return found


def lend(modules: Modules, names: Collection[str]) -> State:
    """Lend parameters that are `lendable` to a copy of a module: tensors to read, by name; modules: its modules."""
    lent: State = {}
    for prefix, owner in modules if names else ():
        if not (parameters := vars(owner)["_parameters"]):
            continue
        start = f"{prefix}." if prefix else ""
        own = {name for name in dict.keys(parameters) if start + name in names}
        if own and not isinstance(parameters, _Lent):
            vars(owner)["_parameters"] = parameters = _Lent(parameters, owner, own)
        lent |= {start + name: dict.__getitem__(parameters, name).detach() for name in own}
    return lent


def _is_large(p: Tensor, least: int) -> bool:
    """Whether it is worth while to lend a parameter, and possible."""
    if type(p) is not nn.Parameter or p.layout != torch.strided or p.device.type == "meta" or p.is_inference():
        return False
    return p.numel() * p.itemsize >= least


def _held_once(tensors: dict[str, Any], name: str) -> bool:
    """Whether nobody holds a tensor, or another tensor, array or storage with its memory, but these `tensors`."""
    return bool(_ONE_HOLDER) and _holders(tensors, name) == _ONE_HOLDER


def _holders(tensors: dict[str, Any], name: str) -> tuple[int, ...]:
    """The numbers of references to a tensor and to its memory, among them those that counting takes."""
    t = tensors[name]
    storage = t.untyped_storage()
    alias = not storage.resizable() or (storage.device.type == "cpu" and storage.is_shared())  # of an array or a file
    of_tensor: int = t._use_count()  # type: ignore[attr-defined]
    return sys.getrefcount(t), weakref.getweakrefcount(t), of_tensor, sys.getrefcount(storage), _uses(storage), alias


def _uses(storage: torch.UntypedStorage) -> int:
    """The number of tensors with this memory, and one for the Python object."""
    return torch._C._storage_Use_Count(storage._cdata)  # type: ignore[attr-defined]


def held_by_one(tensors: Sequence[Tensor], index: int) -> bool:
    """Whether no other tensor has the memory of one of these."""
    return bool(_ONE_HOLDER) and _uses(tensors[index].untyped_storage()) == _ONE_HOLDER[_USES]


_USES = 4  # the place of `_uses` among the numbers
try:
    _ONE_HOLDER: tuple[int, ...] = _holders({"t": torch.zeros(1)}, "t")
except AttributeError:  # the counts are torch's own affair: a version without one of them lends nothing
    _ONE_HOLDER = ()


class PassedOn(dict):
    """The parameters of a module, some of which are made when one is asked for.

    It is then replaced by a plain dict, to which it passes on whatever is asked of it.
    """

    def __init__(self, tensors: dict[str, Any], owner: nn.Module):
        super().__init__(tensors)
        self._owner = weakref.ref(owner)  # a cycle would keep the module until the garbage is collected
        self._own: dict[str, Any] | None = None

    def _names_now(self) -> dict[str, Any]:
        """A dict with the names that there are now, whose values must not be read."""
        return dict(dict.items(self)) if self._own is None else self._own

    def _now(self) -> dict[str, Any]:
        """The dict that is used now: for a thread that only reads, what is there; for others, the module's own."""
        if self._own is None and reads():
            return self._read()
        with lock:
            if self._own is None:
                self._own = self._made()
                if (owner := self._owner()) is not None and vars(owner)["_parameters"] is self:
                    vars(owner)["_parameters"] = self._own
            return self._own

    def _made(self) -> dict[str, Any]:
        """The module's own parameters."""
        raise NotImplementedError

    def _read(self) -> dict[str, Any]:
        """The parameters for a thread that only reads."""
        return dict(dict.items(self))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return dict, (dict(self._now()),)


class _Lent(PassedOn):
    """The parameters of a module, some of which a copy reads too: the module gets its own when one is asked for."""

    def __init__(self, tensors: dict[str, Any], owner: nn.Module, names: set[str]):
        super().__init__(tensors, owner)
        self._names = names

    def lent(self) -> dict[str, Tensor]:
        """The tensors that the copy reads, by name."""
        return {} if self._own is not None else {name: dict.__getitem__(self, name) for name in self._names}

    def _made(self) -> dict[str, Any]:
        return {name: self._unlent(name, t) for name, t in dict.items(self)}

    def _unlent(self, name: str, t: Any) -> Any:
        """The module's own parameter of this name."""
        if name in self._names and _uses(t.untyped_storage()) != _ONE_HOLDER[_USES]:  # the copy is not gone
            with torch.inference_mode(False):
                t.data = t.detach().clone()  # it stays the same parameter, with its gradient and its hooks
        return t

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return copy.deepcopy(self._now(), memo)


def _passed_on(name: str, to: Any) -> Any:
    def method(self: PassedOn, *args: Any, **kwargs: Any) -> Any:
        return getattr(to(self), name)(*args, **kwargs)

    return method


for _name in """__getitem__ __or__ __ror__ __eq__ __ne__ __repr__ get items values copy __setitem__ __delitem__ __ior__
    clear pop popitem setdefault update""".split():
    setattr(PassedOn, _name, _passed_on(_name, PassedOn._now))
for _name in "__iter__ __reversed__ __len__ __contains__ keys".split():
    setattr(PassedOn, _name, _passed_on(_name, PassedOn._names_now))
