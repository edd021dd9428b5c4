"""The public names of vbdl, for the table on the API page and for the tests of pages and examples."""

import inspect
from types import ModuleType

import vbdl

MODULES = ("calibration", "decision", "metrics", "ood", "adaptive")
"""Modules whose names are all public; of `artifact` and `export` the API pages show those that users call."""


def of_module(module: ModuleType) -> dict[str, object]:
    """The public classes, functions and constants of a module by name: its `__all__`, or what it takes from vbdl."""
    if listed := getattr(module, "__all__", None):
        return {name: getattr(module, name) for name in listed}
    found = {}
    for name, value in vars(module).items():
        if name.startswith("_") or inspect.ismodule(value):
            continue
        ours = getattr(value, "__module__", "").startswith("vbdl.")
        if ours or isinstance(value, int):
            found[name] = value
    return found


def public() -> dict[str, object]:
    """Every public class, function and constant by its shortest dotted name, each object once."""
    found: dict[str, object] = {}
    for module in (vbdl, *(getattr(vbdl, name) for name in MODULES)):
        for name, value in of_module(module).items():
            again = not isinstance(value, int) and any(value is other for other in found.values())
            if inspect.ismodule(value) or again:
                continue
            prefix = "vbdl" if module is vbdl else f"vbdl.{module.__name__.rpartition('.')[2]}"
            found[f"{prefix}.{name}"] = value
    return found


def summary(value: object) -> str:
    """The first sentence of the docstring, or the value of a constant."""
    if isinstance(value, int):
        return f"the number {value}"
    first = (inspect.getdoc(value) or "").split("\n\n")[0].replace("\n", " ")
    return first.replace("|", "\\|")


def table() -> str:
    """A Markdown table of every public name."""
    rows = ["| name | what it is |", "| --- | --- |"]
    for name, value in sorted(public().items(), key=lambda item: item[0].lower()):
        place = name if isinstance(value, int) else f"{value.__module__}.{value.__qualname__}"
        rows.append(f"| [`{name}`][{place}] | {summary(value)} |")
    return "\n".join(rows)
