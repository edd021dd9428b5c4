"""Rows in, predictions out: every form of input and output, the same numbers whatever the chunks and workers."""

import gzip
import json
import os
import threading

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet
import pytest
import torch
from torch import nn

import vbdl
import vbdl.cli
from vbdl.batch.folder import Folder
from vbdl.batch.output import COLUMNS

SMALL = {"chunk_rows": 300, "tile": 64, "compile": False, "progress": False}


@pytest.fixture(scope="module")
def expected(model, rows):
    return vbdl.predict_table(model, rows, **SMALL)


def write(table, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.name
    if name.endswith(".parquet"):
        pa.parquet.write_table(table, path, row_group_size=170)
    elif name.endswith(".arrow"):
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=130)
    elif name.endswith(".feather"):
        pa.feather.write_feather(table, path)
    else:
        pa.csv.write_csv(table, path)
        if name.endswith(".gz"):
            path.write_bytes(gzip.compress(path.read_bytes()))
    return path


def test_it_is_what_the_predictor_says(fitted, rows, expected):
    p = fitted.predictor(fitted.schema.tensor(rows))
    assert expected["row_id"].to_pylist() == list(range(2_000))
    assert expected["prediction"].to_pylist() == [("no", "yes")[i] for i in p.label.tolist()]
    probs = np.stack([expected["probability_no"], expected["probability_yes"]], axis=1)
    torch.testing.assert_close(torch.tensor(probs), p.probs, rtol=0, atol=1e-6)
    for name in ("total", "aleatoric", "epistemic"):
        torch.testing.assert_close(torch.tensor(np.array(expected[name])), getattr(p, name), rtol=0, atol=1e-6)
    assert expected["set"].to_pylist()[:50] == [
        [c for c, s in zip(("no", "yes"), r, strict=True) if s] for r in p.sets[:50]
    ]
    assert [str(f.type) for f in expected.schema] == ["int64", "string", *["float"] * 5, "list<item: string>"]


@pytest.mark.parametrize("name", ["t.parquet", "t.arrow", "t.feather", "t.csv", "t.csv.gz"])
def test_every_input_format_gives_the_same_bits(model, rows, expected, tmp_path, name):
    assert vbdl.predict_table(model, write(rows, tmp_path / name), **SMALL).equals(expected)


@pytest.mark.parametrize("chunk_rows, workers", [(7, 1), (1_000, 3), (2_000, 2), (65_536, 4), (1_999, 1)])
def test_chunks_and_workers_change_nothing(model, rows, expected, chunk_rows, workers):
    found = vbdl.predict_table(model, rows, **{**SMALL, "chunk_rows": chunk_rows, "workers": workers})
    assert found.combine_chunks().equals(expected.combine_chunks())


def test_compiled_is_eager_to_rounding_and_the_same_in_any_chunk(model, rows, expected):
    a = vbdl.predict_table(model, rows, **{**SMALL, "compile": True, "chunk_rows": 700, "workers": 2})
    b = vbdl.predict_table(model, rows, **{**SMALL, "compile": True, "chunk_rows": 123})
    assert a.combine_chunks().equals(b.combine_chunks())
    assert np.allclose(a["probability_no"], expected["probability_no"], atol=1e-6)


@pytest.mark.parametrize("out", ["out.parquet", "out.arrow", "out.csv", "out.npy", "folder"])
def test_every_output_holds_the_same(model, rows, expected, tmp_path, out):
    source = write(rows, tmp_path / "t.parquet")
    report = vbdl.predict_table(model, source, tmp_path / out, **SMALL)
    assert (report.rows, report.rejected, report.parts, report.resumed) == (2_000, 0, 7, 0)
    if out == "out.csv":
        found = pa.csv.read_csv(tmp_path / out)
        assert found["prediction"].to_pylist() == expected["prediction"].to_pylist()
        assert np.allclose(found["total"], expected["total"], rtol=1e-6)
        assert json.loads(found["set"][0].as_py()) == expected["set"][0].as_py()
    elif out == "out.npy":
        found = np.load(tmp_path / out, mmap_mode="r", allow_pickle=False)
        assert found.dtype.names == tuple(expected.column_names) and found.dtype["prediction"] == "<U3"
        for name in ("row_id", "prediction", "probability_yes", "total", "epistemic"):
            assert np.array_equal(found[name], expected[name].to_numpy()), name
        assert [json.loads(w) for w in found["set"]] == expected["set"].to_pylist()
    else:
        read = pa.feather.read_table if out == "out.arrow" else pa.parquet.read_table
        assert read(tmp_path / out).combine_chunks().equals(expected.combine_chunks())
    assert not list(tmp_path.rglob(".*")), "hidden files were left"


