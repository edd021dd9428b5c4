"""Draws over two processes are the draws of one."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("two_processes.py")


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What two processes print that share a file."""
    meet = tmp_path_factory.mktemp("meet") / "file"
    command = [sys.executable, str(SCRIPT), str(meet)]
    running = [subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
               for rank in range(2)]  # fmt: skip
    texts = [process.communicate(timeout=120)[0] for process in running]
    for process, text in zip(running, texts, strict=True):
        assert process.returncode == 0, text
    return texts


@pytest.mark.parametrize(
    "promise",
    [
        "ensemble is one process", "gaussian ensemble is one process", "dropout is one process",
        "mean-field is one process", "calibrated is one process", "uneven shares", "all processes agree",
        "half the members", "gathered members are the ensemble", "too few draws are refused", "samples are refused",
        "loaded shares are one process", "a share is loaded in about half the memory", "loaded noise is one process",
        "loaded dropout is one process", "loaded cooled is one process", "fewer draws are the first",
        "damage anywhere is refused everywhere",
    ],
)  # fmt: skip
def test_two_processes(said, promise):
    for text in said:
        assert f"ok: {promise}\n" in text, text
