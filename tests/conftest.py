"""Fixtures shared by all tests, and the table of the slowest of them."""

import ast
import collections
import logging
import os
import tomllib
from pathlib import Path

import pytest

# before torch is imported, and for processes that tests start: a graph here is one file of C++, and a pool of processes
# that could compile several at once takes seconds to start
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import torch  # noqa: E402

ROOT = Path(__file__).parents[1]

# tests compare numbers from the first call on, and leave nothing behind that compiles while others run; compiling in
# the background has tests of its own
os.environ["VBDL_COMPILE"] = "first"

# pytest listens to every logger that does not propagate, and for a listener torch writes down the stack of every step
# of its tracing: a tenth of the time of a test that traces
if "TORCH_TRACE" not in os.environ:
    logging.getLogger("torch.__trace").propagate = True
    logging.getLogger("torch.__trace").handlers.clear()


@pytest.fixture(autouse=True)
def _reproducible():
    """The same random numbers in every test, whichever ran before it, and no more threads than the small tests need."""
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _no_waiting_for_the_disk():
    """What is written need not outlive the machine: tests count calls of fsync, or make it fail, and wait for none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(autouse=True)
def _the_graph_if_timed(monkeypatch):
    """Where two ways to run are timed, the graph wins: tests compare bits of predictors, and a timing is no number."""
    monkeypatch.setattr("vbdl.engine.execution._CLEARLY", float("inf"))


@pytest.fixture(autouse=True)
def _no_memories(monkeypatch):
    """No test finds what another one, or another process, found out about the fastest way to run."""
    monkeypatch.setattr("vbdl.engine.remembered.load", lambda name: None)


@pytest.fixture
def traced_only(monkeypatch):
    """Compiled calls run as they were traced: for tests of what is traced and kept, not of Inductor's code."""
    for module in ("vbdl.engine.program", "vbdl.training.takeover"):
        monkeypatch.setattr(f"{module}.compile_graph", lambda graph, inputs, whole=False: graph)


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """The graphs that Inductor is asked for, with no call stored at first."""
    from vbdl.compiling import cache, compiler
    from vbdl.engine import background

    owner = torch.nn.Identity()  # anything that can be referred to weakly
    background.submit(owner, lambda _: None).result(300)  # what an earlier test left to be compiled ends before
    graphs = []
    original = compiler._from_cache
    monkeypatch.setattr(cache, "folder", lambda: str(tmp_path))
    monkeypatch.setattr(compiler, "_from_cache", lambda *args: graphs.append(args[0]) or original(*args))
    return graphs


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data sets: VBDL_DATA, or shared/data beside the checkout."""
    named = os.environ.get("VBDL_DATA")
    folder = Path(named) if named else Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no real data: set VBDL_DATA to the folder that holds cifar_probs and the others")
    return folder


@pytest.hookimpl(tryfirst=True)  # before what is slow is deselected
def pytest_collection_modifyitems(items):
    cases: collections.Counter[str] = collections.Counter()
    for item in items:
        where = item.get_closest_marker("slow_where")
        if where and "callspec" in vars(item) and where.kwargs["cell"](item.callspec.params):
            item.add_marker("slow")
        if not item.get_closest_marker("slow"):  # cases are counted among those that are not slow
            test = f"{item.path.relative_to(ROOT)}::{getattr(item, 'originalname', item.name)}"
            if not _by_default(test, cases[test]):
                item.add_marker("thorough")
            cases[test] += 1
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


THOROUGH = tomllib.loads((ROOT / "tests" / "thorough.toml").read_text())


def _by_default(test: str, number: int) -> bool:
    """Whether case `number` of a test, "tests/file.py::name", is in the default run."""
    few = (every for prefix, every in THOROUGH["one_in"].items() if test.startswith(prefix))
    return test not in THOROUGH["whole"] and all(number % every == 0 for every in few)


def pytest_addoption(parser):
    parser.addoption("--slowest", metavar="FILE", help="replace the table at the end of FILE by the slowest 20 tests")


def pytest_terminal_summary(terminalreporter, config):
    file = config.getoption("--slowest")
    if file is None:
        return
    seconds: collections.Counter[str] = collections.Counter()
    cases: dict[str, set[str]] = collections.defaultdict(set)
    for report in [r for reports in terminalreporter.stats.values() for r in reports if hasattr(r, "duration")]:
        test = report.nodeid.partition("[")[0]
        seconds[test] += report.duration
        cases[test].add(report.nodeid)
    rows = ["| seconds | cases | test | what it tests |", "| --- | --- | --- | --- |"]
    for test, total in seconds.most_common(20):
        rows.append(f"| {total:.0f} | {len(cases[test])} | `{test}` | {_purpose(test)} |")
    kept = Path(file).read_text().partition("| seconds |")[0]
    Path(file).write_text(kept + "\n".join(rows) + "\n")
    terminalreporter.write_line(f"the slowest 20 tests are in {file}")


def _purpose(test: str) -> str:
    """The first sentence of the test's docstring, or of its file's where its name says the rest."""
    file, name = test.split("::")[0], test.split("::")[-1]
    tree = ast.parse((ROOT / file).read_text())
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    text = (ast.get_docstring(functions[name]) if name in functions else None) or ast.get_docstring(tree) or ""
    return " ".join(text.split("\n\n")[0].split()).replace("|", "\\|")