def test_a_folder_in_and_a_folder_out(model, rows, expected, tmp_path):
    write(rows.slice(0, 900), tmp_path / "in" / "b.csv"), write(rows.slice(900), tmp_path / "in" / "deep" / "a.parquet")
    vbdl.predict_table(model, tmp_path / "in", tmp_path / "out", **SMALL)
    b = pa.parquet.read_table([tmp_path / "out" / f"b-0000{i}.parquet" for i in range(3)])
    a = pa.parquet.read_table([tmp_path / "out" / "deep" / f"a-0000{i}.parquet" for i in range(4)])
    assert a["row_id"].to_pylist() == list(range(1_100))
    both = pa.concat_tables([b, a]).drop_columns(["row_id"]).combine_chunks()
    assert both.equals(expected.drop_columns(["row_id"]).combine_chunks())


def test_several_files_as_one_say_where_a_row_is_from(model, rows, tmp_path):
    write(rows.slice(0, 500), tmp_path / "in" / "007.csv"), write(rows.slice(500, 400), tmp_path / "in" / "x.csv")
    for out in ("o.parquet", "o.csv"):
        vbdl.predict_table(model, tmp_path / "in", tmp_path / out, **SMALL)
    found = pa.parquet.read_table(tmp_path / "o.parquet")
    assert found["source"].to_pylist() == ["007.csv"] * 500 + ["x.csv"] * 400
    assert pa.csv.read_csv(tmp_path / "o.csv")["source"].to_pylist() == found["source"].to_pylist()


def test_columns_are_chosen_and_carried_over(model, rows):
    found = vbdl.predict_table(model, rows, columns=("prediction", "confidence"), keep=("id", "y"), **SMALL)
    assert found.column_names == ["row_id", "id", "y", "prediction", "confidence"]
    assert found["id"].to_pylist() == rows["id"].to_pylist()
    found = vbdl.predict_table(model, rows, columns=("probabilities", "standard_error"), **SMALL)
    classes = [name.removeprefix("probability_") for name in found.column_names if name.startswith("probability_")]
    assert len(classes) > 1
    assert [n for n in found.column_names if n.startswith("standard")] == [f"standard_error_{c}" for c in classes]


