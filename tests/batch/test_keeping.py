"""Input columns that are carried over: the text of CSV as it stands, and one type in all parts of a job."""

import csv
import gzip
import io
import random

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet
import pytest
import torch
from torch import nn

import vbdl

OPTIONS = {"chunk_rows": 50, "tile": 64, "compile": False, "progress": False, "workers": 1}
CELLS = [
    "007", "1e5", "12345678901234567890", "12345678901234567891", "NA", "N/A", "nan", "null", "", " ", " x ", "A17",
    'say "hi"', "a,b", "a;b", "one\ntwo", "one\r\ntwo", "\t", "true", "FALSE", "2024-05-01", "2024-05-01T10:00:00Z",
    "0x1F", "-0", "+1", "1.50", "1,5", "inf", "é", "日本", "'", "#", "\\", "\\n", "None", "1_000", "00:00", "\ufeffx",
]  # fmt: skip


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    found = vbdl.Predictor(vbdl.DeepEnsemble(nn.Linear(1, 2), 2), vbdl.Categorical(), compile=False, tiles=(64,))
    found.replace = lambda **settings: found  # traced once
    return found


def write_csv(path, **columns):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t" if path.name.endswith(".tsv") else ",")
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return path


def outputs(network, source, folder, name="id", **options):
    """The kept column of every form of output."""
    for out in ("o.parquet", "o.csv", "o.arrow", "parts", None):
        out = None if out is None else folder / out
        found = vbdl.predict_table(network, source, out, keep=(name,), **OPTIONS, **options)
        if out is None:
            yield found[name].to_pylist()
            continue
        assert not found.failed and not found.rejected, str(found)
        if out.suffix == ".csv":
            with open(out, newline="", encoding="utf-8") as file:
                yield [row[name] for row in csv.DictReader(file)]
        else:
            read = pa.feather.read_table if out.suffix == ".arrow" else pa.parquet.read_table
            yield read(out)[name].to_pylist()


@pytest.mark.parametrize("cells", [*([cell] * 5 for cell in CELLS), CELLS, CELLS[::-1]])
def test_kept_cells_of_csv_are_carried_over_byte_for_byte(network, tmp_path, cells):
    source = write_csv(tmp_path / "t.csv", id=cells, a=range(len(cells)))
    assert vbdl.predict_table(network, source, keep=("id",), **OPTIONS)["id"].to_pylist() == cells


def test_kept_cells_in_every_form_of_output(network, tmp_path):
    source = write_csv(tmp_path / "t.csv", id=CELLS, a=range(len(CELLS)))
    for found in outputs(network, source, tmp_path):
        assert found == CELLS
    for name in ("t.tsv", "t.csv.gz"):
        source = write_csv(tmp_path / name.removesuffix(".gz"), id=CELLS, a=range(len(CELLS)))
        if name.endswith("gz"):
            (tmp_path / name).write_bytes(gzip.compress(source.read_bytes()))
        assert vbdl.predict_table(network, tmp_path / name, keep=("id",), **OPTIONS)["id"].to_pylist() == CELLS


@pytest.mark.parametrize("seed", range(8))
def test_kept_cells_of_any_text(network, tmp_path, seed):
    at = random.Random(seed)
    letters = "01789.,-+eENA \t\"'\n\r;xé日\\/#%"
    cells = ["".join(at.choices(letters, k=at.randrange(8))) for _ in range(300)]
    source = write_csv(tmp_path / "t.csv", id=cells, a=range(300))
    with open(source, newline="", encoding="utf-8") as file:
        expected = [row["id"] for row in csv.DictReader(file)]
    assert vbdl.predict_table(network, source, keep=("id",), **OPTIONS)["id"].to_pylist() == expected == cells


@pytest.mark.parametrize("last", ["A17", "1.5", "2024-05-01", "true", "9" * 30, "x\ny"])
@pytest.mark.parametrize("first", ["7", "1.5", "2024-05-01", "", "true"])
def test_ids_that_change_their_looks_late_do_not_lose_the_file(network, tmp_path, first, last):
    """After more cells than the first block of the file has, in a column that no model reads."""
    cells = [first] * 15_000 + [last]
    padding = ["some words that fill the block" * 4] * len(cells)
    source = write_csv(tmp_path / "t.csv", id=cells, a=[1] * len(cells), more=padding)
    found = vbdl.predict_table(network, source, keep=("id",), inputs=("a",), **{**OPTIONS, "chunk_rows": 10_000})
    assert found["id"].to_pylist() == cells


