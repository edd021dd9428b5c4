"""What forward passes leave in the attributes of modules, such as a weight that is normalized once, and taking it back.

Draws run in one network, one after the other. What one draw computed from its weights and left there must not be found
by the next one, which in a loop over networks has a network of its own.
"""

from typing import Any

from torch import nn

from vbdl.calling.traversing import is_cache, modules_of

_TABLES = frozenset(vars(nn.Module())) - {"training"}  # of every module: its tensors, its modules and its hooks


class Attributes:
    """The attributes of a network's modules as they are now, to which `restore` takes them back.

    Functions that keep what they returned (`functools.lru_cache`) forget it then. Modules that keep something on
    purpose, as `vbdl.nn.keyed.KeyedNetwork` does, stay as they are.
    """

    def __init__(self, network: nn.Module):
        modules = [m for _, m in modules_of(network) if not hasattr(type(m), "keeps_on_purpose")]
        self._before = [(m, own := _own(m), _inside(own)) for m in modules]
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
            for name, value in inside.items():
                changed |= _filled(before[name], value)
        for function in self._functions:
            function.cache_clear()
        return changed


def _own(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module that are no tables of torch's."""
    return {n: v for n, v in vars(module).items() if n not in _TABLES and not is_cache(module, n)}


def _inside(attributes: dict[str, Any]) -> dict[str, Any]:
    """Copies of the lists, dicts and sets among attributes."""
    return {name: value.copy() for name, value in attributes.items() if type(value) in (list, dict, set)}


def _filled(now: Any, before: Any) -> bool:
    """Let a list, dict or set hold the same objects as another one, and return whether it did not."""
    of = lambda value: [*value, *value.values()] if isinstance(value, dict) else list(value)
    if len(now) == len(before) and all(a is b for a, b in zip(of(now), of(before), strict=True)):
        return False
    now.clear()
    now.extend(before) if isinstance(now, list) else now.update(before)
    return True