@pytest.mark.parametrize(
    "options, said",
    [
        ({"columns": ("mean",)}, "have no 'mean'"),
        ({"columns": ("nothing",)}, "no output column 'nothing'"),
        ({"keep": ("absent",)}, "absent"),
        ({"interval": 0.9}, "of a regression"),
        ({"interval": 1.0}, "interval"),
        ({"tile": 100}, "multiple of 64"),
        ({"chunk_rows": 0}, "chunk_rows"),
        ({"workers": 0}, "workers"),
        ({"engine": "spark"}, "engine"),
        ({"on_error": "ignore"}, "on_error"),
    ],
)
def test_options_that_make_no_sense(model, rows, options, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        vbdl.predict_table(model, write(rows, tmp_path / "t.csv"), **{**SMALL, **options})
    assert set(COLUMNS) >= {"mean", "set", "action"}


# -- rows that cannot be used


def damaged(rows, path):
    pa.csv.write_csv(rows, path)
    lines = path.read_text().splitlines()
    lines[11] = '"row-10",1'  # a row of two cells
    cells = lines[501].split(",")
    lines[501] = ",".join([cells[0], "oops", *cells[2:]])
    cells = lines[1_001].split(",")
    lines[1_001] = ",".join([cells[0], "inf", *cells[2:]])
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("chunk_rows", [300, 11, 10, 5_000])
def test_bad_rows_are_left_out_and_said(model, rows, expected, tmp_path, chunk_rows):
    source = damaged(rows, tmp_path / "t.csv")
    report = vbdl.predict_table(model, source, tmp_path / "o.parquet", **{**SMALL, "chunk_rows": chunk_rows})
    assert (report.rows, report.rejected) == (1_997, 3)
    said = [json.loads(line) for line in report.quarantine.read_text().splitlines()]
    assert [(e["source"], e["row"]) for e in said] == [("t.csv", 10), ("t.csv", 500), ("t.csv", 1_000)]
    assert "2 cells" in said[0]["reason"] and "'oops'" in said[1]["reason"] and "inf" in said[2]["reason"]
    kept = [i for i in range(2_000) if i not in (10, 500, 1_000)]
    found = pa.parquet.read_table(tmp_path / "o.parquet").combine_chunks()
    assert found.equals(expected.take(kept).combine_chunks())


def test_bad_rows_can_stop_the_job(model, rows, tmp_path):
    source = damaged(rows, tmp_path / "t.csv")
    with pytest.raises(ValueError, match="t.csv, row 10: the row has 2 cells"):
        vbdl.predict_table(model, source, tmp_path / "o.parquet", on_error="stop", **SMALL)
    assert not (tmp_path / "o.parquet").exists()


def test_a_damaged_file_is_said_and_the_others_finish(model, rows, tmp_path):
    path = write(rows, tmp_path / "in" / "a.parquet")
    data = bytearray(path.read_bytes())
    group = pa.parquet.read_metadata(path).row_group(7).column(1)
    at = group.dictionary_page_offset or group.data_page_offset
    data[at : at + 60] = b"\xff" * 60
    path.write_bytes(data)
    write(rows, tmp_path / "in" / "b.parquet")
    report = vbdl.predict_table(model, tmp_path / "in", tmp_path / "out", **{**SMALL, "chunk_rows": 100})
    assert list(report.failed) == ["a.parquet"] and "cannot be read as parquet" in report.failed["a.parquet"]
    found = pa.parquet.read_table(sorted((tmp_path / "out").glob("b-*.parquet")))
    assert found.num_rows == 2_000 and report.rows >= 2_000


@pytest.mark.parametrize("column", ["a", "word"])
def test_a_file_of_another_type_is_said_and_the_others_finish(model, rows, tmp_path, column):
    other = {"a": pa.array(range(2_000), pa.timestamp("s")), "word": pa.array([{"x": 1}] * 2_000)}[column]
    write(rows.set_column(rows.column_names.index(column), column, other), tmp_path / "in" / "a.parquet")
    write(rows, tmp_path / "in" / "b.parquet")
    report = vbdl.predict_table(model, tmp_path / "in", tmp_path / "out", **SMALL)
    assert list(report.failed) == ["a.parquet"] and f"column {column!r} holds" in report.failed["a.parquet"]
    assert report.rows == 2_000 and {p.name[0] for p in (tmp_path / "out").glob("*.parquet")} == {"b"}
    with pytest.raises(ValueError, match=f"a.parquet.*column {column!r} holds"):
        vbdl.predict_table(model, tmp_path / "in", tmp_path / "stopped", on_error="stop", **SMALL)


def test_unseen_categories_are_counted(model, rows, tmp_path):
    place = rows.column_names.index("word")
    words = ["new" if i % 100 == 0 else w for i, w in enumerate(rows["word"].to_pylist())]
    source = write(rows.set_column(place, "word", pa.array(words)), tmp_path / "t.parquet")
    report = vbdl.predict_table(model, source, tmp_path / "o.parquet", **SMALL)
    assert report.unseen == {"word": 20} and "20 cells with a category" in str(report)


def test_missing_cells_of_columns_that_were_complete_in_training_are_counted(model, rows, tmp_path):
    gaps = {name: [None if i % 100 < 2 else v for i, v in enumerate(rows[name].to_pylist())] for name in ("a", "word")}
    table = rows
    for name, cells in gaps.items():
        table = table.set_column(table.column_names.index(name), name, pa.array(cells))
    report = vbdl.predict_table(model, write(table, tmp_path / "t.parquet"), tmp_path / "o.parquet", **SMALL)
    assert report.rows == 2_000 and report.filled == {"a": 40, "word": 40}  # and not b, which had gaps in training
    assert "column 'a': 40 missing cells filled, where training had none" in str(report)


def test_a_missing_column_is_named(model, rows, tmp_path):
    with pytest.raises(ValueError, match="no column 'word'"):
        vbdl.predict_table(model, rows.drop_columns(["word"]), **SMALL)
    source = write(rows.drop_columns(["word"]), tmp_path / "t.parquet")
    with pytest.raises(ValueError, match="no column 'word'"):
        vbdl.predict_table(model, source, tmp_path / "o.parquet", on_error="stop", **SMALL)


@pytest.mark.parametrize("name", ["t.csv", "t.parquet", "t.arrow"])
def test_columns_of_a_file_that_are_not_there_or_twice_are_named(model, rows, tmp_path, name):
    source = write(rows.drop_columns(["word"]), tmp_path / "less" / name)
    with pytest.raises(ValueError, match="no column 'word'; it has \\['id'"):
        vbdl.predict_table(model, source, **SMALL)
    twice = rows.append_column("word", rows["word"])
    with pytest.raises(ValueError, match="two columns called 'word'"):
        vbdl.predict_table(model, write(twice, tmp_path / "more" / name), **SMALL)
    unused = rows.append_column("id", rows["id"])
    assert vbdl.predict_table(model, write(unused, tmp_path / "unused" / name), **SMALL).num_rows == 2_000


# -- networks that were not made from a table


@pytest.fixture(scope="module")
def network():
    return vbdl.Predictor(
        vbdl.DeepEnsemble(nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2)), 4),
        vbdl.HeteroscedasticGaussian(),
        compile=False,
    )


