"""Every file, test, module and name that README, CONTRIBUTING, CHANGELOG and docs mention exists."""

import importlib
import re
import tomllib
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "kernels/README.md")
DOCUMENTS = [*(ROOT / name for name in NAMES), *sorted((ROOT / "docs").rglob("*.md"))]
# pages and files that the build of the site adds
BUILT = ("changelog.md", "assets/CITATION.cff", "assets/cheatsheet.pdf", "assets/cheatsheet.svg")
# pictures that the code of pages draws when the site is built
DRAWN = {name for page in DOCUMENTS for name in re.findall(r"""savefig\(["']([\w.-]+)["']""", page.read_text())}
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()

every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def resolve(dotted: str) -> None:
    """Import the module and read the attributes that a dotted name gives. Raises AttributeError if it has none."""
    value, path = importlib.import_module(dotted.split(".")[0]), dotted.split(".")[0]
    for part in dotted.split(".")[1:]:
        parent, path = path, f"{path}.{part}"
        try:
            value = getattr(value, part)
        except AttributeError:
            try:  # a module, or a name in a module that a function of the same name hides
                here = importlib.import_module(parent)
                value = getattr(here, part) if hasattr(here, part) else importlib.import_module(path)
            except ImportError as error:
                raise AttributeError(f"{dotted}: there is no {path}") from error


@every_document
def test_every_file_exists(document):
    text = document.read_text()
    files = re.findall(r"`((?:vbdl|tests|kernels|benchmarks|docs|\.github|\.ci)/[\w/.\-]*\w/?)(?:::\w+)?`", text)
    missing = [file for file in files if not (ROOT / file).exists()]
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link]
    made = {str(Path("../" * (len(document.relative_to(ROOT).parts) - 2)) / name) for name in BUILT}
    missing += [n for n in links if n not in made and Path(n).name not in DRAWN and not (document.parent / n).exists()]
    assert not missing, f"mentioned but missing: {sorted(set(missing))}"


@every_document
def test_every_test_exists(document):
    for file, name in re.findall(r"`(tests/[\w/.]+\.py)::(\w+)`", document.read_text()):
        assert f"def {name}(" in (ROOT / file).read_text(), f"{file} has no {name}"


@every_document
def test_every_name_of_vbdl_exists(document):
    names = set(re.findall(r"(?<![\w./\-])(vbdl(?:_kernels)?(?:\.[A-Za-z_]\w*)+)", document.read_text()))
    with warnings.catch_warnings():
        if document.name == "CHANGELOG.md":  # it lists former names, which warn
            warnings.simplefilter("ignore", DeprecationWarning)
        for dotted in sorted(names):
            resolve(dotted)


def test_the_layout_of_the_readme_is_that_of_the_tree():
    section = (ROOT / "README.md").read_text().split("\n## Layout\n")[1]
    folders = re.findall(r"(?<![\w.])([a-z]+)/(?=\s|:)", section)
    assert "vbdl" in folders and "engine" in folders
    missing = [name for name in folders if not (ROOT / name).is_dir() and not (ROOT / "vbdl" / name).is_dir()]
    assert not missing


def test_how_it_works_names_what_the_code_has():
    """Names there are of modules of the engine, and of classes that these modules import."""
    section = CONTRIBUTING.split("\n## How it works\n")[1].split("\n## ")[0]
    classes = {
        "Predictor": "engine.predictor",
        "Execution": "engine.execution",
        "Likelihood": "types",
        "Model": "model",
    }
    names = re.findall(r"`([a-zA-Z]\w*(?:\.\w+)+)(?:\(\w+\))?`", section)
    for name in (n for n in names if not n.endswith(".py")):
        first = name.split(".")[0]
        resolve(f"vbdl.{classes[first]}.{name}" if first in classes else f"vbdl.engine.{name}")
    diagram = re.findall(r"\b((?:calling|compiling|engine|model)[./][\w.]+)", section.split("The engine imports")[0])
    assert len(diagram) >= 7
    for name in diagram:
        resolve(f"vbdl.{name.replace('/', '.')}")


def test_the_layers_of_contributing_are_those_of_the_linter():
    section = CONTRIBUTING.split("\n## Import rules\n")[1].split("\n## ")[0]
    listed = [set(re.findall(r"`(\w+)`", line)) for line in re.findall(r"^\d+\. (.*)$", section, flags=re.MULTILINE)]
    rules = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (rule["layers"] for rule in rules if rule["name"] == "data flows one way")
    assert listed == [{module.strip().removeprefix("vbdl.") for module in layer.split("|")} for layer in layers]


def test_what_is_thorough_is_there():
    table = tomllib.loads((ROOT / "tests" / "thorough.toml").read_text())
    for name in [*table["one_in"], *table["whole"]]:
        file, _, test = name.partition("::")
        assert f"def {test}" in (ROOT / file).read_text() if test else (ROOT / file).is_file(), name
