"""Names of version 0.1 still work, with a warning that says the new one."""

import importlib
import subprocess
import sys
from functools import partial

import pytest
from torch import nn

import vbdl
from vbdl import former
from vbdl.bench.runner import SuiteSettings
from vbdl.bench.task import Run, Stacked
from vbdl.cli import COMMANDS
from vbdl.cli.config import configured
from vbdl.tabular import TableOptions

NAMES = [
    ("vbdl.artifact", "ArtefactError", "ArtifactError"),
    ("vbdl.artifact.manifest", "Settings", "StoredSettings"),
    ("vbdl.batch.options", "Options", "JobOptions"),
    ("vbdl.batch.report", "Report", "JobReport"),
    ("vbdl.batch.worker", "Result", "ChunkResult"),
    ("vbdl.bench.runner", "Settings", "SuiteSettings"),
    ("vbdl.bench.summary", "Rows", "EvaluatedRows"),
    ("vbdl.calibration", "NormalisedIntervals", "NormalizedIntervals"),
    ("vbdl.data.rows", "Rows", "MemberRows"),
    ("vbdl.decision", "realised_cost", "realized_cost"),
    ("vbdl.demo.compare", "Result", "Evaluated"),
    ("vbdl.inspection", "Report", "ModuleReport"),
    ("vbdl.report.figures", "Rows", "MethodRows"),
    ("vbdl.tabular", "Settings", "TableOptions"),
    ("vbdl_kernels", "local_reparameterised_linear", "local_reparameterized_linear"),
]


@pytest.mark.parametrize(("module", "old", "new"), NAMES)
def test_a_former_name_is_the_same_thing(module, old, new):
    home = importlib.import_module(module)
    with pytest.warns(DeprecationWarning, match=f"{new} now"):
        assert getattr(home, old) is getattr(home, new)
    with pytest.raises(AttributeError, match=f"{old}s"):
        getattr(home, f"{old}s")


def test_the_predictor_can_be_imported_from_the_engine():
    with pytest.warns(DeprecationWarning, match="vbdl.engine.predictor.Predictor now"):
        from vbdl.engine import Predictor
    assert Predictor is vbdl.Predictor


@pytest.mark.parametrize("old", sorted(former.MODULES))
def test_a_former_module_is_the_same_module(old, monkeypatch):
    monkeypatch.delitem(sys.modules, f"vbdl.{old}", raising=False)
    today = importlib.import_module(f"vbdl.{former.MODULES[old]}")
    spec = today.__spec__
    with pytest.warns(DeprecationWarning, match=f"vbdl.{former.MODULES[old]} now"):
        assert importlib.import_module(f"vbdl.{old}") is today
    assert today.__spec__ is spec and today.__name__ == f"vbdl.{former.MODULES[old]}"


def test_modules_inside_a_former_package_are_those_of_today():
    code = """
import warnings
warnings.simplefilter("ignore", DeprecationWarning)
from vbdl.artefact.manifest import Manifest
from vbdl.rewrite.linear import lower
from vbdl.adaptive import LabelDecided
import vbdl.artefact.loading
import vbdl
assert Manifest.__module__ == "vbdl.artifact.manifest" and vbdl.adaptive.LabelDecided is LabelDecided
assert vbdl.artefact.loading.load is vbdl.load
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["vbdl.nothing", "vbdl.artefact.nothing"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_never_was_is_not_found(name):
    with pytest.raises(ModuleNotFoundError, match="nothing"):
        importlib.import_module(name)


def test_the_rules_of_adaptive_draws_are_at_hand_without_a_warning():
    assert vbdl.adaptive.LabelDecided(0.9).confidence == 0.9


PRIORS = {
    "MeanField": lambda **prior: vbdl.MeanField(nn.Linear(3, 1), 10, **prior).module,
    "BayesianLinear": lambda **prior: vbdl.BayesianLinear(3, 1, **prior),
    "BayesianConv1d": lambda **prior: vbdl.BayesianConv1d(3, 1, 2, **prior),
    "BayesianConv2d": lambda **prior: vbdl.BayesianConv2d(3, 1, 2, **prior),
    "BayesianConv3d": lambda **prior: vbdl.BayesianConv3d(3, 1, 2, **prior),
}


@pytest.mark.parametrize("name", PRIORS)
def test_a_prior_is_taken_by_its_former_name(name):
    make = PRIORS[name]
    with pytest.warns(DeprecationWarning, match=f"prior_std= of {name} is called prior= now") as warned:
        old = make(prior_std=0.25)
    assert warned[0].filename == __file__
    assert float(old.prior_0) == float(make(prior=0.25).prior_0) == 0.25
    with pytest.raises(TypeError, match="which are one argument"):
        make(prior_std=0.25, prior=0.5)


COUNTS = [
    (TableOptions, "members", "n_members"),
    (TableOptions, "draws", "n_samples"),
    (SuiteSettings, "samples", "n_samples"),
    (Run, "samples", "n_samples"),
    (partial(Stacked, None, None), "samples", "n_samples"),
]


@pytest.mark.parametrize(("make", "old", "new"), COUNTS)
def test_a_count_is_taken_and_read_by_its_former_name(make, old, new):
    with pytest.warns(DeprecationWarning, match=f"{old}= .*{new}= now"):
        counted = make(**{old: 3})
    assert getattr(counted, new) == 3
    with pytest.warns(DeprecationWarning, match=f"{old} is called {new} now"):
        assert getattr(counted, old) == 3


def test_an_option_is_taken_by_its_former_name_on_the_command_line_and_in_a_file(tmp_path, capsys):
    for given in (["--draws", "3"], ["--draws=3"]):
        arguments, defaults = configured(["fit", "t.csv", *given], COMMANDS)
        assert arguments == ["fit", "t.csv", *[g.replace("draws", "samples") for g in given]] and not defaults
        assert capsys.readouterr().err == "vbdl: --draws is called --samples now\n"
    (tmp_path / "fit.toml").write_text("draws = 3")
    _, defaults = configured(["fit", "t.csv", "--config", str(tmp_path / "fit.toml")], COMMANDS)
    assert defaults["default"].samples == 3
    assert capsys.readouterr().err == "vbdl: draws is called samples now\n"
    arguments, _ = configured(["bench", "--draws", "3"], COMMANDS)  # which never had it
    assert arguments == ["bench", "--draws", "3"]