@pytest.fixture(scope="module")
def numbers():
    return np.random.default_rng(0).normal(size=(400, 5)).astype(np.float32)


def test_arrays_columns_and_vectors_are_the_same_rows(network, numbers, tmp_path):
    expected = network.replace(tiles=(64,))(torch.from_numpy(numbers))
    np.save(tmp_path / "x.npy", numbers)
    np.save(tmp_path / "x64.npy", numbers.astype(np.float64))
    columns = {f"f{i}": numbers[:, i] for i in range(5)}
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(numbers.reshape(-1)), 5)

    class Pairs(torch.utils.data.Dataset):
        def __len__(self):
            return 400

        def __getitem__(self, row):
            return numbers[row], 0

    forms = [
        numbers, torch.from_numpy(numbers), tmp_path / "x.npy", tmp_path / "x64.npy", pa.table(columns),
        pa.table({"x": vectors}), Pairs(),
        torch.utils.data.TensorDataset(torch.from_numpy(numbers)),
    ]  # fmt: skip
    for data in forms:
        found = vbdl.predict_table(network, data, **SMALL)
        assert np.array_equal(found["mean"], expected.mean.flatten()), type(data)
        assert found.column_names == ["row_id", "mean", "std", "total", "aleatoric", "epistemic"]
    named = vbdl.predict_table(network, {"g": numbers[:, 0], **columns}, inputs=tuple(columns), **SMALL)
    assert np.array_equal(named["mean"], expected.mean.flatten())


def test_an_interval_is_the_mixtures_own(network, numbers):
    found = vbdl.predict_table(network, numbers, interval=0.8, **SMALL)
    low, high = network(torch.from_numpy(numbers), samples=True).interval(0.8)
    assert np.allclose(found["lower"], low.flatten(), atol=1e-6) and np.allclose(
        found["upper"], high.flatten(), atol=1e-6
    )


