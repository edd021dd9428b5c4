"""Data sets and methods by name. A file of one's own adds to them with the same decorators."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Entry:
    """A registered data set or method."""

    name: str
    make: Callable[..., Any]
    suite: str = ""
    about: str = ""


DATASETS: dict[str, Entry] = {}
METHODS: dict[str, Entry] = {}


def dataset(name: str, suite: str = "own") -> Callable[[Callable], Callable]:
    """Register `make(source, protocol) -> Task` as a data set of a suite; the first docstring line describes it."""
    return _register(DATASETS, "data set", name, suite)


def method(name: str) -> Callable[[Callable], Callable]:
    """Register `train(task, run)` as a method. It returns a `Stacked` posterior, or a `vbdl.Predictor` a split."""
    return _register(METHODS, "method", name, "")


def _register(where: dict[str, Entry], kind: str, name: str, suite: str) -> Callable[[Callable], Callable]:
    if not name or any(c in name for c in "/\\ .\n"):
        raise ValueError(f"the name of a {kind} becomes part of a file name, so no {name!r}: letters, digits and '-'")

    def decorate(make: Callable) -> Callable:
        before = where.get(name)
        if before is not None and before.make.__module__ != make.__module__:
            raise ValueError(f"there is a {kind} {name!r} already, from {before.make.__module__}: take another name")
        where[name] = Entry(name, make, suite, (make.__doc__ or "").strip().partition("\n")[0])
        return make

    return decorate


def load_builtin() -> None:
    """Register what vbdl brings."""
    from vbdl.bench.datasets import bundled, images, tabular, uci  # noqa: F401
    from vbdl.bench.methods import deep_ensemble, linear, mc_dropout, mean_field, single  # noqa: F401
    from vbdl.bench.methods.training import without_protocol
    from vbdl.methods import METHODS as TABLE

    for name in TABLE.keys() - METHODS.keys():  # a method without a file of its own is trained like any other
        method(name)(without_protocol(TABLE[name]))


def load_plugin(path: Path) -> None:
    """Run a Python file, whose decorators register what it brings. It is code: give files that you trust."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no plugin file {path}")
    spec = importlib.util.spec_from_file_location(f"vbdl_bench_plugin_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is not a Python file")
    before = len(DATASETS) + len(METHODS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if len(DATASETS) + len(METHODS) == before:
        raise ValueError(f"{path} registered nothing new: decorate a function with vbdl.bench.dataset or .method")


def suites() -> dict[str, list[str]]:
    """Names of the data sets of each suite; "quality" is every one but the bundled and one's own."""
    found: dict[str, list[str]] = {}
    for entry in DATASETS.values():
        found.setdefault(entry.suite, []).append(entry.name)
    found["quality"] = [e.name for e in DATASETS.values() if e.suite not in ("bundled", "own")]
    return found
