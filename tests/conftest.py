"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def _reproducible():
    """The same random numbers in every test, whichever ran before it, and no more threads than the small tests need."""
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data sets: VBDL_DATA, or shared/data beside the checkout."""
    named = os.environ.get("VBDL_DATA")
    folder = Path(named) if named else Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no real data: set VBDL_DATA to the folder that holds cifar_probs and the others")
    return folder