def test_rows_that_are_not_finite(network, numbers, tmp_path):
    bad = numbers.copy()
    bad[[3, 77], 2] = np.nan, np.inf
    np.save(tmp_path / "x.npy", bad)
    for data in (tmp_path / "x.npy", pa.table({f"f{i}": bad[:, i] for i in range(5)}), bad):
        found = vbdl.predict_table(network, data, **SMALL)
        assert found["row_id"].to_pylist() == [i for i in range(400) if i not in (3, 77)]


class Codes(nn.Module):
    """The first number is a code of ten; others are no code, and the lookup raises."""

    def __init__(self):
        super().__init__()
        self.codes, self.out = nn.Embedding(10, 3), nn.Linear(7, 2)

    def forward(self, x):
        return self.out(torch.cat([self.codes(x[:, 0].long()), x[:, 1:]], dim=1))


@pytest.fixture(scope="module")
def coded(numbers):
    """A network that raises on some rows, rows with such among them, and predictions of the others."""
    predict = vbdl.Predictor(vbdl.DeepEnsemble([Codes() for _ in range(3)]), vbdl.Categorical(), compile=False)
    x = numbers.copy()
    x[:, 0] = np.arange(400) % 10
    clean = vbdl.predict_table(predict, x, **SMALL)
    x[[0, 77, 78, 200, 399], 0] = 10, 11, -3, 99, 10
    x[300:364, 0] = 12
    return predict, x, clean.filter(pa.array(x[:, 0] == np.arange(400) % 10))


@pytest.mark.parametrize("chunk_rows, workers", [(400, 1), (400, 3), (100, 2), (64, 1)])
def test_rows_that_the_model_raises_on_are_alone_in_quarantine(coded, tmp_path, chunk_rows, workers):
    """Also where they are first, last, side by side, or all of a chunk; no bit of the others changes."""
    predict, x, expected = coded
    np.save(tmp_path / "x.npy", x)
    options = {**SMALL, "chunk_rows": chunk_rows, "workers": workers}
    report = vbdl.predict_table(predict, tmp_path / "x.npy", tmp_path / "out.parquet", **options)
    assert (report.rows, report.rejected) == (331, 69) and report.reasons[0].startswith(
        "x.npy, row 0: the model raised"
    )
    assert pa.parquet.read_table(tmp_path / "out.parquet").combine_chunks().equals(expected.combine_chunks())
    reasons = [json.loads(line) for line in report.quarantine.read_text().splitlines()]
    assert [r["row"] for r in reasons] == [i for i in range(400) if i not in set(expected["row_id"].to_pylist())]
    with pytest.raises(ValueError, match="row 0: the model raised"):
        vbdl.predict_table(predict, tmp_path / "x.npy", tmp_path / "stopped", on_error="stop", **options)


def test_a_model_that_raises_on_every_row_is_an_error_and_no_quarantine(coded, numbers, tmp_path, monkeypatch):
    predict, x, _ = coded
    with pytest.raises(ValueError, match="computed an index out of range"):
        vbdl.predict_table(predict, numbers[:, :4], **SMALL)
    # and one that breaks in the middle: no row is blamed for that
    call, calls = vbdl.Predictor.__call__, []
    record, recorded = Folder.record, threading.Event()

    def noted(self, entry):
        record(self, entry)
        if entry["chunk"] == 1:
            recorded.set()

    def broken(self, x, **options):
        calls.append(x)
        if len(calls) > 2:
            recorded.wait(60)  # the writer is a chunk behind, and an error stops it where it is
            raise RuntimeError("the device is gone")
        return call(self, x, **options)

    monkeypatch.setattr(Folder, "record", noted)
    monkeypatch.setattr(vbdl.Predictor, "__call__", broken)
    with pytest.raises(RuntimeError, match="the device is gone"):
        options = {**SMALL, "chunk_rows": 100, "workers": 1}  # one call a chunk, on any number of cores
        vbdl.predict_table(predict, numbers.clip(0, 1), tmp_path / "out", **options)
    # what was written before it broke stays
    written = [json.loads(line) for line in (tmp_path / "out" / "_journal.jsonl").read_text().splitlines()]
    assert [line["chunk"] for line in written if "chunk" in line] == [0, 1]


