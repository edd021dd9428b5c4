"""Training by several processes is that of one, goes on from any number of them, and ends if one of them does."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("training_processes.py")


def said(what, folder, size):
    """What each of so many processes prints, and how it ended."""
    meet = folder / "meet"
    command = [sys.executable, str(SCRIPT), what, str(meet)]
    running = [
        subprocess.Popen([*command, str(rank), str(size)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in range(size)
    ]
    try:
        return [(process.communicate(timeout=400)[0], process.returncode) for process in running]
    finally:
        for process in running:
            process.kill()


@pytest.mark.parametrize(
    ("what", "size", "promises"),
    [
        ("methods", 2, 11),
        ("refused", 2, 14),
        ("resumed", 2, 8),
        ("loaders", 2, 2),
        pytest.param("others", 2, 34, marks=pytest.mark.thorough),
        pytest.param("methods", 3, 11, marks=pytest.mark.thorough),
        pytest.param("others", 3, 34, marks=pytest.mark.thorough),
        pytest.param("resumed", 3, 24, marks=pytest.mark.thorough),
        pytest.param("compiled", 2, 3, marks=pytest.mark.thorough),
    ],
)
def test_several_processes_keep_their_promises(what, size, promises, tmp_path):
    for text, code in said(what, tmp_path, size):
        assert code == 0, text
        assert "NOT ok" not in text, text
        assert text.count("ok: ") == promises, text


@pytest.mark.parametrize("what", ["dying", pytest.param("hanging", marks=pytest.mark.thorough)])
def test_the_others_end_with_an_error_when_a_process_does(what, tmp_path):
    begun = time.monotonic()
    *others, _ = said(what, tmp_path, 2)
    assert all("\nok: the others end with an error" in text for text, _ in others), others
    assert time.monotonic() - begun < 200
