"""The pages of the site: their code runs, their figures are those of results, and every public name has its place."""

import importlib
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vbdl
from vbdl.methods import METHODS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def tool(name: str):
    """A module of docs/tools, which is no package."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


snippets, names = tool("snippets"), tool("names")

# these show lines for networks and files that a reader has; the tests that they name run such code
FRAGMENTS = {"networks.md", "artifact.md", "tables.md", "speed.md"}
ELSEWHERE = {"trained.md"}  # run by a test file of its own
PAGES = [p for p in sorted(DOCS.rglob("*.md")) if snippets.blocks(p.read_text()) and "zh" not in p.parts]
WITH_CODE = [p for p in PAGES if p.relative_to(DOCS).as_posix() not in FRAGMENTS | ELSEWHERE]
NAMES = names.public()


def run(page: Path, folder: Path, monkeypatch) -> dict:
    monkeypatch.setenv("VBDL_COMPILE", "never")
    monkeypatch.setenv("MPLBACKEND", "agg")
    session, before = snippets.Session(str(page.relative_to(ROOT)), folder), dict(METHODS)
    try:
        session.run_all(page.read_text())
    finally:  # a page may register a method of its own
        METHODS.clear()
        METHODS.update(before)
    return session.names


@pytest.mark.parametrize(
    "page",
    [p for p in WITH_CODE if "tutorials" not in p.parts],
    ids=lambda p: p.stem,
)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    run(page, tmp_path, monkeypatch)


@pytest.mark.thorough
@pytest.mark.parametrize("page", [p for p in WITH_CODE if "tutorials" in p.parts], ids=lambda p: p.stem)
def test_the_code_of_a_tutorial_runs(page, tmp_path, monkeypatch):
    run(page, tmp_path, monkeypatch)
    drawn = {path.name for path in tmp_path.iterdir()}
    shown = set(re.findall(r"!\[[^\]]+\]\((\w[\w.-]*)\)", page.read_text()))
    assert shown and shown <= drawn


def test_blocks_are_found_and_reasons_keep_them_from_running():
    text = "a\n\n```python\nx = 1\n```\n\n<!-- not run: needs a GPU -->\n```python\nx = 2\n```\n\n```\nx = 3\n```\n"
    first, second = snippets.blocks(text)
    assert (first.code, first.runs, first.line) == ("x = 1\n", True, 4)
    assert (second.code, second.runs) == ("x = 2\n", False)


def test_an_error_names_the_page_and_the_line(tmp_path):
    session = snippets.Session("page.md", tmp_path)
    with pytest.raises(ZeroDivisionError) as error:
        session.run_all("one\n\n```python\nx = 1\nx / 0\n```\n")
    assert error.traceback[-1].path == "page.md, line 4" or "page.md, line 4" in str(error.traceback[-1])


def test_the_output_stands_below_its_block(tmp_path):
    text = "```python\nprint(1 + 1)\n```\n\nend\n"
    shown = snippets.with_output(text, snippets.Session("page.md", tmp_path).run_all(text))
    assert shown == "```python\nprint(1 + 1)\n```\n\n```{.text .output}\n2\n```\n\nend\n"


# -- pages in two languages


@pytest.mark.parametrize("page", sorted((DOCS / "zh").glob("*.md")), ids=lambda p: p.stem)
def test_a_translation_has_the_code_of_its_page(page):
    ours, theirs = ([b.code for b in snippets.blocks(p.read_text())] for p in (page, DOCS / page.name))
    assert theirs and ours == theirs
    assert f"output_of: {page.name}" in page.read_text() or "run: true" not in (DOCS / page.name).read_text()


# -- the API


def shown() -> list[object]:
    """The objects that the API pages show, each named by `::: dotted.name`."""
    found = []
    for page in sorted((DOCS / "api").glob("*.md")):
        for dotted in re.findall(r"^::: (\S+)$", page.read_text(), flags=re.MULTILINE):
            value, path = vbdl, "vbdl"
            for part in dotted.split(".")[1:]:
                # a function hides the module of the same name that it is in, and a module may not be imported yet
                if not hasattr(value, part) and importlib.util.find_spec(path).submodule_search_locations:
                    value = importlib.import_module(f"{path}.{part}")
                else:
                    value = getattr(value if hasattr(value, part) else importlib.import_module(path), part)
                path = f"{path}.{part}"
            found.append(value)
    return found


def test_every_public_name_has_a_place_on_an_api_page():
    pages = shown()
    text = "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    missing = []
    for name, value in NAMES.items():
        there = f"::: {name}\n" in text if isinstance(value, int) else any(value is one for one in pages)
        if not there:
            missing.append(name)
    assert not missing, f"without a place in docs/api: {missing}"
    assert len({id(one) for one in pages}) >= len(pages) - 1  # two constants may be one number


def test_editors_and_the_api_pages_see_every_public_name():
    """They read the imports under TYPE_CHECKING, since the names are imported on first use."""
    block = (ROOT / "vbdl" / "__init__.py").read_text().split("if TYPE_CHECKING:\n")[1].split("\n\n")[0]
    assert sorted(re.findall(r" as (\w+)$", block, flags=re.MULTILINE)) == vbdl.__all__


def test_the_page_about_methods_has_every_method():
    text = (DOCS / "methods.md").read_text()
    assert [m.class_name for m in METHODS.values() if f"| `vbdl.{m.class_name}(" not in text] == []


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text().split("\nnav:\n")[1]
    listed = set(re.findall(r"(\S+\.md)$", navigation, flags=re.MULTILINE))
    there = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")} | {"changelog.md"}
    assert listed == there


def test_the_cheat_sheet_has_names_that_exist_and_fits_its_page():
    sheet = tool("cheatsheet")
    text = sheet.SOURCE.read_text()
    used = set(re.findall(r"\b(?:vbdl\.)?(?:\w+\.)?([A-Z][A-Za-z]+)\(", text))
    assert used <= {name.rpartition(".")[2] for name in NAMES}
    dotted = set(re.findall(r"(?<!\w)vbdl\.(\w+)", text)) - {"in"}
    assert {name for name in dotted if name.islower()} <= set(vbdl.__all__)
    columns = sheet.columns()
    assert len(columns) == sheet.COLUMNS
    lines = max(sum(len(section) + 0.9 for section in column) for column in columns)
    assert lines * sheet.STEP < sheet.HEIGHT - 0.9
    wide = (sheet.WIDTH - 2 * sheet.MARGIN) / sheet.COLUMNS * 72 / (sheet.SIZE * 0.602)
    assert max(len(line) for line in text.splitlines() if "  " not in line.strip()) <= wide


# -- figures on pages are those of committed results


def results(file: str) -> list[dict]:
    return [json.loads(line) for line in (ROOT / "benchmarks" / "results" / file).read_text().splitlines()]


def rows_of(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading."""
    text = (DOCS / page).read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_milliseconds_of_the_loop_page_are_measured():
    cells = {
        (r["network"], r["method"], r["contender"]): r.get("wall_ms")
        for r in results("networks-cpu.jsonl")
        if r["rows"] == 1
    }
    networks = {"textbook": "stochastic", "cnn-96": "dropout", "gru": "dropout"}
    keys = [*networks.items(), ("cnn-96", "ensemble"), ("resnet18-112", "ensemble")]
    lines = rows_of("loop.md", "How much faster")
    assert len(lines) == len(keys)
    for network, method in keys:
        loop = cells[network, method, "loop"]
        others = [cells.get((network, method, c)) for c in ("loop", "loop-compiled", "batch", "vmap")]
        numbers = [f"{v:.2g}" for v in (loop, min(v for v in others if v), cells[network, method, "vbdl"])]
        assert any([f"{float(c):.2g}" for c in line[1:]] == numbers for line in lines), (network, method, numbers)