def test_a_wrong_number_of_columns_is_an_error(network, tmp_path):
    network.save(tmp_path / "m", example=torch.zeros(1, 5))
    with pytest.raises(ValueError, match="takes rows of 5 numbers, and there are 4"):
        vbdl.predict_table(tmp_path / "m", {f"f{i}": [0.0, 1.0] for i in range(4)}, **SMALL)


def test_images_of_a_folder(tmp_path):
    image = pytest.importorskip("PIL.Image")
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (9, 6, 6, 3), dtype=np.uint8)
    (tmp_path / "in").mkdir()
    for i, one in enumerate(pixels):
        image.fromarray(one).save(tmp_path / "in" / f"{i}.png")
    (tmp_path / "in" / "4.png").write_bytes(b"not an image")
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(64, 3))
    predict = vbdl.Predictor(vbdl.MCDropout(net), vbdl.Categorical(), 8, compile=False)
    report = vbdl.predict_table(predict, tmp_path / "in", tmp_path / "o.parquet", **SMALL)
    assert (report.rows, report.rejected) == (8, 1) and "4.png" in report.reasons[0]
    found = pa.parquet.read_table(tmp_path / "o.parquet")
    keep = [i for i in range(9) if i != 4]
    x = torch.from_numpy(pixels[keep]).permute(0, 3, 1, 2).float() / 255
    probs = np.stack([found[f"probability_{i}"] for i in range(3)], axis=1)
    torch.testing.assert_close(torch.tensor(probs), predict(x).probs, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "shape, dtype",
    [
        ((1, 6, 6), torch.float32),
        ((3, 6, 6), torch.float32),
        ((4, 6, 6), torch.float32),
        ((6, 6), torch.float32),
        ((6, 6, 1), torch.float32),
        ((6, 6, 3), torch.float32),
        ((3, 6, 6), torch.uint8),
    ],
)
def test_images_are_rows_of_the_shape_that_the_model_takes(tmp_path, shape, dtype):
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 6, 3), dtype=np.uint8)
    (tmp_path / "in").mkdir()
    rows = []
    mode = {3: "RGB", 4: "RGBA"}.get(max(s for s in shape if s != 6) if 6 in shape and len(shape) == 3 else 1, "L")
    for i, one in enumerate(pixels):
        drawn = image.fromarray(one)
        drawn.save(tmp_path / "in" / f"{i}.png")
        values = torch.tensor(np.array(drawn.convert(mode))).reshape(6, 6, -1)
        values = values.reshape(6, 6) if len(shape) == 2 else values if shape[0] == 6 else values.permute(2, 0, 1)
        rows.append(values / 255 if dtype.is_floating_point else values)
    image.fromarray(pixels[0, :4]).save(tmp_path / "in" / "small.png")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.d, self.l = nn.Dropout(0.2), nn.Linear(int(np.prod(shape)), 2)

        def forward(self, x):
            return self.l(self.d(x.flatten(1).float()))

    x = torch.stack(rows)
    predict = vbdl.Predictor(vbdl.MCDropout(Net()), vbdl.Categorical(), 4, compile=False)
    predict.save(tmp_path / "m", example=x)
    loaded = vbdl.load(tmp_path / "m", module=Net(), compile=False)
    report = vbdl.predict_table(loaded, tmp_path / "in", tmp_path / "o.parquet", **SMALL)
    assert (report.rows, report.rejected) == (5, 1) and "the model takes" in report.reasons[0]
    found = pa.parquet.read_table(tmp_path / "o.parquet")
    np.testing.assert_allclose(found["probability_1"], predict(x).probs[:, 1], rtol=0, atol=1e-6)


