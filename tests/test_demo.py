"""The main job: with a small budget in the default run, whole in the slow one."""

import dataclasses
import math
from io import StringIO

import pytest
import torch
from rich.console import Console

import vbdl
from vbdl.demo import compare
from vbdl.demo.data import TASKS, curve
from vbdl.demo.run import run
from vbdl.demo.training import DROPOUT, ENSEMBLE, MEAN_FIELD, METHODS, SINGLE, train
from vbdl.demo.tutorial import loop


def test_parts_of_a_task_do_not_overlap_and_are_standardized():
    for make in (*TASKS.values(), curve):
        task = make(0)
        rows = torch.cat([task.x[name].flatten(1) for name in ("train", "validation", "test")])
        # 569, 1797, 442 and 160 rows; the data sets themselves have few equal rows
        assert len(torch.unique(rows, dim=0)) > 0.99 * len(rows)
        assert len(rows) == sum(len(y) for y in task.y.values())
        assert task.x["ood"].shape[1:] == task.x["test"].shape[1:]
    x = TASKS["breast cancer"](0).x["train"]
    torch.testing.assert_close(x.mean(0), torch.zeros(30), rtol=0, atol=1e-4)
    torch.testing.assert_close(x.std(0), torch.ones(30), rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The pipeline on two data sets with a twentieth of the training, uncompiled."""
    out, said = tmp_path_factory.mktemp("demo"), StringIO()
    torch.set_num_threads(1)
    found = run(
        out, tasks=("breast cancer", "diabetes"), effort=0.05, timed=False, console=Console(file=said, width=80)
    )
    return out, said.getvalue(), found


def test_the_pipeline_scores_every_method(small):
    _, _, found = small
    assert [r.trained.method for r in found] == [SINGLE, *METHODS, SINGLE, *METHODS]
    for r in found:
        assert all(math.isfinite(v) for v in r.scores.values()), r.scores
        for where in ("test", "ood"):
            parts = r.scores[f"{where}_aleatoric"] + r.scores[f"{where}_epistemic"]
            assert r.scores[f"{where}_total"] == pytest.approx(parts, rel=1e-4, abs=1e-5)
        if r.trained.method == SINGLE:
            assert r.scores["test_epistemic"] == pytest.approx(0, abs=1e-6)
        else:
            assert r.scores["ood_epistemic"] > r.scores["test_epistemic"] > 0


def test_the_pipeline_prints_tables_that_fit_a_terminal(small):
    _, said, found = small
    assert all(len(line) <= 80 for line in said.splitlines() if "figures (PNG" not in line)  # that one has a path
    for word in ("breast cancer", "diabetes", SINGLE, *METHODS, "nats", "squared target units", "AUROC"):
        assert word in " ".join(said.split())
    assert "…" not in said, "a column was cut"
    assert f"{found[0].scores['accuracy']:.1%}" in said


def test_the_pipeline_saves_figures_and_models(small):
    out, _, _ = small
    names = {p.stem for p in out.glob("*.png")}
    assert names == {"bands", "uncertainty-breast-cancer", "reliability-breast-cancer", "uncertainty-diabetes"}
    assert names == {p.stem for p in out.glob("*.svg")}
    assert all(p.stat().st_size > 10_000 for p in out.glob("*.png"))
    assert len(list((out / "models").glob("*/manifest.json"))) == 6


def test_a_saved_model_predicts_the_same_bit_for_bit(small):
    out, _, found = small
    for r in found:
        if r.trained.method == SINGLE:
            continue
        name = f"{r.trained.task.name}-{r.trained.method}".replace(" ", "-").lower()
        loaded = vbdl.load(out / "models" / name, compile=False)
        p = loaded(r.trained.task.x["test"])
        for part in ("mean", "total", "epistemic"):
            assert torch.equal(getattr(p, part), getattr(r.test, part)), f"{name}: {part}"


def test_the_single_network_is_the_first_member(small):
    _, _, found = small
    alone, ensemble = found[0], found[3]
    assert ensemble.trained.method == ENSEMBLE
    torch.testing.assert_close(alone.test.samples[0], ensemble.test.samples[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_the_tutorial_loop_says_the_same(small, method):
    _, _, found = small
    trained = next(r.trained for r in found if r.trained.method == method)
    agreement = compare.disagreement(trained, trained.task.x["test"][:16])
    assert agreement < (1e-5 if method == ENSEMBLE else 2.5)


@pytest.mark.parametrize("method", [DROPOUT, MEAN_FIELD])
def test_a_loop_that_says_something_else_is_not_timed(small, method, monkeypatch):
    _, _, found = small
    trained = next(r.trained for r in found if r.trained.method == method)
    honest = loop(trained)
    monkeypatch.setattr(compare, "loop", lambda _: lambda x, n: honest(x, n) + 0.2)
    with pytest.raises(RuntimeError, match="the draws of the tutorial loop and of vbdl differ"):
        compare.disagreement(trained, trained.task.x["test"][:16])


def test_speed_compares_what_was_compared(monkeypatch):
    monkeypatch.setattr("vbdl.engine.program.compile_graph", lambda graph, inputs: graph)
    trained = train(TASKS["diabetes"](0), ENSEMBLE, effort=0.02)
    speed = compare.speed(trained, compare.predictor(trained, compile=False), seconds=0.05)
    assert speed.loop > 0 and speed.vbdl > 0 and speed.compile_seconds > 0 and speed.agreement < 1e-5


def test_the_task_is_checked():
    with pytest.raises(ValueError, match="breast cancer"):
        run(None, tasks=("mnist",))  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        TASKS["diabetes"](0).name = "other"  # type: ignore[misc]


@pytest.mark.slow
def test_the_whole_demo(tmp_path):
    """What the README shows: every method at least as good as the single network in likelihood, or nearly."""
    found = run(tmp_path)
    assert {p.stem for p in tmp_path.glob("*.png")} >= {"bands", "rotation", "reliability-digits"}
    for r in found:
        alone = next(o for o in found if o.trained.task is r.trained.task and o.trained.method == SINGLE)
        assert r.scores["nll"] < alone.scores["nll"] + 0.05
        if r.trained.method != SINGLE:
            assert r.speed is not None and r.speed.vbdl > r.speed.loop
            assert r.scores["auroc"] > 0.75
