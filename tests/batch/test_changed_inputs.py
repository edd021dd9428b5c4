"""Inputs that are written, replaced or removed while a job reads them: its end says which."""

import os

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet
import pytest
from torch import nn

import vbdl
import vbdl.cli
from vbdl.batch.folder import Folder

OPTIONS = {"chunk_rows": 20, "tile": 64, "compile": False, "progress": False, "workers": 1}


def write(path, seed=0):
    x = np.random.default_rng(seed).integers(1, 9, size=(100, 2)).astype(np.float32)
    table = pa.table({"a": x[:, 0], "b": x[:, 1]})
    if path.suffix == ".npy":
        np.save(path, x)
    elif path.suffix == ".csv":
        pa.csv.write_csv(table, path)
    elif path.suffix == ".parquet":
        pa.parquet.write_table(table, path)
    else:
        pa.feather.write_feather(table, path)


def rewrite(path):
    write(path, 1)


def rewrite_with_the_same_times(path):
    about = path.stat()
    write(path, 1)
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))


def replace(path):
    about = path.stat()
    write(path.with_name(f"new{path.suffix}"), 1)
    os.replace(path.with_name(f"new{path.suffix}"), path)
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))


def append(path):
    with open(path, "ab") as file:
        file.write(b"1,2\n")


def truncate(path):
    """What a writer's first moment leaves: a reader finds no footer, half a row, or nothing."""
    os.truncate(path, 10)


CHANGES = [rewrite, rewrite_with_the_same_times, replace, append, truncate, lambda path: path.unlink()]


@pytest.fixture
def during(monkeypatch):
    """Calls a function when some parts of a job are there."""

    def called(act, calls=(3,)):
        record, recorded = Folder.record, []

        def noted(self, entry):
            record(self, entry)
            recorded.append(entry)
            if len(recorded) in calls:
                act()

        monkeypatch.setattr(Folder, "record", noted)

    return called


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["x.npy", "x.csv", "x.parquet", "x.feather"])
@pytest.mark.parametrize("out", ["out", "out.csv"])
def test_an_input_that_changes_while_it_is_read_is_named(network, tmp_path, during, name, out, change):
    (tmp_path / "in").mkdir()
    for each in ("a.npy", name):
        write(tmp_path / "in" / each)
    during(lambda: change(tmp_path / "in" / name))
    report = vbdl.predict_table(network, tmp_path / "in", tmp_path / out, **OPTIONS)
    assert list(report.failed) == [name] and "changed or replaced while it was read" in report.failed[name]
    assert f"failed: {name}" in str(report)
    if (tmp_path / "in" / name).exists() and change not in (append, truncate):
        if change is rewrite:
            with pytest.raises(ValueError, match="another job"):
                vbdl.predict_table(network, tmp_path / "in", tmp_path / out, **OPTIONS)
        assert not vbdl.predict_table(network, tmp_path / "in", tmp_path / out, restart=True, **OPTIONS).failed


def test_the_exit_code_is_3_and_the_names_are_printed(model, rows, tmp_path, during, capsys):
    pa.csv.write_csv(rows, tmp_path / "t.csv")
    during(lambda: pa.csv.write_csv(rows.slice(0, 1_990), tmp_path / "t.csv"))
    arguments = ["predict", str(model), str(tmp_path / "t.csv"), str(tmp_path / "out"), "--chunk-rows", "100"]
    assert vbdl.cli.main([*arguments, "--compile", "False"]) == 3
    assert "failed: t.csv: t.csv was changed or replaced while it was read" in capsys.readouterr().out


def test_told_to_stop_it_stops(network, tmp_path, during):
    write(tmp_path / "x.npy")
    during(lambda: rewrite(tmp_path / "x.npy"))
    with pytest.raises(ValueError, match="x.npy was changed"):
        vbdl.predict_table(network, tmp_path / "x.npy", tmp_path / "out.csv", on_error="stop", **OPTIONS)
    assert not (tmp_path / "out.csv").exists()


def test_a_table_in_memory_is_of_one_version(network, tmp_path, monkeypatch):
    write(tmp_path / "x.npy")
    call = vbdl.Predictor.__call__

    def changing(self, x, **options):
        rewrite(tmp_path / "x.npy")
        return call(self, x, **options)

    monkeypatch.setattr(vbdl.Predictor, "__call__", changing)
    with pytest.raises(ValueError, match="x.npy was changed or replaced while it was read"):
        vbdl.predict_table(network, tmp_path / "x.npy", **OPTIONS)


def test_an_image_that_changes_is_noticed(tmp_path, during):
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "in").mkdir()
    for number in range(60):
        image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / "in" / f"{number:02d}.png")
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    predict = vbdl.Predictor(vbdl.DeepEnsemble(net, 2), vbdl.Categorical(), compile=False)
    during(lambda: image.new("RGB", (4, 4)).save(tmp_path / "in" / "05.png"), calls=(2,))
    assert list(vbdl.predict_table(predict, tmp_path / "in", tmp_path / "out", **OPTIONS).failed) == ["images"]


@pytest.mark.parametrize("out", [None, "out.csv"])
@pytest.mark.parametrize("name", ["x.csv", "x.parquet", "x.feather"])
def test_half_a_file_that_cannot_be_read_is_named_as_changed(network, tmp_path, monkeypatch, name, out):
    write(tmp_path / name)
    call = vbdl.Predictor.__call__

    def changing(self, x, **options):
        truncate(tmp_path / name)
        return call(self, x, **options)

    monkeypatch.setattr(vbdl.Predictor, "__call__", changing)
    with pytest.raises(ValueError, match=f"{name} was changed or replaced while it was read"):
        target = out and tmp_path / out
        vbdl.predict_table(network, tmp_path / name, target, on_error="stop", **{**OPTIONS, "chunk_rows": 5})


def test_an_input_that_does_not_change_is_not_named(network, tmp_path, during):
    write(tmp_path / "x.npy")
    during(lambda: (tmp_path / "x.npy").read_bytes())
    assert not vbdl.predict_table(network, tmp_path / "x.npy", tmp_path / "out", **OPTIONS).failed
