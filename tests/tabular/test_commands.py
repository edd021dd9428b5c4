"""vbdl fit, predict, evaluate, calibrate and recommend as a stranger meets them."""

import json
import shlex
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
import torch

import vbdl
from vbdl.cli import main
from vbdl.cli.config import configured
from vbdl.cli.fit import Fit
from vbdl.tabular import schema_of
from vbdl.tabular.fitting import ARCHITECTURE

QUICK = ["--members", "2", "--width", "16", "--depth", "1", "--epochs", "6", "--lr", "0.01"]


def table(n, seed):
    random = np.random.default_rng(seed)
    a, b = random.normal(size=(2, n))
    word = random.choice(["u", "v"], n)
    price = np.round(100 + 10 * a + 5 * (word == "u") + random.normal(size=n), 2)
    return pa.table({"a": a, "b": b, "word": word, "price": price, "kind": np.where(a > 0, "big", "small")})


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    pa.parquet.write_table(table(600, 0), folder / "train.parquet")
    pa.csv.write_csv(table(300, 1), folder / "new.csv")
    return folder


@pytest.fixture(scope="module")
def classes(place):
    out = place / "kind.vbdl"
    assert (
        main(["fit", str(place / "train.parquet"), "--target", "kind", "--ignore", "price", "--out", str(out), *QUICK])
        == 0
    )
    return out


@pytest.fixture(scope="module")
def number(place):
    out = place / "price.vbdl"
    arguments = ["--target", "price", "--ignore", "kind", "--out", str(out), "--no-figures"]
    assert main(["fit", str(place / "train.parquet"), *arguments, *QUICK]) == 0
    return out


def test_fit_says_what_it_did(place, classes, capsys):
    assert (place / "kind-figures" / "calibration.png").stat().st_size > 5_000
    assert (place / "kind-figures" / "risk-coverage.svg").is_file()
    assert main(["fit", str(place / "train.parquet"), "--target", "kind", "--out", str(classes), *QUICK]) == 1
    assert "--overwrite" in capsys.readouterr().err
    again = ["fit", str(place / "train.parquet"), "--target", "kind", "--out", str(classes), "--overwrite"]
    assert main([*again, "--no-figures", "--ignore", "price", *QUICK]) == 0
    said = capsys.readouterr().out
    for part in ("word", "categorical", "classification", "420 train", "accuracy", "saved to"):
        assert part in said
    assert main(["inspect", str(classes)]) == 0
    said = capsys.readouterr().out
    assert "trusted" not in said and "metric scores accuracy" in said and "{" not in said


