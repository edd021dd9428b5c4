"""Shared by the tests of the suite."""

import pytest

from vbdl.bench import registry


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """The built-in data sets and methods, and nothing that another test registered."""
    registry.load_builtin()
    monkeypatch.setattr(registry, "DATASETS", dict(registry.DATASETS))
    monkeypatch.setattr(registry, "METHODS", dict(registry.METHODS))
