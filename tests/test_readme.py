"""The code of README.md runs, and the code of docs uses public names only."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def run_blocks(folder, monkeypatch) -> dict:
    """All blocks in order, as one session in an empty folder."""
    monkeypatch.chdir(folder)
    names: dict = {}
    for number, block in enumerate(blocks()):
        exec(compile(block, f"README.md, block {number + 1}", "exec"), names)
    return names


def test_the_code_of_the_readme_runs(tmp_path, monkeypatch, traced_only):
    """Uncompiled, as the same graph; the slow test compiles."""
    assert blocks()
    names = run_blocks(tmp_path, monkeypatch)
    p = names["p"]
    torch.testing.assert_close(p.total, p.aleatoric + p.epistemic, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_the_code_of_the_readme_runs_compiled(tmp_path, monkeypatch):
    run_blocks(tmp_path, monkeypatch)


@pytest.mark.parametrize("document", sorted((ROOT / "docs").rglob("*.md")), ids=lambda path: path.name)
def test_names_in_the_code_of_a_document_need_no_more_than_import_vbdl(document):
    import vbdl

    code = "\n".join(re.findall(r"```python\n(.*?)```", document.read_text(), flags=re.DOTALL))
    lines = [line for line in code.splitlines() if not line.startswith(("from ", "import "))]
    used = set(re.findall(r"(?<![\w.\"])vbdl\.(\w+)", "\n".join(lines)))
    assert used <= set(vbdl.__all__), f"not to be had from vbdl: {used - set(vbdl.__all__)}"


def test_the_api_fits_thirty_lines():
    first = [line for line in blocks()[0].splitlines() if line.strip() and not line.strip().startswith("#")]
    assert len(first) <= 30