def test_the_tables_of_real_networks_are_those_of_the_results():
    """docs/speed.md shows what `python benchmarks/networks.py --table` prints."""
    benchmark = ROOT / "benchmarks" / "networks.py"
    printed = subprocess.run([sys.executable, str(benchmark), "--table"], capture_output=True, text=True, check=True)
    section = (DOCS / "speed.md").read_text().split("\n## Networks as users have them\n")[1].split("\n## ")[0]
    lines = [
        line
        for line in printed.stdout.splitlines()
        if line.startswith(("| ", "* At ", "* First ", "* Memory ", "* Ready "))
    ]
    assert len(lines) > 50
    assert [line for line in lines if line not in section.splitlines()] == []


def test_the_speedups_of_the_comparison_are_measured():
    cells = {(r["workload"], r["batch"], r["contender"]): r["ratio"] for r in results("speed-cpu-avx512.jsonl")}
    lines = rows_of("comparison.md", "Speed")
    assert lines
    for name, rows, *values in lines:
        contenders = ("vbdl", "torch-uncertainty", "lightning-uq-box", "laplace-torch")
        for contender, value in zip(contenders, values, strict=True):
            measured = cells.get((name.split(":")[0], int(rows), contender))
            assert value == "-" if measured is None else float(value) == float(f"{measured:.2g}")


def test_the_demonstration_of_two_kinds_of_doubt_is_right():
    """The numbers in prose: a coin has ln 2 nats, ten equal classes ln 10."""
    from vbdl.ood import entropy

    torch.testing.assert_close(entropy(torch.full((1, 2), 0.5)).item(), 0.69, rtol=0.01, atol=0)
    torch.testing.assert_close(entropy(torch.full((1, 10), 0.1)).item(), 2.3, rtol=0.01, atol=0)