def test_fit_says_before_the_training_where_it_cannot_write(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("vbdl.tabular.fit_table", lambda *a, **k: pytest.fail("trained for nothing"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    (tmp_path / "file").write_text("keep me")
    for out, said in (
        ("mine", "exists already"),
        ("mine --overwrite", "holds 'notes.txt'"),
        ("file --overwrite", "is not a folder"),
        ("file/model.vbdl", "cannot be written"),
    ):
        name, *options = out.split()
        command = ["fit", str(place / "train.parquet"), "--target", "kind", "--out", str(tmp_path / name), *options]
        assert main([*command, *QUICK]) == 1
        assert said in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "mine"]


def test_predict_writes_what_the_model_says(place, number):
    out = place / "o.csv"
    assert main(["predict", str(number), str(place / "new.csv"), str(out), "--keep", "price"]) == 0
    found = pa.csv.read_csv(out)
    assert found.column_names[:3] == ["row_id", "price", "mean"] and found.num_rows == 300
    error = np.abs(np.array(found["mean"]) - np.array(found["price"])).mean()
    assert error < 6
    low, high = np.array(found["lower"]), np.array(found["upper"])
    assert 0.8 < ((low <= found["price"]) & (found["price"] <= high)).mean() <= 1
    predictor = vbdl.load(number, compile=False)
    mean = predictor(schema_of(predictor.manifest.extras).tensor(table(300, 1))).mean.flatten()
    assert np.allclose(found["mean"], mean, rtol=1e-4)


def test_rows_that_cannot_be_used_are_exit_code_3(place, classes, tmp_path, capsys):
    text = (place / "new.csv").read_text().splitlines()
    text[5] = "x" + text[5]
    (tmp_path / "bad.csv").write_text("\n".join(text) + "\n")
    assert main(["predict", str(classes), str(tmp_path / "bad.csv"), str(tmp_path / "o.parquet")]) == 3
    said = capsys.readouterr().out
    assert (
        "299 rows in" in said and "1 part\n" in said and "1 row could not be used" in said and "bad.csv, row 4" in said
    )
    assert (
        main(["predict", str(classes), str(tmp_path / "bad.csv"), str(tmp_path / "p.parquet"), "--on-error", "stop"])
        == 1
    )
    assert "row 4" in capsys.readouterr().err


def test_evaluate_refuses_training_rows(place, classes, capsys):
    assert main(["evaluate", str(classes), str(place / "train.parquet")]) == 1
    assert "420 of 600 rows were trained on" in capsys.readouterr().err
    assert main(["evaluate", str(classes), str(place / "new.csv"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows"] == 300 and found["scores"]["accuracy"]["value"] > 0.9
    assert found["scores"]["NLL"]["simplest"] > found["scores"]["NLL"]["value"]


def test_evaluate_refuses_calibration_rows(place, classes, tmp_path, capsys):
    new, later = str(place / "new.csv"), tmp_path / "later.csv"
    pa.csv.write_csv(table(100, 2), later)
    assert main(["calibrate", str(classes), new, str(tmp_path / "a"), "--method", "isotonic"]) == 0
    assert main(["calibrate", str(tmp_path / "a"), str(later), str(tmp_path / "b"), "--method", "sets", "--add"]) == 0
    capsys.readouterr()
    for model, data, said in (("a", new, "300 of 300"), ("b", new, "300 of 300"), ("b", str(later), "100 of 100")):
        assert main(["evaluate", str(tmp_path / model), data]) == 1
        assert f"{said} rows were calibrated on" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path / "a"), new, "--allow-training-rows"]) == 0
    assert "300 of 300 rows were calibrated on: the scores are too good" in capsys.readouterr().out
    assert main(["evaluate", str(tmp_path / "a"), str(later)]) == 0
    assert "calibrated on" not in capsys.readouterr().out


def test_evaluate_says_where_calibration_rows_were_not_recorded(place, classes, tmp_path, capsys):
    predictor = vbdl.load(classes, compile=False)
    for module in predictor.likelihood.modules():
        if hasattr(module, "calibration_rows"):
            module.calibration_rows = None  # as in what was saved before they were recorded
    network = {
        "architecture": ARCHITECTURE,
        "arguments": predictor.manifest.posterior.members[0].member.network.arguments,
    }
    predictor.save(tmp_path / "old", extras=predictor.manifest.extras, example=torch.zeros(1, 5), **network)
    assert "calibration_rows" not in (tmp_path / "old" / "manifest.json").read_text()
    assert main(["evaluate", str(tmp_path / "old"), str(place / "new.csv")]) == 0
    assert "which rows the model was calibrated on is not recorded" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["temperature", "isotonic", "sets"])
def test_calibrate_makes_another_model(place, classes, tmp_path, capsys, method):
    before = vbdl.load(classes, compile=False)
    assert main(["calibrate", str(classes), str(place / "new.csv"), str(tmp_path / "c"), "--method", method]) == 0
    assert "calibration rows themselves" in capsys.readouterr().out
    after = vbdl.load(tmp_path / "c", compile=False)
    assert after.manifest.extras["table"] == before.manifest.extras["table"]
    assert main(["predict", str(tmp_path / "c"), str(place / "new.csv"), str(tmp_path / "o.parquet")]) == 0
    assert ("set" in pa.parquet.read_schema(tmp_path / "o.parquet").names) == (method == "sets")
    assert main(["calibrate", str(classes), str(place / "new.csv"), str(classes)]) == 1
    assert main(["calibrate", str(classes), str(place / "new.csv"), str(tmp_path / "c"), "--method", method]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert main(["predict", str(classes), str(place / "new.csv"), str(tmp_path / "o.parquet")]) == 1
    assert "--restart" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, said",
    [
        (["intervals"], ["replaced: std-scaling, intervals (--add keeps what the model has)"]),
        (["intervals", "--add"], ["kept: std-scaling", "replaced: intervals"]),
        (["std-scaling"], ["replaced: std-scaling, intervals (--add keeps what the model has)"]),
    ],
)
def test_calibrate_says_what_is_kept_and_what_is_replaced(place, number, tmp_path, capsys, options, said):
    before, x = vbdl.load(number, compile=False), torch.zeros(1, 5)
    command = ["calibrate", str(number), str(place / "new.csv"), str(tmp_path / "c"), "--method", *options]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-len(said) - 2 : -1] == [f"fitted: {options[0]}", *said]
    after = vbdl.load(tmp_path / "c", compile=False)
    assert (after(x).total == before(x).total).all() == ("--add" in options)


