"""Functions that a network holds and that read its modules, such as `self.f = lambda x: self.layer(x).sin()` or a hook.

`copy.deepcopy` copies no function, so that in a copy of the network such a function would go on calling the layers of
the network that was copied, with its weights. Here a copy of the network gets functions that call the copy's layers.
"""

import functools
from collections.abc import Collection, Iterable, Iterator
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

from vbdl.calling.graphs import FunctionMode
from vbdl.calling.traversing import TABLES, is_cache, modules_of, state_in

_SILENT = (type(None), bool, int, float, complex, str, bytes, type, ModuleType, Tensor)


def functions_in(value: object) -> list[FunctionType]:
    """The functions in a value that may read other objects than their arguments, in the order of a deep copy."""
    return [
        function
        for function in held_in(value, (FunctionType,))
        if function.__closure__ or function.__defaults__ or function.__kwdefaults__ or _global_modules(function)
    ]


def held_in(value: object, kinds: tuple[type, ...], seen: set[int] | None = None) -> Iterator[Any]:
    """Yield the objects of these classes that a value is or holds, outside of the modules and functions in it."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    if isinstance(value, kinds):
        seen.add(id(value))
        yield value
    elif not isinstance(value, (*_SILENT, nn.Module, FunctionType)):
        seen.add(id(value))
        for part in _parts(value):
            yield from held_in(part, kinds, seen)


def reads(value: object, owned: Collection[int], seen: set[int] | None = None) -> bool:
    """Whether one of the modules and tensors with these ids is in a value or is read by a function in it."""
    if isinstance(value, nn.Module | Tensor):
        return id(value) in owned
    seen = set() if seen is None else seen
    if isinstance(value, _SILENT) or id(value) in seen:
        return False
    seen.add(id(value))
    parts = _read_by(value) if isinstance(value, FunctionType) else _parts(value)
    return any(reads(part, owned, seen) for part in parts)


def tensors_held(module: nn.Module) -> list[Tensor]:
    """The tensors that functions of a module hold themselves, not as attributes of a module."""
    functions = [f for value in vars(module).values() for f in functions_in(value)]
    return [part for f in functions for part in _read_by(f) if isinstance(part, Tensor)]


def held_parameters(network: nn.Module) -> Iterator[tuple[str, str, Tensor, bool]]:
    """Yield the places where a network holds parameters of its own beside those of its modules.

    Each with the parameter's name, the parameter, and whether a function holds it. Such a place is a list of weights
    or `functools.partial(F.linear, weight=self.layer.weight)`. What stands in a module for a parameter during a call,
    such as the weight of a draw, does not stand there.
    """
    modules = modules_of(network)
    names = {id(p): name for name, p in state_in(modules).items() if isinstance(p, nn.Parameter)}
    for path, m in modules:
        for key, value in vars(m).items():
            if key in _WITHOUT_HOOKS or is_cache(m, key) or not isinstance(value, _HOLDERS):
                continue
            for t in _tensors_in(value, set()):
                if id(t) in names:
                    yield f"{path}.{key}" if path else key, names[id(t)], t, isinstance(value, _CALLED)


_WITHOUT_HOOKS = (TABLES | {"training"}) - {"_forward_hooks", "_forward_pre_hooks"}
_CALLED = (functools.partial, FunctionType, MethodType)
_HOLDERS = (list, tuple, set, dict, *_CALLED)


def _tensors_in(value: object, seen: set[int]) -> Iterator[Tensor]:
    """Yield the tensors in nested lists, tables, partial functions and what functions hold."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, _HOLDERS) and id(value) not in seen:
        seen.add(id(value))
        for part in _read_by(value) if isinstance(value, FunctionType) else _parts(value):
            yield from _tensors_in(part, seen)


def check_held(network: nn.Module, replaced: Collection[str]) -> None:
    """Refuse a network in which a function, and not a module alone, holds one of these parameters.

    For methods that put other tensors in the place of parameters. replaced: the names of these parameters.
    """
    HeldParameters(network, replaced)


class HeldParameters(FunctionMode):
    """A torch function mode that refuses a forward which reads a parameter that the network holds in a list or table.

    Not all that is held is read: lists of parameters may be those of an optimizer's groups. Raises ValueError, also at
    once for a parameter that a function holds, as `check_held` does.
    """

    def __init__(self, network: nn.Module, replaced: Collection[str]):
        super().__init__()
        self.held: dict[int, tuple[Tensor, str, str]] = {}
        for place, name, t, calls in held_parameters(network):
            if name not in replaced:
                continue
            if calls:
                raise _held(place, name)
            self.held[id(t)] = t, place, name

    def __torch_function__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if isinstance(output, Tensor):  # its shape may be read
            for t in _tensors_in((args, kwargs or {}), set()):
                if id(t) in self.held:
                    raise _held(*self.held[id(t)][1:])
        return output


