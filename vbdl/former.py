"""Names of version 0.1 that have changed: each still works, with a DeprecationWarning that says the new name."""

import functools
import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Mapping
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, TypeVar, cast

_Taker = TypeVar("_Taker", bound=Callable[..., Any])

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


def names(module: str, renamed: Mapping[str, str]) -> Callable[[str], Any]:
    """A `__getattr__` for this module, which gives what is called by a former name: {former name: name today}.

    A name of today may be of a module inside, "predictor.Predictor".
    """

    def look_up(name: str) -> Any:
        if name not in renamed:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        home, _, leaf = f"{module}.{renamed[name]}".rpartition(".")
        warnings.warn(f"{module}.{name} is called {home}.{leaf} now", DeprecationWarning, stacklevel=2)
        return getattr(importlib.import_module(home), leaf)

    return look_up


def attribute(old: str, new: str) -> property:
    """An attribute by its former name, read only: in a class, old = attribute("old", "new")."""

    def look_up(owner: Any) -> Any:
        warnings.warn(f"{type(owner).__name__}.{old} is called {new} now", DeprecationWarning, stacklevel=2)
        return getattr(owner, new)

    return property(look_up)


def arguments(**renamed: str) -> Callable[[_Taker], _Taker]:
    """A decorator of what takes arguments by keyword: each is also taken by its former name, former="today"."""

    def decorate(taker: _Taker) -> _Taker:
        if isinstance(taker, type):
            owner: Any = taker
            owner.__init__ = decorate(owner.__init__)
            return cast(_Taker, owner)

        @functools.wraps(taker)
        def take(*args: Any, **given: Any) -> Any:
            for old in renamed.keys() & given.keys():
                new, name = renamed[old], taker.__qualname__.removesuffix(".__init__")
                if new in given:
                    raise TypeError(f"{name} got {old}= and {new}=, which are one argument: leave {old}= out")
                warnings.warn(f"the argument {old}= of {name} is called {new}= now", DeprecationWarning, stacklevel=2)
                given[new] = given.pop(old)
            return taker(*args, **given)

        return cast(_Taker, take)

    return decorate


class _ModulesFinder(MetaPathFinder, Loader):
    """Imports a module by its former name: the one module there is, whatever it is called by."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
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
    """What a module of this former name is called today; None for any other name."""
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