def test_calibrate_scores_rows_that_each_fit_has_not_seen(place, classes, tmp_path, capsys):
    """A curve through few rows helps sometimes, and says where it does not."""
    whole, verdicts = pa.csv.read_csv(place / "new.csv"), set()
    for start in range(0, 90, 15):
        pa.csv.write_csv(whole.slice(start, 15), tmp_path / "few.csv")
        out = str(tmp_path / f"c{start}")
        assert main(["calibrate", str(classes), str(tmp_path / "few.csv"), out, "--method", "isotonic"]) == 0
        said = capsys.readouterr().out
        [line] = [line for line in said.splitlines() if "held-out NLL" in line]
        before, after = (float(w) for w in line.split() if w.replace(".", "").isdigit())
        verdicts.add("makes predictions worse" in said)
        assert ("makes predictions worse" in said) == (after > before)
        if len(verdicts) == 2:
            break
    assert verdicts == {True, False}


def test_calibrate_a_regression(place, number, tmp_path):
    assert (
        main(
            [
                "calibrate",
                str(number),
                str(place / "new.csv"),
                str(tmp_path / "c"),
                "--method",
                "intervals",
                "--coverage",
                "0.5",
            ]
        )
        == 0
    )
    assert main(["predict", str(tmp_path / "c"), str(place / "new.csv"), str(tmp_path / "o.parquet")]) == 0
    found = pa.parquet.read_table(tmp_path / "o.parquet")
    price = np.array(table(300, 1)["price"])
    inside = (np.array(found["lower"]) <= price) & (price <= np.array(found["upper"]))
    assert 0.45 < inside.mean() < 0.55  # these are the rows it was fitted to


def test_a_score_of_the_distribution_before_is_not_given_for_the_one_after(place, number, tmp_path, capsys):
    command = ["calibrate", str(number), str(place / "new.csv"), str(tmp_path / "c"), "--method", "cdf"]
    assert main(command) == 0
    crps = next(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("CRPS"))
    assert float(crps[1]) > 0 and crps[2] == "-"


def test_recommend_says_why(place, capsys):
    assert (
        main(["recommend", str(place / "train.parquet"), "--target", "kind", "--budget", "0.5", "--width", "16"]) == 0
    )
    said = capsys.readouterr().out
    assert "recommend: " in said and all(m in said for m in ("MCDropout", "MeanField", "DeepEnsemble"))


def test_recommend_reads_columns_as_fit_does(tmp_path, capsys):
    days = pa.array(np.arange("2020-01-01", "2020-04-10", dtype="datetime64[D]"))
    pa.parquet.write_table(pa.table({"day": days, "y": ["a", "b"] * 50}), tmp_path / "t.parquet")
    command = ["recommend", str(tmp_path / "t.parquet"), "--target", "y", "--budget", "0.5", "--width", "8"]
    assert main(command) == 1
    said = capsys.readouterr().err
    assert "--date day" in said and "in vbdl fit, split by it (--time day)" in said
    assert main([*command, "--date", "day"]) == 0
    assert main([*command, "--date", "day", "--numeric", "day"]) == 1
    assert "as numeric and as date" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["fit", "predict", "evaluate", "calibrate", "recommend"])
def test_help_does_not_wait_for_torch(command):
    code = (
        f"import sys; from vbdl.cli import main\ntry: main([{command!r}, '--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'pyarrow', 'sklearn'} & set(sys.modules); sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and f"usage: vbdl {command}" in done.stdout, done.stderr


# -- --config


def write(path, text):
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    "text",
    [
        'target = "y"\nbatch-size = 8\nignore = ["a"]\nout = "m"',
        '[fit]\ntarget = "y"\nbatch_size = 8\nignore = ["a"]\nout = "m"\n[demo]\nseed = 3',
    ],
)
def test_options_from_toml(tmp_path, text):
    rest, found = configured(["fit", "t.csv", "--config", write(tmp_path / "c.toml", text)], {"fit": Fit, "demo": Fit})
    assert rest == ["fit", "t.csv"]
    made = found["default"]
    assert (made.target, made.batch_size, made.ignore, str(made.out), made.epochs) == ("y", 8, ("a",), "m", 500)


