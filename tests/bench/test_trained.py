"""Methods that start from a trained network share it, and only those that calibrate see the held-out rows."""

import dataclasses

import pytest
import torch

from vbdl.bench import registry
from vbdl.bench.methods.shared import trained_networks
from vbdl.bench.runner import Suite, SuiteSettings
from vbdl.bench.sizes import resized
from vbdl.bench.source import Source
from vbdl.bench.task import Each, Run, Stacked, Task
from vbdl.report import trained
from vbdl.report.page import render
from vbdl.report.run import StoredRun

METHODS = ("deterministic", "temperature", "laplace", "laplace-validation", "swag", "deep-ensemble")


def task_of(name: str, **sizes) -> Task:
    registry.load_builtin()
    return resized(registry.DATASETS[name].make(Source(), ""), **sizes)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """The folder of a run of all methods on classes, and of three on numbers."""
    registry.load_builtin()
    out = tmp_path_factory.mktemp("trained")
    torch.set_num_threads(1)
    settings = SuiteSettings(effort=0.2, n_samples=4, splits=2, hold_out=0.2)
    for name, methods in (("iris", METHODS), ("diabetes", METHODS[:3])):
        Suite(out, (name,), methods, Source(), settings, lambda text: None, False, compile=False).run()
    return out


def test_all_start_from_one_network(stored):
    run = StoredRun.read(stored)
    assert not run.failed
    for name in ("iris", "diabetes"):
        by_method = {r["method"]: r for r in run.of(name)}
        shared = [by_method[m].get("network_seconds", 0.0) for m in METHODS[:-1] if m in by_method]
        assert len(set(shared)) == 1 and shared[0] > 0, "the same training, which the later ones have read"
        assert by_method["deterministic"]["rows"]["held"] > 0
    assert run.of("iris")[-1].get("network_seconds") == 0
    iris = {r["method"]: r["scores"] for r in run.of("iris")}
    assert iris["temperature"]["accuracy"]["per_split"] == iris["deterministic"]["accuracy"]["per_split"]
    assert iris["temperature"]["nll"]["per_split"] != iris["deterministic"]["nll"]["per_split"]
    diabetes = {r["method"]: r["scores"] for r in run.of("diabetes")}
    assert diabetes["temperature"]["rmse"]["per_split"] == pytest.approx(
        diabetes["deterministic"]["rmse"]["per_split"], rel=1e-6
    )


def test_one_table_compares_them(stored):
    run = StoredRun.read(stored)
    found = trained.lines(run)
    assert [(one.dataset, one.method) for one in found] == [
        *(("iris", m) for m in METHODS),
        *(("diabetes", m) for m in METHODS[:3]),
    ]
    for one in found:
        assert all(score is not None for score in one.scores) and one.ood[0] is not None
        assert (one.ood[1] is None) == (one.method in ("deterministic", "temperature"))
    page = render(run)
    assert "Methods on one trained network" in page
    assert trained.markdown(run).count("\n") == len(found) + 1


def test_the_network_of_a_split_is_that_of_the_stack(tmp_path):
    task = task_of("iris", splits=3)
    run = Run(effort=0.05, compile=False, progress=False, networks=tmp_path / "iris.safetensors")
    first, again = trained_networks(task, run), trained_networks(task, run)
    x = task.x[0, :5]
    outputs = [t.network(x) for t in first]
    for one, other in zip(outputs, again, strict=True):
        assert torch.equal(one, other.network(x))
    assert not torch.equal(outputs[0], outputs[1])
    assert run.waited < run.network_seconds, "trained once, read once"


def test_held_out_rows_are_for_calibration_only():
    task = task_of("iris", splits=2, hold_out=0.2)
    first = task.n_train + task.n_held
    changed = task.y.clone()
    changed[:, task.n_train : first : 4] = (changed[:, task.n_train : first : 4] + 1) % 3
    other = dataclasses.replace(task, y=changed)
    run = lambda: Run(effort=0.05, n_samples=4, compile=False, progress=False)

    def outputs(of: Task, name: str) -> torch.Tensor:
        made = registry.METHODS[name].make(of, run())
        assert isinstance(made, Stacked | Each)
        return torch.cat(list(made.parameters(task.test[0])))

    for name in ("laplace", "swag", "deep-ensemble"):
        assert torch.equal(outputs(task, name), outputs(other, name)), name
    assert not torch.equal(outputs(task, "temperature"), outputs(other, "temperature"))


def test_sizes():
    whole = task_of("digits")
    task = resized(whole, rows=100, splits=3, hold_out=0.1)
    assert (task.n_splits, task.n_train, task.n_held, task.n_test) == (3, 90, 10, 100)
    assert torch.equal(task.x[2, :100], whole.x[0, :100])
    assert {int(k) for k in task.test[1][0]} == set(range(10)), "test rows are spaced, whatever their order"
    assert all(rows.shape[:2] == (3, 100) for rows in task.ood.values())
    assert resized(whole) is whole
    fewer = resized(task_of("diabetes"), splits=2)
    assert fewer.n_splits == 2 and len(fewer.scale) == len(fewer.center) == 2


def test_repeated_splits_have_their_own_initialization():
    task = task_of("digits", rows=60, splits=2)
    for name in ("deterministic", "snapshots", "mc-dropout"):
        made = registry.METHODS[name].make(task, Run(effort=0.02, n_samples=4, compile=False, progress=False))
        assert isinstance(made, Stacked | Each)
        outputs = torch.cat(list(made.parameters(task.test[0])))
        assert not torch.equal(outputs[:, 0], outputs[:, 1]), name


@pytest.mark.parametrize("wrong", [{"hold_out": 1.0}, {"rows": 0}, {"splits": 0}], ids=str)
def test_wrong_sizes_are_refused(wrong, tmp_path):
    with pytest.raises(ValueError, match="hold_out must be|rows and splits must be"):
        Suite(tmp_path, ("iris",), ("linear",), Source(), SuiteSettings(**wrong))


def test_a_method_that_calibrates_asks_for_rows(tmp_path):
    registry.load_builtin()
    with pytest.raises(ValueError, match="--hold-out 0.1"):
        Suite(tmp_path, ("iris",), ("temperature",), Source(), SuiteSettings())


def test_augmentation_is_for_images():
    run = Run(effort=0.02, n_samples=4, compile=False, progress=False)
    with pytest.raises(ValueError, match="tta shifts images"):
        registry.METHODS["tta"].make(task_of("iris", splits=1), run)
    images = task_of("digits", rows=60, splits=1)
    (predictor,) = registry.METHODS["tta"].make(images, run).predictors
    p = predictor(images.test[0][0, :5])
    assert p.n_samples == 4 and float(p.epistemic.max()) > 0
