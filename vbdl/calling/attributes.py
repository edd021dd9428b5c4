"""What forward passes leave in the attributes of modules, such as a weight that is normalized once, and taking it back.

Draws run in one network, one after the other. What one draw computed from its weights and left there must not be found
by the next one, which in a loop over networks has a network of its own.
"""

import collections
import contextlib
from collections.abc import Iterable, Iterator
from types import FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn

from vbdl.calling.copies import numbers_kept_by
from vbdl.calling.traversing import TABLES, is_cache, modules_of


class Attributes:
    """The attributes of a network's modules as they are now, to which `restore` takes them back.

    Functions that keep what they returned (`functools.lru_cache`) forget it then. Modules that keep something on
    purpose, as `vbdl.nn.keyed.KeyedNetwork` does, stay as they are.
    """

    def __init__(self, network: nn.Module):
        modules = [m for _, m in modules_of(network) if not hasattr(type(m), "keeps_on_purpose")]
        self._before = [(m, own := _own(m), _inside(own.values())) for m in modules]
        kinds = {kind for m in modules for kind in type(m).__mro__}
        functions = [value for kind in kinds for value in vars(kind).values() if hasattr(value, "cache_clear")]
        self._functions: list[Any] = [function for function in functions if callable(function.cache_clear)]

    def restore(self) -> bool:
        """Take the attributes back, and return whether any had changed, or whether a function may have kept values."""
        changed = bool(self._functions)
        for module, before, inside in self._before:
            now, attributes = _own(module), vars(module)
            for name in now.keys() - before.keys():
                del attributes[name]
                changed = True
            for name, value in before.items():
                if name not in now or now[name] is not value:
                    attributes[name] = value
                    changed = True
            for holder, held in inside:
                changed |= _filled(holder, held)
        for function in self._functions:
            function.cache_clear()
        return changed

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """A context after which the attributes are taken back, also if the network raises an error."""
        try:
            yield
        finally:
            self.restore()


class OfMembers:
    """The attributes of one network that stands for several members, such as the number of steps that each has done.

    Only numbers count: a tensor that every forward leaves behind, such as an attention map, is of nobody.
    """

    def __init__(self, network: nn.Module, count: int):
        self._network, self._each = network, [Attributes(network)] * count
        self._change = False  # whether a number has changed in any turn

    @contextlib.contextmanager
    def turn(self, member: int) -> Iterator[None]:
        """A context in which the network has the attributes of this member, and leaves them to its next turn."""
        if self._change:
            self._each[member].restore()
        before = numbers_kept_by(self._network)
        yield
        self._change |= numbers_kept_by(self._network) != before
        if self._change:
            self._each[member] = Attributes(self._network)


def _own(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module that are no tables of torch's."""
    return {n: v for n, v in vars(module).items() if n not in TABLES and not is_cache(module, n)}


_HOLDERS = (dict, list, set, collections.deque)
_MOST = 10_000  # objects that are looked at


def _inside(values: Iterable[Any]) -> list[tuple[Any, Any]]:
    """The lists, tables and sets among values, in each other and in objects' attributes, and what each holds."""
    found: list[tuple[Any, Any]] = []
    waiting, seen = list(values), set()
    while waiting and len(seen) < _MOST:
        value = waiting.pop()
        if id(value) in seen or isinstance(value, nn.Module | Tensor | type | ModuleType | FunctionType):
            continue
        seen.add(id(value))
        holder = value if isinstance(value, _HOLDERS) else getattr(value, "__dict__", None)
        if isinstance(holder, _HOLDERS):
            held = dict(holder) if isinstance(holder, dict) else list(holder)
            found.append((holder, held))
            waiting += held.values() if isinstance(held, dict) else held
        elif isinstance(value, tuple):
            waiting += value
    return found


def _filled(holder: Any, held: Any) -> bool:
    """Let a list, table or set hold the same objects as before, and return whether it did not."""
    if isinstance(held, dict):
        same = list(holder) == list(held) and all(a is b for a, b in zip(holder.values(), held.values(), strict=True))
    else:
        same = len(holder) == len(held) and all(a is b for a, b in zip(holder, held, strict=True))
    if same:
        return False
    holder.clear()
    holder.update(held) if isinstance(holder, dict | set) else holder.extend(held)
    return True
