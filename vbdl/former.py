"""Names of version 0.1 that have changed: each still works, with a DeprecationWarning that says the new name."""

import functools
import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TypeVar, cast

_Taker = TypeVar("_Taker", bound=Callable[..., object])  # a function, or a class

MODULES = {
    "adaptive": "engine.adaptive",
    "artefact": "artifact",
    "checkpoint": "training.checkpoint",
    "compiler": "compiling.compiler",
    "decision.stored": "artifact.modules",
    "early_stopping": "training.early_stopping",
    "execution": "engine.execution",
    "fingerprint": "data.fingerprint",
    "graph": "compiling.graph",
    "moments": "engine.moments",
    "moments.normalisation": "engine.moments.normalization",
    "plan": "engine.plan",
    "precision": "engine.precision",
    "program": "engine.program",
    "replay": "compiling.replay",
    "rewrite": "compiling.rewrite",
    "splitting": "data.splitting",
    "stacking": "calling.stacking",
    "step": "training.step",
    "tabular.labelled": "tabular.labeled",
    "tabular.settings": "tabular.options",
    "tiles": "data.tiles",
    "train": "training.fit",
    "training_run": "training.run",
    "trial": "engine.trial",
}


def names(module: str, renamed: Mapping[str, str]) -> Callable[[str], object]:
    """Return a `__getattr__` for this module that finds its attributes by former names.

    renamed: {former name: name today}; a name of today may be inside a module of the package, "predictor.Predictor".
    """

    def look_up(name: str) -> object:
        if name not in renamed:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        home, _, leaf = f"{module}.{renamed[name]}".rpartition(".")
        warnings.warn(f"{module}.{name} is called {home}.{leaf} now", DeprecationWarning, stacklevel=2)
        return getattr(importlib.import_module(home), leaf)

    return look_up


def attribute(old: str, new: str) -> property:
    """Return a property that reads an attribute by its former name: in a class, old = attribute("old", "new")."""

    def look_up(owner: object) -> object:
        warnings.warn(f"{type(owner).__name__}.{old} is called {new} now", DeprecationWarning, stacklevel=2)
        return getattr(owner, new)

    return property(look_up)


def arguments(**renamed: str) -> Callable[[_Taker], _Taker]:
    """Return a decorator of a function or class that also takes arguments by former names, given as former="today"."""

    def decorate(taker: _Taker) -> _Taker:
        cls: object = taker
        if isinstance(cls, type):
            type.__setattr__(cls, "__init__", _renaming(cls.__init__, renamed))
            return taker
        return cast(_Taker, _renaming(taker, renamed))

    return decorate


def _renaming(function: Callable[..., object], renamed: Mapping[str, str]) -> Callable[..., object]:
    """Return the function with its keyword arguments also taken by former names: {former name: name today}."""

    @functools.wraps(function)
    def take(*args: object, **keywords: object) -> object:
        for old in renamed.keys() & keywords.keys():
            new, name = renamed[old], function.__qualname__.removesuffix(".__init__")
            if new in keywords:
                raise TypeError(f"{name} got {old}= and {new}=, which are one argument: leave {old}= out")
            warnings.warn(f"the argument {old}= of {name} is called {new}= now", DeprecationWarning, stacklevel=2)
            keywords[new] = keywords.pop(old)
        return function(*args, **keywords)

    return take


class _ModulesFinder(MetaPathFinder, Loader):
    """Imports a module by its former name, as the same module object as by its name of today."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        today = _today(fullname)
        if today is None or importlib.util.find_spec(today) is None:
            return None
        return ModuleSpec(fullname, self)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        today = _today(spec.name)
        assert today is not None
        if spec.name.removeprefix("vbdl.") in MODULES:  # once for a package, not for each module inside
            warnings.warn(f"the module {spec.name} is called {today} now", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(today)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Give the module its own spec back, which importing it by another name has replaced."""
        former = module.__spec__
        assert former is not None
        module.__spec__ = former.loader_state


def _today(fullname: str) -> str | None:
    """The name today of the module with this former name, or None if no module had this name."""
    if not fullname.startswith("vbdl."):
        return None
    head, inside = fullname.removeprefix("vbdl."), ""
    while head and head not in MODULES:  # the longest name that has changed, and what is inside it
        head, _, leaf = head.rpartition(".")
        inside = f".{leaf}{inside}"
    return f"vbdl.{MODULES[head]}{inside}" if head else None


def find_modules() -> None:
    """Let former names of modules be imported.

    Before all other finders: these would find the files of a renamed package again, and make a second module of each.
    """
    if not any(isinstance(finder, _ModulesFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _ModulesFinder())