def test_inputs_that_change_their_looks_late_cost_their_rows_only(network, tmp_path):
    """Where neither schema nor inputs say what a column holds: a decimal point, and a cell that is no number."""
    a = ["1"] * 100_000 + ["2.5", "oops", "", "3"]
    source = write_csv(tmp_path / "t.csv", id=["7"] * len(a), a=a, more=["fills the block"] * len(a))
    report = vbdl.predict_table(
        network, source, tmp_path / "o.parquet", keep=("id",), **{**OPTIONS, "chunk_rows": 30_000}
    )
    assert not report.failed and (report.rows, report.rejected) == (100_002, 2)
    assert "'oops' is not a number" in report.reasons[0]
    expected = network(torch.tensor([[1.0], [2.5], [3.0]])).probs[:, 0]
    found = pa.parquet.read_table(tmp_path / "o.parquet")["probability_0"].to_numpy()
    assert np.allclose(found[[0, -2, -1]], expected, atol=1e-6)


def test_a_cell_that_is_no_number_does_not_change_the_type_of_kept_numbers(model, rows, tmp_path):
    """Columns that the schema names are numbers in all parts, those before the cell and those after it."""
    table = rows.set_column(1, "a", pa.array([*map(str, range(1_500)), "oops", *["0.25"] * 499]))
    pa.csv.write_csv(table, tmp_path / "t.csv")
    for out in ("o.parquet", "o.csv"):
        report = vbdl.predict_table(model, tmp_path / "t.csv", tmp_path / out, keep=("a", "b", "word"), **OPTIONS)
        assert (report.rows, report.rejected, report.failed) == (1_999, 1, {})
    found = pa.parquet.read_table(tmp_path / "o.parquet")
    assert [str(found.schema.field(n).type) for n in ("a", "b", "word")] == ["double", "double", "string"]
    assert found["a"].to_pylist() == [*map(float, range(1_500)), *[0.25] * 499]
    assert found["b"].null_count == rows["b"].null_count - (rows["b"][1_500].as_py() is None)


def test_columns_of_other_orders_are_read_by_name(network, tmp_path):
    """Without schema and inputs the first file's columns of numbers are those of all."""
    wide = vbdl.Predictor(vbdl.DeepEnsemble(nn.Linear(2, 2), 2), vbdl.Categorical(), compile=False)
    (tmp_path / "in").mkdir()
    write_csv(tmp_path / "in" / "1.csv", a=[1, 2], b=[3, 4])
    write_csv(tmp_path / "in" / "2.csv", b=[3, 4], a=[1, 2])
    found = vbdl.predict_table(wide, tmp_path / "in", **OPTIONS)["probability_0"].to_pylist()
    assert found[:2] == found[2:]


INT, TEXT = pa.int64(), pa.string()
IDS = {pa.null(): pa.nulls(2), TEXT: pa.array(["1", "A"]), pa.date32(): pa.array([1, 2], pa.int32())}
IDS |= {pa.bool_(): pa.array([True, False]), pa.dictionary(pa.int32(), TEXT): pa.array(["1", "2"])}


