"""Two runs compared: the same is the same, worse is worse, and only by as much as can be told from chance."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from scipy import stats

from vbdl.cli import main
from vbdl.cli.compare import WORSE
from vbdl.report.comparison import compare_runs
from vbdl.report.run import StoredRun


def test_a_run_is_not_different_from_itself(stored, capsys):
    found = compare_runs(StoredRun.read(stored), StoredRun.read(stored))
    assert (
        not found.with_verdict("better")
        and not found.with_verdict("worse")
        and found.with_verdict("no difference found")
    )
    assert not found.only_before and not found.only_after
    assert main(["compare", str(stored), str(stored)]) == 0
    assert "0 scores better, 0 worse" in capsys.readouterr().out


def test_less_training_is_worse(stored, undertrained, capsys):
    found = compare_runs(StoredRun.read(stored), StoredRun.read(undertrained))
    worse = {(c.dataset, c.method, c.metric) for c in found.with_verdict("worse")}
    assert ("digits", "deep-ensemble", "nll") in worse and ("digits", "deep-ensemble", "accuracy") in worse
    assert not any(c.method == "linear" for c in found.with_verdict("worse")), "closed form: no epochs"
    with pytest.raises(SystemExit) as ended:
        main(["compare", str(stored), str(undertrained)])
    assert ended.value.code == WORSE
    said = capsys.readouterr().out
    assert "worse" in said and "359 rows" in said
    back = compare_runs(StoredRun.read(undertrained), StoredRun.read(stored))
    assert {(c.dataset, c.method, c.metric) for c in back.with_verdict("better")} == worse


def test_p_values_are_paired_and_adjusted_for_their_number(stored, undertrained):
    before, after = StoredRun.read(stored), StoredRun.read(undertrained)
    found = compare_runs(before, after)
    tested = [c for c in found.changes if c.verdict is not None]
    raw = []
    for c in tested:
        a, b = (next(r for r in run.of(c.dataset) if r["method"] == c.method) for run in (before, after))
        if c.over == "rows":
            name = {"accuracy": "loss", "nll": "nll"}[c.metric]
            x, y = (run.rows(r)[0][name][0].double().numpy() for run, r in ((before, a), (after, b)))
        else:
            x, y = (r["scores"][c.metric]["per_split"] for r in (a, b))
            if c.metric == "coverage90":
                x, y = ([abs(v - 0.9) for v in values] for values in (x, y))
        test = stats.ttest_rel(x, y)
        raw.append(1.0 if test.pvalue != test.pvalue else float(test.pvalue))
    order = sorted(range(len(raw)), key=raw.__getitem__)
    highest = 0.0
    for place, index in enumerate(order):
        highest = max(highest, min(1.0, raw[index] * (len(raw) - place)))
        assert tested[index].verdict.p_value == pytest.approx(highest, rel=1e-6)
    assert {c.over for c in tested} == {"rows", "splits"}


def test_runs_that_cannot_be_paired_are_refused(stored, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(stored, other)
    file = other / "rows" / "digits.linear.safetensors"
    with safe_open(file, framework="pt") as found:
        tensors, about = {n: found.get_tensor(n) for n in found.keys()}, found.metadata()  # noqa: SIM118
    tensors["label"] = tensors["label"].flip(1).contiguous()
    save_file(tensors, file, metadata=about)
    with pytest.raises(ValueError, match="digits with linear cannot be compared: the runs have different test rows"):
        compare_runs(StoredRun.read(stored), StoredRun.read(other))
    results = [json.loads(text) for text in (other / "results.jsonl").read_text().splitlines()]
    (other / "results.jsonl").write_text(json.dumps(results[0] | {"splits": 4}) + "\n")
    with pytest.raises(ValueError, match="5 splits"):
        compare_runs(StoredRun.read(stored), StoredRun.read(other))
    (other / "results.jsonl").write_text(json.dumps(results[0] | {"method": "mine"}) + "\n")
    assert main(["compare", str(stored), str(other)]) == 1
    assert "have no result of the same data set and method" in capsys.readouterr().err
    with pytest.raises(ValueError, match="alpha"):
        compare_runs(StoredRun.read(stored), StoredRun.read(stored), alpha=0.0)


def test_what_only_one_run_has_is_named(stored, tmp_path, capsys):
    part = tmp_path / "part"
    shutil.copytree(stored, part)
    lines = (part / "results.jsonl").read_text().splitlines()
    (part / "results.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    found = compare_runs(StoredRun.read(stored), StoredRun.read(part))
    assert found.only_before == [("digits", "linear")] and not found.only_after
    assert main(["compare", str(stored), str(part), "--all"]) == 0
    said = capsys.readouterr().out
    assert "digits with linear" in said and "not tested" in said and torch.__version__