def test_the_command_line_goes_before_the_file(place, tmp_path, capsys):
    config = write(
        tmp_path / "c.toml",
        f'target = "nothing"\nmembers = 2\nwidth = 8\nepochs = 1\nout = "{tmp_path}/m"\nfigures = false',
    )
    assert main(["fit", str(place / "train.parquet"), "--config", config]) == 1
    assert "'nothing'" in capsys.readouterr().err
    assert (
        main(["fit", str(place / "train.parquet"), f"--config={config}", "--target", "kind", "--ignore", "price"]) == 0
    )
    assert (tmp_path / "m" / "manifest.json").is_file()


@pytest.mark.parametrize(
    "text, said",
    [
        ('taget = "y"', "did you mean 'target'"),
        ("zzz = 1", "there are batch_size"),
        ('epochs = "3"', "Expected `int`"),
        ('method = "magic"', "no method 'magic': choose one of mc-dropout"),
        ("epochs = ", "is not TOML"),
        ("batch-size = 1\nbatch_size = 2", "twice"),
        ("seed = 1\n[fit]\nseed = 2", "at its top"),
    ],
)
def test_a_wrong_file_is_exit_code_2(tmp_path, capsys, text, said):
    assert main(["fit", "t.csv", "--config", write(tmp_path / "c.toml", text)]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["fit", "--config"], ["--config", "c.toml"], ["fit", "--config", "/no/such.toml"]]
)
def test_a_missing_file_is_exit_code_2(arguments):
    assert main(arguments) == 2


def test_a_spreadsheet_of_another_country_from_end_to_end(tmp_path, capsys):
    """Semicolons, cp1252, decimal commas, euros, days first, a mark for nothing: the same rows for every command."""
    random = np.random.default_rng(0)
    days = np.datetime64("2024-01-01") + np.arange(600)
    rows = ["größe;preis;wann;seit;art"]
    for i, day in enumerate(days):
        size, price = random.normal(), random.lognormal(7)
        text = f"{price:,.2f}".translate({ord(","): ".", ord("."): ","})
        when = f"{str(day)[8:]}.{str(day)[5:7]}.{str(day)[:4]}"
        word = "k.A." if i % 9 == 0 else f"{size:.3f}".replace(".", ",")
        rows.append(f"{word};{text} €;{when};{when};{'ja' if size > 0 else 'nein'}")
    (tmp_path / "t.csv").write_bytes("\n".join(rows[:501]).encode("cp1252"))
    (tmp_path / "new.csv").write_bytes("\n".join([rows[0], *rows[501:]]).encode("cp1252"))
    out = str(tmp_path / "m")
    arguments = ["--target", "art", "--time", "wann", "--date", "seit", "--out", out, "--no-figures"]
    options = ["--encoding", "cp1252", "--missing", "k.A."]
    assert main(["fit", str(tmp_path / "t.csv"), *arguments, *options, *QUICK]) == 0
    said = capsys.readouterr().out
    for words in ("separates its columns by ';'", "',' before their decimals", "by time (wann, day first)", "'preis'"):
        assert words in said, said
    assert main(["predict", out, str(tmp_path / "new.csv"), str(tmp_path / "p.parquet")]) == 0
    predicted = pa.parquet.read_table(tmp_path / "p.parquet")
    predictor = vbdl.load(out, compile=False)
    schema = schema_of(predictor.manifest.extras)
    x = schema.tensor(tmp_path / "new.csv")
    assert np.allclose(predicted["probability_ja"], predictor(x).probs[:, 0], atol=1e-6)
    cells = [dict(zip(rows[0].split(";"), row.split(";"), strict=True)) for row in rows[501:]]
    assert x.equal(schema.tensor(cells)) and x.equal(schema.tensor({n: [c[n] for c in cells] for n in cells[0]}))
    assert main(["evaluate", out, str(tmp_path / "new.csv")]) == 0
    assert main(["calibrate", out, str(tmp_path / "new.csv"), str(tmp_path / "c")]) == 0