@pytest.mark.parametrize(
    "kinds, expected",
    [
        ([pa.int32(), INT], "int64"), ([pa.uint8(), pa.int8()], "int64"), ([pa.uint64(), INT], "string"),
        ([pa.float32(), pa.int32()], "double"), ([pa.float64(), INT], "string"), ([INT, TEXT], "string"),
        ([TEXT, pa.large_string()], "large_string"), ([INT, pa.dictionary(pa.int32(), TEXT)], "string"),
        ([pa.null(), INT], "int64"), ([pa.bool_(), TEXT], "string"), ([pa.date32(), TEXT], "string"),
        ([INT, "csv"], "string"), (["csv", pa.timestamp("s")], "string"), ([INT, INT], "int64"),
        ([pa.float16(), pa.float64()], "double"), ([pa.decimal128(30, 2), INT], "string"),
    ],
)  # fmt: skip
def test_folders_of_mixed_types_have_one_in_the_output(network, tmp_path, kinds, expected):
    (tmp_path / "in").mkdir()
    words = []
    for number, kind in enumerate(kinds):
        if kind == "csv":
            write_csv(tmp_path / "in" / f"{number}.csv", id=["007", "NA"], a=[1, 2])
            words += ["007", "NA"]
            continue
        ids = IDS.get(kind, pa.array([1, 2]))
        ids = ids.dictionary_encode() if pa.types.is_dictionary(kind) else ids.cast(kind)
        pa.parquet.write_table(pa.table({"id": ids, "a": [1.0, 2.0]}), tmp_path / "in" / f"{number}.parquet")
        words += ids.to_pylist()
    for out in ("o.parquet", "o.csv", "parts"):
        report = vbdl.predict_table(network, tmp_path / "in", tmp_path / out, keep=("id",), inputs=("a",), **OPTIONS)
        assert (report.rows, report.failed) == (2 * len(kinds), {})
        if out != "o.csv":
            found = pa.parquet.read_table(tmp_path / out)["id"]
            assert str(found.type) == expected
            same = [w if w is None or expected != "string" or isinstance(w, str) else str(w) for w in words]
            if not {pa.bool_(), pa.timestamp("s"), pa.float64()} & {k for k in kinds if k != "csv"}:
                assert found.to_pylist() == same
    assert vbdl.predict_table(network, tmp_path / "in", keep=("id",), inputs=("a",), **OPTIONS).num_rows == report.rows


def test_types_that_no_column_holds_are_said_before_a_row_is_computed(network, tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    for number, ids in enumerate([pa.array([[1], [2]]), pa.array([1, 2])]):
        pa.parquet.write_table(pa.table({"id": ids, "a": [1.0, 2.0]}), tmp_path / "in" / f"{number}.parquet")
    monkeypatch.setattr(vbdl.Predictor, "__call__", None)
    with pytest.raises(ValueError, match="column 'id' holds list.* in 0.parquet and other types in other files"):
        vbdl.predict_table(network, tmp_path / "in", tmp_path / "o.parquet", keep=("id",), inputs=("a",), **OPTIONS)


def test_names_of_columns_may_have_line_breaks(network, tmp_path):
    (tmp_path / "in").mkdir()
    for number in range(2):
        write_csv(tmp_path / "in" / f"{number}.csv", **{'the\n"id"': ["1", "2\n3"], "a": [1, 2]})
    report = vbdl.predict_table(network, tmp_path / "in", tmp_path / "o.csv", keep=('the\n"id"',), **OPTIONS)
    with open(tmp_path / "o.csv", newline="") as file:
        found = list(csv.DictReader(io.StringIO(file.read())))
    assert report.rows == 4 and [row['the\n"id"'] for row in found] == ["1", "2\n3"] * 2


def test_dates_and_truths_that_change_their_looks_late(tmp_path):
    """Columns that the schema names, too, are not what the first rows of a file look like."""
    from vbdl.tabular import TableOptions, fit_table

    random_ = np.random.default_rng(0)
    a = random_.normal(size=300)
    table = pa.table({"a": a, "yes": a > 0.3, "y": np.where(a > 0, "u", "v")})
    settings = TableOptions(width=8, depth=1, n_members=2, epochs=2, batch_size=64)
    fit_table(table, "y", settings, progress=False).save(tmp_path / "m")
    yes = ["true", "false"] * 40_000 + ["yes", "no"]
    padding = ["some words that fill the block"] * len(yes)
    source = write_csv(tmp_path / "t.csv", a=[1] * len(yes), yes=yes, more=padding)
    options = {**OPTIONS, "chunk_rows": 30_000}
    found = vbdl.predict_table(tmp_path / "m", source, keep=("yes",), **options)
    assert found["yes"].to_pylist() == yes
    assert found["probability_u"][-2:].to_pylist() == found["probability_u"][:2].to_pylist()
    assert vbdl.predict_table(tmp_path / "m", source, **options).num_rows == len(yes)