def test_many_classes_are_a_list(numbers):
    predict = vbdl.Predictor(vbdl.DeepEnsemble(nn.Linear(5, 30), 2), vbdl.Categorical(), compile=False)
    found = vbdl.predict_table(predict, numbers, **SMALL)
    assert str(found.schema.field("probabilities").type) == "fixed_size_list<item: float>[30]"
    assert np.allclose(np.array(found["probabilities"].to_pylist()).sum(1), 1, atol=1e-5)


# -- places


@pytest.mark.parametrize("name", ["o.csv.gz", "o.tsv", "o.json", "o.XLSX"])
def test_a_file_of_a_kind_that_is_not_written_does_not_become_a_folder(model, rows, tmp_path, name):
    with pytest.raises(ValueError, match="file of another kind"):
        vbdl.predict_table(model, rows, tmp_path / name, **SMALL)
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_over(model, rows, tmp_path):
    source = write(rows, tmp_path / "in" / "t.csv")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep me")
    with pytest.raises(ValueError, match="mine.txt"):
        vbdl.predict_table(model, source, tmp_path / "full", **SMALL)
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["mine.txt"]
    with pytest.raises(ValueError, match="is the input or lies in it"):
        vbdl.predict_table(model, tmp_path / "in", tmp_path / "in" / "out", **SMALL)
    (tmp_path / "o.csv").write_text("mine")
    with pytest.raises(ValueError, match="is there already"):
        vbdl.predict_table(model, source, tmp_path / "o.csv", **SMALL)
    assert (tmp_path / "o.csv").read_text() == "mine" and (tmp_path / "full" / "mine.txt").read_text() == "keep me"


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz", "t.parquet", "t.arrow", "t.feather"])
@pytest.mark.parametrize("out", ["o.parquet", "o.csv", "o.arrow", "o.npy", "folder"])
def test_no_rows_give_an_output_of_no_rows(model, rows, expected, tmp_path, name, out, capsys):
    source = write(rows.slice(0, 0), tmp_path / name)
    assert vbdl.cli.main(["predict", *map(str, (model, source, tmp_path / out))]) == 0
    assert "0 rows in" in capsys.readouterr().out
    if out == "o.csv":
        assert (tmp_path / out).read_text().count("\n") == 1
        found = pa.csv.read_csv(tmp_path / out)
    elif out == "o.npy":
        found = np.load(tmp_path / out, allow_pickle=False)
        assert found.dtype.names == tuple(expected.column_names) and len(found) == 0
        return
    else:
        found = (pa.feather.read_table if out == "o.arrow" else pa.parquet.read_table)(tmp_path / out)
        assert found.schema.equals(expected.schema)
    assert found.column_names == expected.column_names and found.num_rows == 0


def test_no_rows_in_memory_and_beside_files_that_have_some(model, rows, expected, network, numbers, tmp_path):
    assert vbdl.predict_table(model, rows.slice(0, 0), **SMALL).schema.equals(expected.schema)
    found = vbdl.predict_table(network, numbers[:0], **SMALL)
    assert found.schema.equals(vbdl.predict_table(network, numbers, **SMALL).schema) and found.num_rows == 0
    np.save(tmp_path / "x.npy", numbers[:0])
    assert vbdl.predict_table(network, tmp_path / "x.npy", **SMALL).schema.equals(found.schema)
    write(rows.slice(0, 0), tmp_path / "in" / "a.csv"), write(rows, tmp_path / "in" / "b.csv")
    for out in ("o.parquet", "folder"):
        report = vbdl.predict_table(model, tmp_path / "in", tmp_path / out, keep=("id",), **SMALL)
        assert (report.rows, report.rejected, report.failed) == (2_000, 0, {})
        assert pa.parquet.read_table(tmp_path / out)["id"].to_pylist() == rows["id"].to_pylist()


