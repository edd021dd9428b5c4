"""The registry of data sets and methods by name; a plugin file adds to it with the same decorators."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from vbdl import plugins

if TYPE_CHECKING:
    from vbdl.bench.source import Source
    from vbdl.bench.task import Each, Run, Stacked, Task
    from vbdl.engine.predictor import Predictor

Make = TypeVar("Make", bound=Callable[..., object])
MakeTask = Callable[["Source", str], "Task"]
Train = Callable[["Task", "Run"], "Stacked | Each | Sequence[Predictor]"]


@dataclass(frozen=True)
class Entry(Generic[Make]):
    """A registered data set or method."""

    name: str
    make: Make
    suite: str = ""
    about: str = ""


DATASETS: dict[str, Entry[MakeTask]] = {}
METHODS: dict[str, Entry[Train]] = {}


def dataset(name: str, suite: str = "own") -> Callable[[MakeTask], MakeTask]:
    """Register `make(source, protocol) -> Task` as a data set of a suite; the first docstring line describes it."""
    return _register(DATASETS, "data set", name, suite)


def method(name: str) -> Callable[[Train], Train]:
    """Register `train(task, run)` as a method; it returns a `Stacked` posterior or a `vbdl.Predictor` per split."""
    return _register(METHODS, "method", name, "")


def _register(where: dict[str, Entry[Make]], kind: str, name: str, suite: str) -> Callable[[Make], Make]:
    if not name or any(c in name for c in "/\\ .\n"):
        raise ValueError(
            f"{name!r} cannot be the name of a {kind}, which becomes part of a file name: use letters, digits and '-'"
        )

    def decorate(make: Make) -> Make:
        before = where.get(name)
        if before is not None and before.make.__module__ != make.__module__:
            raise ValueError(f"{before.make.__module__} already registered a {kind} {name!r}: use another name")
        where[name] = Entry(name, make, suite, (make.__doc__ or "").strip().partition("\n")[0])
        return make

    return decorate


def load_builtin() -> None:
    """Register the data sets and methods of vbdl."""
    from vbdl.bench.datasets import bundled, images, tabular, uci  # noqa: F401
    from vbdl.bench.methods import deep_ensemble, ivon, linear, mc_dropout, mean_field, single, trained  # noqa: F401

    _add_methods_of_table()


def _add_methods_of_table() -> None:
    """Register the methods of the table that have no file here, and so no published protocol."""
    from vbdl.bench.methods.training import without_protocol
    from vbdl.methods import METHODS as TABLE
    from vbdl.methods import building

    for name in set(building()) - METHODS.keys():
        method(name)(without_protocol(TABLE[name]))


def load_plugin(path: Path) -> None:
    """Run a Python file that registers data sets and methods. Its code is executed: use files you trust.

    It is imported as `vbdl.plugins.load` says. A method is a function with the decorator `method`, or a posterior's
    class with `@vbdl.register(name=...)`, which is trained without a published protocol.
    """
    before = len(DATASETS) + len(METHODS)
    is_new = plugins.load(path)
    _add_methods_of_table()
    if is_new and len(DATASETS) + len(METHODS) == before:
        raise ValueError(
            f"{path} registered nothing new: decorate a function with vbdl.bench.dataset or .method, or a posterior's "
            f"class with vbdl.register(name=...)"
        )


def suites() -> dict[str, list[str]]:
    """The names of the data sets by suite.

    "quality" is all of them but the bundled, the user's own and variants; "trained" those that compare methods on one
    trained network.
    """
    by_suite: dict[str, list[str]] = {}
    for entry in DATASETS.values():
        by_suite.setdefault(entry.suite, []).append(entry.name)
    by_suite["quality"] = [e.name for e in DATASETS.values() if e.suite not in ("bundled", "own", "trained")]
    by_suite["trained"] = ["pneumonia", *by_suite["trained"], "gtsrb", *by_suite["uci"]]
    return by_suite
