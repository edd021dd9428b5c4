"""A table in, a calibrated predictor with its scores out."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from vbdl.calibration import Isotonic, calibrate
from vbdl.likelihoods.categorical import Categorical
from vbdl.tabular import TableOptions, fit_table
from vbdl.tabular.evaluation import evaluate

SMALL = {"width": 16, "depth": 1, "n_members": 2, "n_samples": 8, "epochs": 15, "lr": 1e-2, "batch_size": 64}


def classes_table(n=500, seed=0):
    random = np.random.default_rng(seed)
    a, b = random.normal(size=(2, n))
    word = random.choice(["u", "v", "w"], n)
    side = a + (word == "u") - (word == "w") + 0.5 * random.normal(size=n) > 0
    return pa.table(
        {
            "a": a,
            "b": [None if i % 9 == 0 else v for i, v in enumerate(b)],
            "word": word,
            "y": np.where(side, "yes", "no"),
        }
    )


def numbers_table(n=500, seed=0):
    random = np.random.default_rng(seed)
    a, b = random.normal(size=(2, n))
    return pa.table({"a": a, "b": b, "y": 5_000 + 300 * a - 100 * b + 30 * random.normal(size=n)})


@pytest.fixture(scope="module", params=["deep-ensemble", "mc-dropout", "mean-field"])
def classified(request):
    return fit_table(classes_table(), "y", TableOptions(method=request.param, **SMALL), progress=False)


def test_classes_are_learned_with_every_method(classified):
    nll = classified.evaluation["NLL"]
    assert nll.value < 0.75 * nll.simplest and nll.lower < nll.value < nll.upper
    assert classified.evaluation["accuracy"].value > 0.75
    p = classified.predictor(classified.schema.tensor(classes_table(5)))
    assert p.probs.shape == (5, 2) and p.sets.shape == (5, 2)
    assert torch.allclose(p.total, p.aleatoric + p.epistemic, atol=1e-6)


def test_parts_are_what_the_settings_say(classified):
    rows = torch.cat(list(classified.rows.values()))
    assert torch.equal(rows.sort().values, torch.arange(500))
    assert len(classified.rows["train"]) == 350


@pytest.fixture(scope="module", params=["constant", "per-row"])
def regressed(request):
    return fit_table(numbers_table(), "y", TableOptions(noise=request.param, **{**SMALL, "epochs": 40}), progress=False)


def test_a_number_is_predicted_in_its_own_unit(regressed):
    rmse = regressed.evaluation["RMSE"]
    assert 25 < rmse.value < 60 < 200 < rmse.simplest
    p = regressed.predictor(regressed.schema.tensor(numbers_table(50, seed=9)))
    truth = torch.tensor(numbers_table(50, seed=9)["y"].to_pylist())
    assert float((p.mean.flatten() - truth).abs().mean()) < 60
    assert 20 < float(p.std.mean()) < 80
    assert bool((p.lower < p.mean).all()) and 0.7 < regressed.evaluation["interval coverage"].value <= 1


# the usual unit with both kinds of noise, and the farthest ones with the noise that each row has
@pytest.mark.parametrize("noise", ["constant", "per-row"])
@pytest.mark.parametrize("shift, unit", [(5_000, 250), (5_000, 250 * 2.0**20), (0, 2.0**-20)])
@pytest.mark.slow_where(cell=lambda p: p["noise"] == "constant" and p["unit"] != 250)
def test_training_in_the_unit_of_the_target_is_training_on_standardized_targets(shift, unit, noise):
    """Prices in yen and currents in amperes too: noise of any such size can be said."""
    data = numbers_table()
    y = np.array(data["y"])
    other = data.set_column(2, "y", pa.array((y - shift) / unit))
    settings = TableOptions(noise=noise, **{**SMALL, "epochs": 3})
    a = fit_table(data, "y", settings, progress=False)
    b = fit_table(other, "y", settings, progress=False)
    assert a.evaluation["RMSE"].value == pytest.approx(unit * b.evaluation["RMSE"].value, rel=1e-3)
    assert a.evaluation["NLL"].value == pytest.approx(b.evaluation["NLL"].value + np.log(unit), abs=1e-3)


def test_the_same_seed_is_the_same_model_and_torchs_generator_is_left_alone():
    before = torch.get_rng_state()
    settings = TableOptions(**{**SMALL, "epochs": 2})
    found = [fit_table(classes_table(200), "y", settings, progress=False) for _ in range(2)]
    assert torch.equal(before, torch.get_rng_state())
    x = found[0].schema.tensor(classes_table(20))
    assert torch.equal(found[0].predictor(x).probs, found[1].predictor(x).probs)


def test_rows_without_a_target_are_left_out_and_said():
    data = classes_table(200)
    y = [None if i < 10 else v for i, v in enumerate(data["y"].to_pylist())]
    found = fit_table(data.set_column(3, "y", pa.array(y)), "y", TableOptions(**{**SMALL, "epochs": 1}), progress=False)
    assert int(torch.cat(list(found.rows.values())).min()) == 10
    assert any("10 of 200 rows have no y" in note for note in found.notes)
    data = numbers_table(200)
    y = np.where(np.arange(200) < 50, np.nan, data["y"].to_numpy())  # as Parquet files of pandas have it, and not null
    data = data.set_column(data.column_names.index("y"), "y", pa.array(y))
    found = fit_table(data, "y", TableOptions(**{**SMALL, "epochs": 1}), progress=False)
    assert any("50 of 200 rows have no y" in note for note in found.notes)
    assert [len(rows) for rows in found.rows.values()] == [105, 15, 15, 15]


def test_repeated_rows_are_calibrated_on_new_ones_all_the_same():
    data = classes_table(150)
    found = fit_table(pa.concat_tables([data, data]), "y", TableOptions(**{**SMALL, "epochs": 1}), progress=False)
    assert any("repeat" in note for note in found.notes)
    assert int(found.predictor.likelihood.n_overlap) == 0


def test_a_split_by_time_and_by_group():
    data = (
        classes_table(300)
        .append_column("day", pa.array(np.arange(300)))
        .append_column("who", pa.array(np.arange(300) // 3))
    )
    settings = TableOptions(**{**SMALL, "epochs": 1})
    by_time = fit_table(data, "y", settings, time="day", progress=False)
    assert "day" not in by_time.schema.names and int(by_time.rows["train"].max()) < int(by_time.rows["test"].min())
    by_group = fit_table(data, "y", settings, group="who", ignore=("day",), progress=False)
    groups = [set((r // 3).tolist()) for r in by_group.rows.values()]
    assert sum(map(len, groups)) == 100


@pytest.mark.parametrize(
    "options, said",
    [
        ({"method": "magic"}, "method 'magic'"),
        ({"coverage": 1.0}, "coverage"),
        ({"n_members": 0}, "at least 1"),
        ({"shares": {"train": 1.0}}, "shares"),
        ({"method": "mc-dropout", "dropout": 0.0}, "above 0"),
        ({"dropout": 1.0}, "dropout lies in"),
        ({"dropout": -0.5}, "dropout lies in"),
        ({"batch_size": 0}, "batch_size is at least 1"),
    ],
)
def test_settings_that_make_no_sense(options, said):
    with pytest.raises(ValueError, match=said):
        fit_table(classes_table(100), "y", TableOptions(**options), progress=False)


def test_tables_that_cannot_be_used():
    with pytest.raises(ValueError, match="no column 'z'"):
        fit_table(classes_table(), "z")
    with pytest.raises(ValueError, match="too few"):
        fit_table(classes_table(30), "y")
    with pytest.raises(ValueError, match="1 class"):
        fit_table({"a": list(range(60)), "y": ["same"] * 60}, "y")


@pytest.mark.parametrize("factor", [1e-200, 1e-30, 1e-20, 1e10, 1e200])
def test_a_target_whose_noise_cannot_be_modeled_is_refused_before_training(factor, monkeypatch):
    monkeypatch.setattr("vbdl.tabular.fitting.fit", lambda *a, **k: pytest.fail("trained for nothing"))
    with pytest.raises(ValueError, match="target 'y' has a standard deviation of .*: rescale it"):
        fit_table({"a": np.arange(600.0), "y": factor * np.sin(np.arange(600))}, "y")


def test_an_evaluation_is_json():
    import json

    found = fit_table(numbers_table(200), "y", TableOptions(**{**SMALL, "epochs": 1}), progress=False).evaluation
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["rows"] == 20
    assert "RMSE" in str(found)
    with pytest.raises(KeyError, match="no score"):
        found["accuracy"]


def test_an_outcome_of_no_probability_is_an_infinite_nll_and_no_error():
    found = fit_table(classes_table(), "y", TableOptions(**{**SMALL, "epochs": 3}), progress=False)
    table = classes_table(400, 1)
    x, y = found.schema.encode(table).x, found.schema.target.encode(table.column("y"))[0]
    plain = found.predictor.replace(likelihood=Categorical())
    # fitted to so few rows the curve reaches 0 and 1, and other rows disagree
    scores = evaluate(calibrate(plain, (x[:30], y[:30]), Isotonic()), x[30:], y[30:], found.schema.target)
    assert scores["NLL"].value == np.inf and 0.5 < scores["accuracy"].value < 1 and "inf" in str(scores)
    assert scores.to_dict()["scores"]["NLL"]["value"] is None


def test_a_temperature_without_an_end_is_not_taken():
    """Noise has no best temperature: it runs to its limit, and the predictions stay as they were."""
    random = np.random.default_rng(1)
    data = {"a": random.normal(size=400), "y": [str(v) for v in random.integers(0, 2, 400)]}
    found = [fit_table(data, "y", TableOptions(**{**SMALL, "epochs": 2}, seed=s), progress=False) for s in range(4)]
    ended = [f for f in found if any("no temperature was fitted" in n for n in f.notes)]
    for f in found:
        nll = f.evaluation["NLL"]
        assert nll.lower < nll.simplest + 0.1
    assert ended, "none of these seeds ran to the limit: the test shows nothing"


def test_the_old_name_of_the_options_is_deprecated():
    import vbdl.tabular

    with pytest.warns(DeprecationWarning, match="TableOptions"):
        assert vbdl.tabular.Settings is TableOptions