@pytest.mark.parametrize(
    "options, said",
    [
        (["--decimal", "x"], "a decimal mark is"),
        (["--thousands", "x"], "a mark between thousands"),
        (["--decimal", ",", "--thousands", ","], "cannot stand before decimals and between"),
        (["--separator", "ab"], "a separator is one character"),
        (["--encoding", "klingon"], "no encoding 'klingon'"),
        (["--date-format", "european"], "a date format is day-first"),
    ],
)
def test_options_of_reading_that_make_no_sense(place, tmp_path, capsys, options, said):
    command = ["fit", str(place / "train.parquet"), "--target", "kind", "--out", str(tmp_path / "m")]
    assert main([*command, *options]) == 1
    assert said in capsys.readouterr().err


def test_recommend_divides_by_time_and_its_next_command_runs(tmp_path, capsys):
    random = np.random.default_rng(0)
    a = random.normal(size=400)
    columns = {"a": a, "when it was": np.arange(400)[::-1], "the target": a + random.normal(size=400)}
    pa.csv.write_csv(pa.table(columns), tmp_path / "a table.csv")
    given = [str(tmp_path / "a table.csv"), "--target", "the target", "--separator", ",", "--time", "when it was"]
    assert main(["recommend", *given, "--budget", "0.5", "--width", "8"]) == 0
    said = capsys.readouterr().out
    assert "280 train, 40 validation, 80 test; by time (when it was): train 0 to 279" in said
    command = shlex.split(said.splitlines()[-1].removeprefix("to train:"))
    assert command[:2] == ["vbdl", "fit"] and command[2:9] == given
    assert main([*command[1:], "--out", str(tmp_path / "m"), "--epochs", "6", "--no-figures", "--width", "8"]) == 0


def test_rows_that_a_left_out_column_told_apart_may_repeat(tmp_path, capsys):
    """An id tells all rows apart, and is no input: the calibration rows repeat training rows, as is normal there."""
    random = np.random.default_rng(0)
    kind = random.choice(["u", "v", "w"], 900)
    y = np.where(kind == "u", 1.0, 2.0) + random.normal(size=900)
    pa.csv.write_csv(pa.table({"id": [f"row {i}" for i in range(900)], "kind": kind, "y": y}), tmp_path / "t.csv")
    command = ["fit", str(tmp_path / "t.csv"), "--target", "y", "--out", str(tmp_path / "m"), "--no-figures"]
    assert main([*command, *QUICK]) == 0
    said = capsys.readouterr().out
    assert "only 3 of 900 rows differ in the columns that are used" in said
    assert "interval coverage" in said and "too few" not in said


def test_scores_of_rows_in_time_have_wider_intervals(tmp_path, capsys):
    random = np.random.default_rng(0)
    n, slow = 2000, np.zeros(2000)
    for i in range(1, n):
        slow[i] = 0.97 * slow[i - 1] + random.normal()
    a = random.normal(size=n)
    columns = pa.table({"day": np.arange(n), "a": a, "y": a + slow})
    pa.csv.write_csv(columns, tmp_path / "t.csv")
    command = ["fit", str(tmp_path / "t.csv"), "--target", "y", "--out", str(tmp_path / "m"), "--no-figures"]
    assert main([*command, "--time", "day", *QUICK]) == 0
    said = capsys.readouterr().out
    assert "intervals by 20 blocks of consecutive rows in time" in said
    later = columns.slice(1800)
    pa.csv.write_csv(later, tmp_path / "later.csv")
    pa.csv.write_csv(later.drop_columns("day"), tmp_path / "without.csv")
    widths = []
    for name in ("later", "without"):
        assert main(["evaluate", str(tmp_path / "m"), str(tmp_path / f"{name}.csv"), "--json"]) == 0
        score = json.loads(capsys.readouterr().out)["scores"]["RMSE"]
        widths.append(score["upper"] - score["lower"])
    assert widths[0] > 1.5 * widths[1]


def test_calibrate_chooses_by_the_target_and_names_what_fits_it(place, classes, number, tmp_path, capsys):
    assert main(["calibrate", str(number), str(place / "new.csv"), str(tmp_path / "a")]) == 0
    assert "fitted: std-scaling" in capsys.readouterr().out
    assert main(["calibrate", str(classes), str(place / "new.csv"), str(tmp_path / "b")]) == 0
    assert "fitted: temperature" in capsys.readouterr().out
    wrong = ["calibrate", str(number), str(place / "new.csv"), str(tmp_path / "c"), "--method", "isotonic"]
    assert main(wrong) == 1
    assert "price is a number: choose among std-scaling, cdf, intervals" in capsys.readouterr().err