def test_a_first_chunk_of_bad_rows_only_knows_its_columns(network, numbers, tmp_path):
    """Also where no artifact says what a row is."""
    bad = numbers.copy()
    bad[:100] = np.nan
    np.save(tmp_path / "x.npy", bad)
    options = {**SMALL, "chunk_rows": 100}
    for out in ("o.parquet", "o.csv"):
        report = vbdl.predict_table(network, tmp_path / "x.npy", tmp_path / out, **options)
        assert (report.rows, report.rejected) == (300, 100)
    found = vbdl.predict_table(network, tmp_path / "x.npy", **options)
    assert pa.parquet.read_table(tmp_path / "o.parquet").combine_chunks().equals(found.combine_chunks())


def test_names_of_files_that_are_not_utf8(model, rows, tmp_path):
    """In the input's name, in files of a folder, and in the output's; what is printed and stored is UTF-8."""
    odd = os.fsdecode(b"caf\xe9")
    for suffix in (".csv", ".csv.gz", ".parquet", ".arrow"):
        source = write(rows, tmp_path / "one" / f"t{suffix}")
        (tmp_path / "in" / f"{odd}-{suffix[1]}{len(suffix)}").mkdir(parents=True)
        source.rename(tmp_path / "in" / f"{odd}-{suffix[1]}{len(suffix)}" / f"{odd}{suffix}")
    for out in (f"{odd}.csv", f"{odd}.parquet", f"{odd}.arrow", odd):
        report = vbdl.predict_table(model, tmp_path / "in", tmp_path / out, **SMALL)
        assert report.rows == 8_000 and "caf%E9" in str(report).encode().decode()
    table = pa.parquet.read_table(pa.BufferReader((tmp_path / f"{odd}.parquet").read_bytes()))
    assert table["source"].unique().to_pylist() == [
        "caf%E9-a6/caf%E9.arrow", "caf%E9-c4/caf%E9.csv", "caf%E9-c7/caf%E9.csv.gz", "caf%E9-p8/caf%E9.parquet",
    ]  # fmt: skip
    (tmp_path / "in" / f"{odd}-c4" / f"{odd}.csv").write_bytes(b"nothing\n1\n")
    report = vbdl.predict_table(model, tmp_path / "in", tmp_path / "again", **SMALL)
    assert "caf%E9-c4/caf%E9.csv" in report.failed and str(report).encode()
    assert vbdl.predict_table(model, tmp_path / "in", tmp_path / "again", **SMALL).failed == report.failed


def test_the_output_is_free_again_after_a_mistake(model, rows, tmp_path):
    without = write(rows.drop_columns(["word"]), tmp_path / "without.csv")
    source, out = write(rows, tmp_path / "t.csv"), tmp_path / "o.parquet"
    for data, options, said in [
        (without, {}, "nothing to write: .*without.csv .*word"),
        (source, {"interval": 0.9}, "of a regression"),
        (source, {"keep": ("absent",)}, "nothing to write: .*t.csv .*absent"),
    ]:
        with pytest.raises(ValueError, match=said):
            vbdl.predict_table(model, data, out, **SMALL, **options)
    assert vbdl.predict_table(model, source, out, **SMALL).rows == 2_000


def test_the_old_name_of_the_report_is_deprecated(model, rows, tmp_path):
    import vbdl.batch.report

    with pytest.warns(DeprecationWarning, match="JobReport"):
        old = vbdl.batch.report.Report
    assert isinstance(vbdl.predict_table(model, rows, tmp_path / "out", **SMALL), old)


def test_a_source_of_ones_own_inherits_its_version(network, tmp_path):
    from vbdl.batch.sources import Chunk, Source

    class Doubled(Source):
        name = "doubled"

        def state(self):
            return {"name": self.name, "rows": 3}

        def count(self):
            return 3

        def chunks(self, size, skip):
            if not skip(0):
                yield Chunk(0, np.arange(3), torch.arange(15.0).reshape(3, 5))

    source = Doubled()
    assert source.version() == source.state()
    assert vbdl.predict_table(network, source, tmp_path / "out", **SMALL).rows == 3
    assert vbdl.predict_table(network, [source], **SMALL).num_rows == 3
    with pytest.raises(ValueError, match="keep is for columns of tables"):
        vbdl.predict_table(network, source, keep=("id",), **SMALL)