def _held(place: str, name: str) -> ValueError:
    return ValueError(
        f"the attribute '{place}' holds the parameter '{name}' itself, so it would not get the weight that a draw or a "
        f"member has in its place: let it hold the module, and read the weight when it is called"
    )


def _parts(value: object) -> Iterable[object]:
    """What a deep copy of a value copies."""
    if isinstance(value, dict):
        return value.values()
    if isinstance(value, list | tuple | set | frozenset):
        return value
    if isinstance(value, functools.partial):
        return (value.func, value.args, value.keywords)
    if isinstance(value, MethodType):
        return (value.__self__, value.__func__)
    return tuple(vars(value).values()) if hasattr(value, "__dict__") else ()


def _read_by(function: FunctionType) -> Iterator[object]:
    """Yield what a function reads beside its arguments: its closure, its defaults, and global modules."""
    for cell in function.__closure__ or ():
        if (content := _content(cell)) is not _EMPTY:
            yield content
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    for name in _global_modules(function):
        yield function.__globals__[name]


_EMPTY = object()


def _content(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # it is not filled yet
        return _EMPTY


def _global_modules(function: FunctionType) -> list[str]:
    """The names of the global variables that hold modules and that a function may read."""
    return [n for n in _names(function.__code__) if isinstance(function.__globals__.get(n), nn.Module)]


@functools.lru_cache(maxsize=1024)
def _names(code: CodeType) -> tuple[str, ...]:
    """The names of attributes and of global variables in some code and in the functions inside it."""
    inner = (name for const in code.co_consts if isinstance(const, CodeType) for name in _names(const))
    return tuple(dict.fromkeys((*code.co_names, *inner)))


def _attributes(function: FunctionType) -> dict[str, Any]:
    """Return the attributes of a function, without those that Dynamo gave it."""
    compiled = "_torchdynamo_orig_callable" in vars(function)
    of_dynamo = ("_torchdynamo", "_is_torch_compile", "__wrapped__")
    return {n: v for n, v in vars(function).items() if not (compiled and n.startswith(of_dynamo))}


def as_written(function: FunctionType) -> FunctionType:
    """Return the function that torch.compile compiled, or else this one: compiled code belongs to the given network."""
    written = vars(function).get("_torchdynamo_orig_callable")
    return function if written is None else (lambda *args, **kwargs: written(*args, **kwargs))


class Rebuilt:
    """The functions of a network that read its modules or parameters, made anew for a copy of the network.

    owned: the ids of these modules and parameters. memo: as of `copy.deepcopy`; it gets the new functions at once, and
    what they read once `fill` is called, when the modules have their copies.
    """

    def __init__(self, owned: Collection[int], memo: dict[int, Any]):
        self._owned, self._memo = owned, memo
        self._made: list[tuple[FunctionType, FunctionType]] = []

    def add(self, value: object) -> None:
        """Make those functions in a value anew that read a part of the network."""
        for function in functions_in(value):
            if id(function) not in self._memo and reads(function, self._owned):
                self._make(function)

    def _make(self, function: FunctionType) -> None:
        """Make a function anew, with empty cells in place of those that hold something to copy."""
        given, function = function, as_written(function)
        self._memo.setdefault(id(self._memo), []).append(function)  # so that its cells keep their ids
        cells = tuple(self._cell(cell) for cell in function.__closure__ or ())
        names = [n for n in _global_modules(function) if id(function.__globals__[n]) in self._owned]
        # `fill` replaces the names in a copy
        values = dict(function.__globals__) if names else function.__globals__
        new = FunctionType(function.__code__, values, function.__name__, function.__defaults__, cells)
        new.__kwdefaults__, new.__qualname__ = function.__kwdefaults__, function.__qualname__
        new.__doc__, new.__module__ = function.__doc__, function.__module__
        vars(new).update(_attributes(given))
        self._memo[id(given)] = new
        self._made.append((function, new))
        for part in _read_by(function):
            self.add(part)

    def _cell(self, cell: CellType) -> CellType:
        """A cell for the copy, which functions that shared the given one still share."""
        if not reads(_content(cell), self._owned):
            return cell
        return self._memo.setdefault(id(cell), CellType())

    def fill(self, copied: Any) -> None:
        """Put copies of what the functions read into the new ones; copied: returns the copy of a value."""

        def of(value: Any) -> Any:
            if not reads(value, self._owned):
                return value
            try:
                return copied(value)
            except TypeError:  # an object that cannot be copied, such as one that holds a lock
                return value

        for function, new in self._made:
            for cell, made in zip(function.__closure__ or (), new.__closure__ or (), strict=True):
                if cell is not made:
                    made.cell_contents = of(cell.cell_contents)
            if function.__defaults__:
                new.__defaults__ = tuple(map(of, function.__defaults__))
            if function.__kwdefaults__:
                new.__kwdefaults__ = {name: of(value) for name, value in function.__kwdefaults__.items()}
            if new.__globals__ is not function.__globals__:
                new.__globals__.update({n: of(function.__globals__[n]) for n in _global_modules(function)})
