"""Input files that are damaged, or written by somebody who means harm: one line with the name, and never a crash."""

import gzip
import json
import os
import random
import struct
import time

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet
import pytest
from torch import nn

import vbdl
import vbdl.cli

OPTIONS = {"chunk_rows": 40, "tile": 64, "compile": False, "progress": False, "workers": 1}
BUDGET = 1.0  # seconds for each format


def one_line(said, name):
    assert name in said and "\n" not in said and len(said) < 2_000, said


def header(shape, descr="'<f4'", order="False", more="", version=(1, 0)):
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}{more}}}"
    size = struct.pack("<H" if version == (1, 0) else "<I", len(text) + 1)
    return b"\x93NUMPY" + bytes(version) + size + text.encode() + b"\n"


HEADERS = {
    "negative": header("(-1, 2)"), "negative width": header("(4, -2)"), "boolean": header("(True, 2)"),
    "boolean width": header("(4, True)"), "huge": header("(10**18, 2)"),
    "huge digits": header("(" + "9" * 400 + ", 2)"),
    "huge number": header("(9223372036854775807, 2)"), "past int64": header("(9223372036854775808, 2)"),
    "huge product": header("(4294967296, 4294967296)"), "huge width": header("(2, 9223372036854775807)"),
    "no width": header("(1000000000000000000, 0)"), "a thousand axes": header("(" + "1," * 1000 + ")"),
    "forty axes": header("(" + "1," * 40 + ")"), "unclosed": header("((((((((((((("), "brackets": header("(" * 3_000),
    "nested": header("[" * 500 + "]" * 500), "float": header("(2.0, 2)"), "text": header("'ab'"),
    "none": header("None"),
    "scalar": header("()"), "objects": header("(2, 2)", "'|O'"), "words": header("(2, 2)", "'<U4'"),
    "bytes": header("(2, 2)", "'|S4'"), "void": header("(2, 2)", "'|V4'"), "empty type": header("(2, 2)", "'|S0'"),
    "dates": header("(2, 2)", "'<M8[s]'"), "complex": header("(2, 2)", "'<c8'"), "no type": header("(2, 2)", "'x'"),
    "fields": header("(2,)", "[('a', '<f4'), ('b', '<f4')]"), "type of types": header("(2, 2)", "[[[]]]"),
    "columns first": header("(2, 2)", order="True"), "a call": header("__import__('os').getpid()"),
    "two keys": header("(2, 2)", more=", 'more': 1"), "sum": header("(1+1, 2)"),
    "version 9": header("(2, 2)", version=(9, 0)),
    "version 3": header("(2, 2", version=(3, 0)), "null": b"\x93NUMPY\x01\x00\x10\x00" + bytes(16),
    "short": b"\x93NUMPY", "long header": b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1), "empty": b"",
    "no magic": b"PK\x03\x04", "no data": header("(4, 2)"), "surrogates": header("'\\ud800'"),
    "lines": header("(2,\n2\n"),
}  # fmt: skip


@pytest.mark.parametrize("how", HEADERS)
def test_headers_of_arrays(network, tmp_path, how):
    """By itself the error is one line; among others the file is named and the others are predicted."""
    (tmp_path / "in").mkdir()
    data = b"" if how in ("no data", "empty", "short") else bytes(8)
    (tmp_path / "in" / "bad.npy").write_bytes(HEADERS[how] + data)
    with pytest.raises(ValueError) as error:
        vbdl.predict_table(network, tmp_path / "in" / "bad.npy", **OPTIONS)
    one_line(str(error.value), "bad.npy")
    np.save(tmp_path / "in" / "good.npy", np.zeros((3, 2), np.float32))
    report = vbdl.predict_table(network, tmp_path / "in", tmp_path / "out", **OPTIONS)
    assert report.rows == 3 and list(report.failed) == ["bad.npy"]
    one_line(report.failed["bad.npy"], "bad.npy")


def test_rows_before_the_place_where_an_array_ends_are_predicted(network, tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((100, 2), np.float32))
    os.truncate(tmp_path / "x.npy", (tmp_path / "x.npy").stat().st_size - 8 * 15)
    report = vbdl.predict_table(network, tmp_path / "x.npy", tmp_path / "out", **OPTIONS)
    assert report.rows == 80 and "ends before row 85 of 100" in report.failed["x.npy"]


def test_numbers_that_float32_cannot_hold_are_rows_that_are_not_finite(network, tmp_path):
    np.save(tmp_path / "x.npy", np.array([[1e300, 0], [1, 2]]))
    assert vbdl.predict_table(network, tmp_path / "x.npy", tmp_path / "out", **OPTIONS).rejected == 1


