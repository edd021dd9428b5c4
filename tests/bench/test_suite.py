"""The suite as its users meet it: runs, resumes, registers, and says what is missing."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import vbdl
from vbdl.bench import registry
from vbdl.bench.runner import Suite, SuiteSettings
from vbdl.bench.source import DataMissingError, Source
from vbdl.bench.task import Each, Run
from vbdl.cli import main
from vbdl.report.run import read_results

ROOT = Path(__file__).parents[2]
TIMES = (
    "seconds", "network_seconds", "processor_seconds", "resumed", "rows_a_second", "warm_rows_a_second", "finished",
    "file",
)  # fmt: skip


def suite(out, sets=("iris", "diabetes"), methods=("mc-dropout", "deep-ensemble"), source=None, **settings) -> Suite:
    settings = {"effort": 0.02, "n_samples": 8} | settings
    said: list[str] = []
    made = Suite(out, sets, methods, source or Source(), SuiteSettings(**settings), said.append, False, compile=False)
    made.said = said  # type: ignore[attr-defined]
    return made


def numbers(result):
    return {k: v for k, v in result.items() if k not in TIMES}


# classes and numbers; images are trained by the same lines
@pytest.mark.parametrize("sets", [("iris", "diabetes"), pytest.param(("digits",), marks=pytest.mark.slow)], ids=str)
def test_the_same_seed_gives_the_same_numbers(sets, tmp_path):
    methods = ("mc-dropout", "mean-field", "deep-ensemble", "single", "linear")
    first = suite(tmp_path / "a", sets, methods).run()
    torch.manual_seed(99)  # whatever else the process has drawn
    second = suite(tmp_path / "b", sets, methods).run()
    assert [numbers(r) for r in first] == [numbers(r) for r in second]
    assert len(first) == 5 * len(sets) and not any("error" in r for r in first)
    for r in first:
        assert set(r["versions"]) >= {"vbdl", "torch", "numpy"} and r["machine"]["threads"] == 1
        assert r["processor_seconds"] > 0 and r["resumed"] is False
        assert r["seed"] == 0 and "commit" in r and r["draws"] in (1, 5, 8)
    other = suite(tmp_path / "c", sets[:1], ("mc-dropout",), seed=1).run()
    assert other[0]["scores"] != first[0]["scores"]


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    whole = suite(tmp_path / "whole").run()
    calls = []
    honest = registry.METHODS["deep-ensemble"].make

    def interrupted(task, run):
        calls.append(task.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return honest(task, run)

    monkeypatch.setitem(registry.METHODS, "deep-ensemble", registry.Entry("deep-ensemble", interrupted))
    with pytest.raises(KeyboardInterrupt):
        suite(tmp_path / "cut").run()
    assert len(read_results(tmp_path / "cut")) == 3
    with (tmp_path / "cut" / "results.jsonl").open("a") as file:
        file.write('{"format": 1, "dataset": "diab')  # the process was killed while it wrote
    went_on = suite(tmp_path / "cut")
    found = went_on.run()
    assert calls == ["iris", "diabetes", "diabetes"], "only what was missing was trained again"
    assert [numbers(r) for r in found] == [numbers(r) for r in whole]
    assert "already has 3 results; 1 to go" in went_on.said[0]  # type: ignore[attr-defined]
    assert len(read_results(tmp_path / "cut")) == 4
    assert suite(tmp_path / "cut").run() == found and len(calls) == 3


def test_other_settings_do_not_mix_into_a_run(tmp_path):
    suite(tmp_path, ("iris",), ("linear",)).run()
    with pytest.raises(ValueError, match="seed 0"):
        suite(tmp_path, ("iris",), ("linear",), seed=1).run()


@pytest.mark.parametrize("kind", [FloatingPointError, ValueError, KeyError])
def test_a_failure_is_recorded_and_tried_again(kind, tmp_path, monkeypatch):
    def fails(task, run):
        raise kind("the loss became nan")

    monkeypatch.setitem(registry.METHODS, "fails", registry.Entry("fails", fails))
    found = suite(tmp_path, ("iris",), ("fails", "linear")).run()
    assert "the loss became nan" in found[0]["error"] and "scores" in found[1]
    monkeypatch.setitem(registry.METHODS, "fails", registry.METHODS["linear"])
    assert "scores" in suite(tmp_path, ("iris",), ("fails", "linear")).run()[0]


def test_the_file_of_contributing_runs(tmp_path, capsys):
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (code,) = re.findall(r'```python\n("""moons.py:.*?)```', text, flags=re.DOTALL)
    (tmp_path / "moons.py").write_text(code)
    arguments = ["--sets", "moons", "--methods", "small-dropout", "deep-ensemble", "--effort", "0.1"]
    out = tmp_path / "run"
    assert main(["bench", "--plugin", str(tmp_path / "moons.py"), "--out", str(out), *arguments]) == 0
    found = read_results(out)
    assert [(r["dataset"], r["method"], r["draws"]) for r in found] == [
        ("moons", "small-dropout", 50),
        ("moons", "deep-ensemble", 5),
    ]
    assert found[0]["scores"]["accuracy"]["value"] > 0.5 and "results in" in capsys.readouterr().out


def test_names_are_checked(tmp_path):
    with pytest.raises(ValueError, match="file name"):
        registry.method("a/b")
    with pytest.raises(ValueError, match="already registered a data set"):
        registry.dataset("iris")(lambda source, protocol: None)
    with pytest.raises(ValueError, match="no data set 'moons'"):
        suite(tmp_path, ("moons",))
    with pytest.raises(ValueError, match="no method 'hmc'"):
        suite(tmp_path, methods=("hmc",))
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match="registered nothing"):
        registry.load_plugin(tmp_path / "empty.py")
    with pytest.raises(FileNotFoundError, match="plugin file .* does not exist"):
        registry.load_plugin(tmp_path / "none.py")


def test_the_wrong_number_of_predictors_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setitem(registry.METHODS, "short", registry.Entry("short", lambda task, run: []))
    (result,) = suite(tmp_path, ("iris",), ("short",)).run()
    assert result["error"].startswith("the method returned 0 predictors for 5 splits")
    assert isinstance(Each([]), Each)


# -- data


def test_missing_data_are_named_before_anything_is_trained(tmp_path, monkeypatch):
    def refused(**options):
        raise OSError("<urlopen error no network>")

    monkeypatch.setattr("sklearn.datasets.fetch_openml", refused)
    for sets, said in ((("iris", "boston"), "OpenML did not answer"), (("iris", "yacht"), "to find .*yacht.npz in")):
        with pytest.raises(DataMissingError, match=said) as raised:
            suite(tmp_path / sets[1], sets, ("linear",)).run()
        assert "--data" in str(raised.value) and "bundled" in str(raised.value)
        assert read_results(tmp_path / sets[1]) == []
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Source(tmp_path / "nowhere")


def test_an_error_is_one_line_for_the_user(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("VBDL_DATA", raising=False)
    assert main(["bench", "--sets", "gtsrb", "--no-network", "--out", str(tmp_path / "a")]) == 1
    said = capsys.readouterr().err
    assert len(said.strip().splitlines()) == 1 and "gtsrb_small.npz" in said
    for arguments in (["--suite", "mnist"], ["--protocol", "2017"], ["--threads", "-1"], ["--effort", "0"]):
        assert main(["bench", "--out", str(tmp_path / "b"), *arguments]) == 1
    assert main(["bench", "--list"]) == 0
    listed = capsys.readouterr().out
    for name in ("boston", "fashion-mnist", "german-credit", "mc-dropout", "linear"):
        assert re.search(rf"^  {name} ", listed, flags=re.MULTILINE), name


def test_another_file_of_the_name_is_refused(tmp_path):
    np.savez(tmp_path / "boston.npz", X=np.zeros((506, 13)))
    with pytest.raises(ValueError, match="SHA-256"):
        Source(tmp_path).arrays("uci_regression/boston.npz")
    np.savez(tmp_path / "mine.npz", X=np.arange(3))
    found = Source(tmp_path).arrays("folder/mine.npz")
    assert found is not None and found["X"].tolist() == [0, 1, 2]


def test_openml_stands_in_for_the_folder(monkeypatch, data_dir):
    with np.load(data_dir / "uci_regression" / "boston.npz") as stored:
        x, y = stored["X"], stored["y"]

    class Found:
        data, target = x, [str(v) for v in y]

    asked = []
    monkeypatch.setattr("sklearn.datasets.fetch_openml", lambda **o: asked.append(o["name"]) or Found)
    fetched = registry.DATASETS["boston"].make(Source(), "2016")
    stored = registry.DATASETS["boston"].make(Source(data_dir), "2016")
    assert asked == ["boston"] and torch.equal(fetched.x, stored.x) and torch.equal(fetched.y, stored.y)
    assert any("OpenML" in note for note in fetched.notes) and not stored.notes
    assert fetched.published[2].per_split == () and len(stored.published[2].per_split) == 20
    Found.data = x[:, :12]
    with pytest.raises(DataMissingError, match=r"\(506, 12\)"):
        registry.DATASETS["boston"].make(Source(), "2016")


def test_checksums_hold_for_every_file(data_dir):
    """Whatever a suite reads of the folder passes its checksum, and gives a whole task."""
    for entry in registry.DATASETS.values():
        if entry.suite == "bundled" or entry.name in ("fashion-mnist", "protein", "naval"):
            continue
        task = entry.make(Source(data_dir, network=False), "2018")
        assert task.name == entry.name and entry.about
        for k in (0, task.n_splits - 1):
            if task.image is None:
                train = task.x[k, : task.n_train]
                torch.testing.assert_close(train.mean(0), torch.zeros_like(train[0]), rtol=0, atol=2e-4)


def test_tracks_of_traffic_signs_stay_whole(data_dir):
    task = registry.DATASETS["gtsrb"].make(Source(data_dir, network=False), "")
    with np.load(data_dir / "gtsrb_small" / "gtsrb_small.npz") as stored:
        x, track = stored["x_train"], stored["track_train"]
    by_image = {image.tobytes(): t for image, t in zip(x, track, strict=True)}
    pixels = (task.x[0, : task.n_train] * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
    tracks = np.array([by_image[image.tobytes()] for image in pixels])
    changes = int((tracks[1:] != tracks[:-1]).sum()) + 1
    assert changes == len(set(tracks.tolist())), "rows of a track follow each other"
    assert len(task.classes) == 35 and int(task.y.max()) == 34
    assert task.ood["unknown signs"].shape[1] + task.x.shape[1] - task.n_train == 5001


# -- protocols


@pytest.fixture(scope="module")
def uci(data_dir):
    return Source(data_dir, network=False)


def test_splits_are_the_published_ones(uci):
    from vbdl.bench.datasets.splits import standard_splits
    from vbdl.bench.protocols import SETS

    for name, of in SETS.items():
        found = uci.arrays(f"uci_regression/{name}.npz")
        x = found["X"]
        assert (of.rows, of.features) == x.shape and of.splits == len(found["perm"])
        assert int(found["n_train"]) == round(0.9 * of.rows)
        assert of.hidden == int(found["n_hidden"]) and of.epochs == int(found["n_epochs"])
        assert list(of.taus) == pytest.approx(found["tau_grid"].tolist())
        count = min(2, of.splits)  # the whole of the large ones takes a while
        assert np.array_equal(standard_splits(of.rows, count), found["perm"][:count])


@pytest.mark.parametrize("name", ["boston", "concrete", "energy", "wine", "yacht"])
def test_the_linear_baseline_is_the_published_one_split_by_split(name, uci, tmp_path):
    """Data, splits, standardization, units and scores at once: someone else's code gave these figures."""
    stored = json.loads(uci.find("uci_regression/linear_baseline_computed_here.json").read_text())["rows"][name]
    (found,) = suite(tmp_path, (name,), ("linear",), source=uci).run()
    assert found["scores"]["rmse"]["per_split"] == pytest.approx(stored["rmse_per_split"], rel=1e-5)
    assert found["scores"]["ll"]["per_split"] == pytest.approx(stored["ll_per_split"], abs=1e-5)
    assert found["scores"]["rmse"]["standard_error"] == pytest.approx(stored["rmse"][1], rel=0.03)  # 1/sqrt(S-1)


def test_published_columns_are_the_stored_tables(uci):
    tables = Path(uci.folder) / "published_tables"
    gal = json.loads((tables / "uci_gal2016_mc_dropout.json").read_text())
    ensembles = json.loads((tables / "uci_deep_ensembles2017.json").read_text())["table1"]
    dun = json.loads((tables / "uci_dun2020.json").read_text())["standard"]
    from vbdl.bench.protocols import SETS, published

    for name in SETS:
        found = {(p.column, p.metric): p.mean for p in published(name, "2016", {})}
        for metric in ("rmse", "ll"):
            assert found["MC dropout 2016", metric] == gal["table1"][name][metric]["Dropout"][0]
            assert found["MC dropout 2018", metric] == gal["readme2018"][name][metric]["grid search (new)"][0]
            assert found["MFVI (DUN 2020)", metric] == dun[metric.upper()][name]["MFVI"][0]
        assert found["Deep Ensembles 2017", "rmse"] == ensembles[name]["rmse"]["Deep Ensembles"][0]
        assert found["Deep Ensembles 2017", "ll"] == -ensembles[name]["nll"]["Deep Ensembles"][0]


def test_dropout_searches_rates_and_precisions_on_training_rows(uci):
    trained, runs = [], []
    for poison in (False, True):
        task = registry.DATASETS["yacht"].make(uci, "2016")
        assert (task.protocol.epochs, task.protocol.batch_size) == (400, 32)
        if poison:
            task.x[:, task.n_train :], task.y[:, task.n_train :] = 50.0, -50.0
        runs.append(Run(effort=0.005, n_samples=4, compile=False))
        trained.append(registry.METHODS["mc-dropout"].make(task, runs[-1]))
    x = task.x[:, :10]
    found, poisoned = (torch.cat(list(t.parameters(x))) for t in trained)
    assert found.shape == (4, 20, 10, 1, 2) and torch.equal(found, poisoned)
    details = runs[0].details
    assert details == runs[1].details
    assert set(details["rate"]) <= {0.005, 0.05} and set(details["tau"]) <= {0.25, 0.5, 0.75}
    noise = (0.5 * found[0, :, 0, 0, 1]).exp() * torch.tensor(task.scale)
    torch.testing.assert_close(noise, torch.tensor(details["tau"]) ** -0.5, rtol=1e-4, atol=1e-4)


def test_a_stacked_rate_drops_at_each_members_rate():
    from vbdl.bench.methods.mc_dropout import _StackedRate, _with_stacked_rates

    rates, n = torch.tensor([0.0, 0.05, 0.5]), 40_000
    module = _StackedRate()
    run = lambda rate: torch.func.functional_call(module, {"rate": rate}, (torch.ones(n),))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dropped = torch.func.vmap(run, randomness="different")(rates)
    for values, rate in zip(dropped, rates.tolist(), strict=True):
        torch.testing.assert_close(values[values != 0], torch.full_like(values[values != 0], 1 / (1 - rate)))
        assert abs(float((values == 0).float().mean()) - rate) < 4 * (rate * (1 - rate) / n) ** 0.5 + 1e-9
    network = _with_stacked_rates(registry.DATASETS["diabetes"].make(Source(), "").network(0.5, 1))
    assert sum(isinstance(m, _StackedRate) for m in network.modules()) == 2, "every dropout, one of its own each"
    assert not any(isinstance(m, torch.nn.Dropout) for m in network.modules())


@pytest.mark.slow
def test_dropout_trains_to_the_same_numbers_compiled(uci):
    task = registry.DATASETS["yacht"].make(uci, "2016")
    found = []
    for compile in (False, True):
        trained = registry.METHODS["mc-dropout"].make(task, Run(effort=0.005, n_samples=4, compile=compile))
        found.append(torch.cat(list(trained.parameters(task.x[:, :10]))))
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-3)


def test_decay_is_the_protocols():
    from vbdl.bench.methods.mc_dropout import decay

    assert decay(0.05, 455, 0.1) == pytest.approx(1e-4 * 0.95 / (2 * 455 * 0.1))


def test_a_task_is_checked():
    x, y = torch.zeros(2, 5, 3), torch.zeros(2, 5, 1)
    make = lambda **o: vbdl.bench.Task(**{"name": "t", "x": x, "y": y, "n_train": 3, "network": None, **o})
    for options, said in (
        ({"y": y[:1]}, "must have the same splits and rows"),
        ({"n_train": 5}, "n_train"),
        ({}, "target scale"),
        ({"x": x.double(), "scale": (1.0, 1.0)}, "float32"),
    ):
        with pytest.raises(ValueError, match=said):
            make(**options)


def test_every_file_of_methods_is_registered():
    """A method whose file is not imported would run without the options that its file gives it."""
    registry.load_builtin()
    makers = {entry.make.__module__.rpartition(".")[2] for entry in registry.METHODS.values()}
    folder = Path(registry.__file__).parent / "methods"
    files = {path.stem for path in folder.glob("*.py") if "@method(" in path.read_text()}
    assert "ivon" in files and files <= makers
