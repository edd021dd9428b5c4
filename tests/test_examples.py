"""Every public class and function has an example in its docstring, and the examples run as they are printed."""

import doctest
import importlib.util
import inspect
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import vbdl

ROOT = Path(__file__).parents[1]


def _names_module():
    spec = importlib.util.spec_from_file_location("docs_names", ROOT / "docs" / "tools" / "names.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


NAMES = _names_module()
PUBLIC = {name: value for name, value in NAMES.public().items() if not isinstance(value, int)}
SLOW = {"vbdl.recommend"}  # trains every method
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def test_every_public_name_has_an_example():
    missing = [name for name, value in PUBLIC.items() if ">>> " not in (inspect.getdoc(value) or "")]
    assert not missing, f"without lines that begin with >>> in their docstring: {missing}"


@pytest.mark.parametrize("module", ["", *(f".{m}" for m in ("calibration", "decision", "metrics", "ood", "adaptive"))])
def test_the_docstring_of_a_module_lists_what_is_in_it(module):
    value = getattr(vbdl, module[1:]) if module else vbdl
    names = NAMES.of_module(value) if module else dict.fromkeys(vbdl.__all__)
    missing = [name for name in names if not re.search(rf"\b{name}\b", value.__doc__ or "")]
    assert not missing, f"not in the docstring of vbdl{module}: {missing}"


@pytest.mark.parametrize("name", PUBLIC)
def test_the_example_of_a_public_name_runs(name, monkeypatch):
    """Examples assume `import torch, vbdl` and `from torch import nn`, as the API page says."""
    if name in SLOW:
        pytest.skip("its example is run by the thorough tests")
    run(name, monkeypatch)


@pytest.mark.thorough
@pytest.mark.parametrize("name", sorted(SLOW))
def test_the_example_of_a_slow_function_runs(name, monkeypatch):
    run(name, monkeypatch)


def run(name: str, monkeypatch) -> None:
    monkeypatch.setenv("VBDL_COMPILE", "never")
    text = inspect.getdoc(PUBLIC[name]) or ""
    test = doctest.DocTestParser().get_doctest(text, {"torch": torch, "nn": nn, "vbdl": vbdl}, name, name, 0)
    assert test.examples, f"{name} has no example: add lines that begin with >>> to its docstring"
    said: list[str] = []
    failed = doctest.DocTestRunner(optionflags=FLAGS).run(test, out=said.append)
    assert failed.failed == 0, "".join(said)