def files(folder):
    """A file of every format, of 100 rows, with columns of all kinds."""
    random_ = np.random.default_rng(0)
    a, b = random_.normal(size=(2, 100))
    table = pa.table({
        "id": [f"row-{i}" for i in range(100)], "a": a, "b": [None if i % 9 == 0 else v for i, v in enumerate(b)],
        "word": pa.array(random_.choice(["u", "v"], 100)).dictionary_encode(), "list": [[1, 2], None] * 50,
    })  # fmt: skip
    np.save(folder / "t.npy", np.stack([a, b], axis=1).astype(np.float32))
    pa.parquet.write_table(table, folder / "t.parquet", row_group_size=30)
    with pa.OSFile(str(folder / "t.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=30)
    with pa.OSFile(str(folder / "t.ipc"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=30)
    pa.feather.write_feather(table, folder / "t.feather")
    pa.csv.write_csv(table.drop_columns(["list"]), folder / "t.csv")
    (folder / "t.csv.gz").write_bytes(gzip.compress((folder / "t.csv").read_bytes(), mtime=0))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    files(folder)
    return folder


def noise(data, at):
    data = bytearray(data)
    for _ in range(at.choice([1, 1, 1, 3, 20])):
        place = at.randrange(max(1, len(data))) if at.random() < 0.7 else at.randrange(min(len(data), 200) or 1)
        kind = at.randrange(7)
        if not data:
            return b""
        if kind < 3:
            data[place] = at.choice([data[place] ^ (1 << at.randrange(8)), 0, 255, at.randrange(256)])
        elif kind == 3:
            data[place : place + 8] = at.choice(
                [b"\xff" * 8, bytes(8), struct.pack("<q", -1), struct.pack("<i", 2**31 - 1)]
            )
        elif kind == 4:
            del data[place : place + at.randrange(1, 100)]
        elif kind == 5:
            data[place:place] = at.randbytes(at.randrange(1, 100))
        else:
            del data[place:]
    return bytes(data)


# pyarrow decodes a row of too few cells before it asks what to do with it, and prints where that fails
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", ["t.npy", "t.parquet", "t.arrow", "t.ipc", "t.feather", "t.csv", "t.csv.gz"])
def test_damaged_files_are_a_line_each(network, whole, tmp_path, name):
    """Some hundred damaged files a format, the same in every run, as many as the time allows; alone and beside one
    that is whole."""
    at, until, tried, failed = random.Random(f"{name} 0"), time.monotonic() + BUDGET, 0, 0
    options = {**OPTIONS, "keep": () if name == "t.npy" else ("id",), "inputs": None if name == "t.npy" else ("a", "b")}
    source = (whole / name).read_bytes()
    while time.monotonic() < until and tried < 150:
        tried += 1
        folder = tmp_path / str(tried)
        folder.mkdir()
        place = folder / name.replace("t.", "bad.", 1)
        place.write_bytes(noise(source, at))
        (folder / "good.csv").write_text("id,a,b\n1,2,3\n") if name != "t.npy" else np.save(
            folder / "good", np.zeros((1, 2))
        )
        try:
            report = vbdl.predict_table(network, folder, tmp_path / f"out-{tried}", **options)
        except ValueError as error:  # a type that goes with no other, where a column's type was hit
            one_line(str(error), place.name)
            continue
        assert report.rows >= 1 and list(report.failed) in ([], [place.name]), tried
        for said in report.failed.values():
            one_line(said, place.name)
            failed += 1
        lines = (tmp_path / f"out-{tried}" / "_manifest.json").read_text()
        assert json.loads(lines)["rows"] == report.rows
    assert tried >= 5 and failed >= 1, (tried, failed)


def test_a_batch_that_points_outside_of_its_file_is_not_read(network, tmp_path):
    """Offsets of text that Arrow's reader takes as they are."""
    offsets = pa.py_buffer(struct.pack("<3i", 0, 2**30, 3))
    text = pa.StringArray.from_buffers(2, offsets, pa.py_buffer(b"abc"))
    batch = pa.RecordBatch.from_arrays([text, *(pa.array([1.0, 2.0]) for _ in "ab")], ["id", "a", "b"])
    with pa.OSFile(str(tmp_path / "t.arrow"), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    with pytest.raises(ValueError, match="t.arrow cannot be read as ipc"):
        vbdl.predict_table(network, tmp_path / "t.arrow", keep=("id",), inputs=("a", "b"), **OPTIONS)


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz", "t.parquet", "t.arrow", "t.npy", "t.feather", "t.tsv"])
@pytest.mark.parametrize("data", [b"", b"\0" * 50, b"\xff" * 50, b"\n\n\n", b'"', b"\x1f\x8b", b"a,a\n1,2\n"])
def test_the_command_says_a_line(model, tmp_path, name, data, capsys):
    (tmp_path / name).write_bytes(data)
    code = vbdl.cli.main(["predict", *map(str, (model, tmp_path / name, tmp_path / "out"))])
    said = capsys.readouterr()
    lines = [line for line in (said.out + said.err).splitlines() if name in line]
    assert code in (1, 3) and lines and "Traceback" not in said.err + said.out


def test_an_image_that_bursts_costs_its_row(tmp_path):
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "in").mkdir()
    for name in ("a.png", "b.png"):
        image.new("RGB", (4, 4)).save(tmp_path / "in" / name)
    data = bytearray((tmp_path / "in" / "b.png").read_bytes())
    data[16:24] = struct.pack(">II", 60_000, 60_000)
    (tmp_path / "in" / "b.png").write_bytes(data)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    predict = vbdl.Predictor(vbdl.DeepEnsemble(net, 2), vbdl.Categorical(), compile=False)
    report = vbdl.predict_table(predict, tmp_path / "in", tmp_path / "out", **OPTIONS)
    assert (report.rows, report.rejected) == (1, 1) and "b.png" in report.reasons[0]
