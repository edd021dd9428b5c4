"""Tests marked `interpreter` run the Triton kernels on the CPU, in Triton's interpreter.

It must be switched on before triton is imported and would break whatever compiles afterwards, so these tests run in a
process of their own: `test_interpreter.py` starts it. By hand:
`TRITON_INTERPRET=1 pytest tests/kernels -m interpreter`.
"""

import os

import pytest
import torch


def pytest_configure(config):
    config.addinivalue_line("markers", "interpreter: runs a kernel in Triton's interpreter, in a process of its own")


def pytest_collection_modifyitems(config, items):
    if os.environ.get("TRITON_INTERPRET") == "1":
        return
    elsewhere = [item for item in items if item.get_closest_marker("interpreter")]
    config.hook.pytest_deselected(items=elsewhere)
    items[:] = [item for item in items if not item.get_closest_marker("interpreter")]


@pytest.fixture
def poisoned():
    """Memory that nobody has written reads NaN, so an element a kernel forgets is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
