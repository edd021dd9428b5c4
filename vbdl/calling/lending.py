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
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vbdl.calling.stacking import holding

M = TypeVar("M", bound=nn.Module)

_LEAST = 2**20  # bytes; smaller tensors are copied at once
_lock = threading.RLock()
_this_thread = threading.local()


@contextlib.contextmanager
def only_reading() -> Iterator[None]:
    """A context in which this thread reads lent tensors and keeps and changes none: their modules need no copies."""
    before = getattr(_this_thread, "reads", False)
    _this_thread.reads = True
    try:
        yield
    finally:
        _this_thread.reads = before


def lent_copy(module: M) -> M:
    """A deep copy of a module that reads those of the module's large parameters that nobody else holds.

    The copy must not write to its parameters. Buffers, which a forward pass may write to, are copied.
    """
    with _lock, only_reading():
        lent: set[int] = set()
        for owner in module.modules():
            parameters = vars(owner)["_parameters"]
            if not isinstance(parameters, _Lent):
                large = [name for name, p in parameters.items() if p is not None and _is_large(p)]
                names = {name for name in large if _held_once(parameters, name)}
                if not names:
                    continue
                vars(owner)["_parameters"] = parameters = _Lent(parameters, owner, names)
            lent |= {id(p) for p in parameters.lent()}
        return holding(module, {name: p.detach() for name, p in module.named_parameters() if id(p) in lent})


def _is_large(p: Tensor) -> bool:
    """Whether it is worth while to lend a parameter, and possible."""
    if type(p) is not nn.Parameter or p.layout != torch.strided or p.device.type == "meta":
        return False
    return p.numel() * p.itemsize >= _LEAST


def _held_once(tensors: dict[str, Any], name: str) -> bool:
    """Whether nobody holds a tensor, or another tensor, array or storage with its memory, but these `tensors`."""
    return bool(_ONE_HOLDER) and _holders(tensors, name) == _ONE_HOLDER


def _holders(tensors: dict[str, Any], name: str) -> tuple[int, ...]:
    """The numbers of references to a tensor and to its memory, among them those that counting takes."""
    t = tensors[name]
    storage = t.untyped_storage()
    alias = not storage.resizable() or (storage.device.type == "cpu" and storage.is_shared())  # of an array or a file
    of_tensor: int = t._use_count()  # type: ignore[attr-defined]
    return sys.getrefcount(t), of_tensor, sys.getrefcount(storage), _uses(storage), alias


def _uses(storage: torch.UntypedStorage) -> int:
    """The number of tensors with this memory, and one for the Python object."""
    return torch._C._storage_Use_Count(storage._cdata)  # type: ignore[attr-defined]


try:
    _ONE_HOLDER: tuple[int, ...] = _holders({"t": torch.zeros(1)}, "t")
except AttributeError:  # the counts are torch's own affair: a version without one of them lends nothing
    _ONE_HOLDER = ()


class _Lent(dict):
    """The parameters of a module, some of which a copy reads too: the module gets its own when one is asked for.

    It is then replaced by a plain dict, to which it passes on whatever is asked of it.
    """

    def __init__(self, tensors: dict[str, Any], owner: nn.Module, names: set[str]):
        super().__init__(tensors)
        self._owner, self._names = owner, names
        self._own: dict[str, Any] | None = None

    def lent(self) -> list[Tensor]:
        """The tensors that the copy reads."""
        return [] if self._own is not None else [dict.__getitem__(self, name) for name in self._names]

    def _names_now(self) -> dict[str, Any]:
        """A dict with the names that there are now, whose values must not be read."""
        return dict(dict.items(self)) if self._own is None else self._own

    def _now(self) -> dict[str, Any]:
        """The dict that is used now: for a thread that only reads, the lent tensors; for others, the module's own."""
        if self._own is None and getattr(_this_thread, "reads", False):
            return dict(dict.items(self))
        with _lock:
            if self._own is None:
                self._own = {name: self._unlent(name, t) for name, t in dict.items(self)}
                if vars(self._owner)["_parameters"] is self:
                    vars(self._owner)["_parameters"] = self._own
            return self._own

    def _unlent(self, name: str, t: Any) -> Any:
        """The module's own parameter of this name."""
        if name not in self._names or _uses(t.untyped_storage()) == _ONE_HOLDER[3]:  # the copy is gone
            return t
        return nn.Parameter(t.detach().clone(), t.requires_grad)

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return copy.deepcopy(self._now(), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return dict, (self._now(),)


def _passed_on(name: str, to: Any) -> Any:
    def method(self: _Lent, *args: Any, **kwargs: Any) -> Any:
        return getattr(to(self), name)(*args, **kwargs)

    return method


for _name in """__getitem__ __or__ __ror__ __eq__ __ne__ __repr__ get items values copy __setitem__ __delitem__ __ior__
    clear pop popitem setdefault update""".split():
    setattr(_Lent, _name, _passed_on(_name, _Lent._now))
for _name in "__iter__ __reversed__ __len__ __contains__ keys".split():
    setattr(_Lent, _name, _passed_on(_name, _Lent._names_now))
