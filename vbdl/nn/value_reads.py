"""Networks that read numbers they have computed: an `if` or `while` on a tensor, `.item()`, `int(...)`, NumPy.

What they do may differ between draws, so that draws cannot be put into one batch, where it would be decided once.
"""

from collections.abc import Iterator
from typing import Any
from weakref import WeakValueDictionary

from torch import Tensor

from vbdl.calling.graphs import FunctionMode

_READING = frozenset(
    "__bool__ __int__ __float__ __index__ __complex__ __contains__ __array__ item tolist numpy is_nonzero equal "
    "allclose".split()
)
_SILENT = frozenset("__len__ dim size stride numel data_ptr is_contiguous is_floating_point __hash__".split())


class Followed:
    """The tensors that follow from some values of a forward, and whether a number of one was read."""

    def __init__(self) -> None:
        self.read = False
        # by id, and not held, which would keep every value of a forward in memory; an id is gone with its tensor
        self._tensors: WeakValueDictionary[int, Tensor] = WeakValueDictionary()

    def begin(self, output: Any) -> None:
        """Follow the tensors of this output."""
        for t in _tensors(output):
            self._tensors[id(t)] = t

    def go_on(self, name: str, args: Any, kwargs: Any, output: Any) -> None:
        """Follow what a function of this name computed from followed tensors; name: as of the function."""
        if not self._tensors or name in _SILENT or not any(id(t) in self._tensors for t in _tensors((args, kwargs))):
            return
        self.read |= name in _READING
        self.begin(output)
        if name.endswith("_") and args:  # it writes into its first argument, as `x.mul_` and `x[0] = ...`
            self.begin(args[0])

    def see(self, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        """Follow what this function computed from floating-point tensors.

        Masks and ids, which are part of the inputs, are the same in all draws.
        """
        name = getattr(func, "__name__", "")
        if name not in _SILENT:
            self.begin([t for t in _tensors((args, kwargs)) if t.is_floating_point()])
            self.go_on(name, args, kwargs, output)


class ValueReads(FunctionMode):
    """A torch function mode that finds whether numbers are read of what follows from floating-point tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.followed = Followed()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        self.followed.see(func, args, kwargs, output)
        return output


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
