"""What a missing cell is: decided by the schema, and the same by file, row and frame, in training and prediction."""

import contextlib

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

from vbdl.tabular import Schema, TableOptions, fit_table
from vbdl.tabular.reading import NULLS, Reading
from vbdl.tabular.target import fit_target

pytestmark = pytest.mark.usefixtures("untrained")
QUICK = TableOptions(epochs=1, n_members=2, width=8, depth=1)
WORDS = [*NULLS, None, " NA ", "  "]
KEPT = ["-", "missing", "na", "none"]  # words of a column of words, unless they are said to mean nothing


def _frame(word):
    random = np.random.default_rng(0)
    cells = random.choice(["DE", "FR", "US"], 240).astype(object)
    cells[::8] = word
    numbers = random.normal(size=240).round(3).astype(object)
    numbers[::8] = word
    numbers = numbers.astype(str) if word is not None else numbers.astype(float)
    return pd.DataFrame({"country": cells, "x": numbers, "z": random.normal(size=240)})


def _given(frame, folder):
    frame.to_csv(folder / "t.csv", index=False)
    frame.to_csv(folder / "t.tsv", index=False, sep="\t")
    table = pa.Table.from_pandas(frame, preserve_index=False)
    pa.parquet.write_table(table, folder / "t.parquet")
    pa.feather.write_feather(table, folder / "t.feather")
    frame.to_csv(folder / "t.csv.gz", index=False)
    return [frame, *(folder / f"t.{s}" for s in ("csv", "tsv", "parquet", "feather", "csv.gz")), table, _rows(frame)]


def _rows(frame):
    """As JSON has them: a number is a number."""
    found = frame.to_dict("records")
    for row in found:
        with contextlib.suppress(ValueError, KeyError):
            row["x"] = float(row["x"])
    return found


@pytest.mark.parametrize("word", WORDS)
def test_a_missing_cell_is_one_in_every_kind_of_file_and_in_memory(word, tmp_path):
    frame = _frame(word)
    y = np.random.default_rng(1).normal(size=240)
    given = _given(frame, tmp_path)
    answers = []
    for data in (frame.assign(y=y), tmp_path / "with.csv"):
        frame.assign(y=y).to_csv(tmp_path / "with.csv", index=False)
        schema = Schema.from_dict(fit_table(data, "y", QUICK, progress=False).schema.to_dict())
        assert [c.indicator for c in schema.columns] == [True, True, False]
        answers += [schema.tensor(one) for one in given]
        country = [f.startswith("country is missing") for f in schema.features].index(True)
        assert answers[-1][:, country].nonzero().flatten().tolist() == list(range(0, 240, 8))
    assert all(x.equal(answers[0]) for x in answers)


@pytest.mark.parametrize("word", KEPT)
def test_other_words_are_words_and_can_be_said_to_be_missing(word, tmp_path):
    frame = _frame(word).drop(columns="x").assign(y=np.random.default_rng(1).normal(size=240))
    for missing, indicator in ((tuple(NULLS), False), (("x", word), True)):
        frame.to_csv(tmp_path / "t.csv", index=False)
        for data in (frame, tmp_path / "t.csv"):
            found = fit_table(data, "y", QUICK, reading=Reading(missing=missing), progress=False).schema
            assert found.columns[0].indicator == indicator and (word in found.columns[0].categories) != indicator
            given = [found.tensor(one) for one in _given(frame, tmp_path)[:-1]]
            given.append(found.tensor(frame.to_dict("records")))
            assert all(x.equal(given[0]) for x in given)


def test_a_category_called_na_is_kept_where_nothing_else_is_missing(tmp_path):
    frame = _frame("NA").drop(columns="x").assign(y=np.random.default_rng(1).normal(size=240))
    frame.to_csv(tmp_path / "t.csv", index=False)
    for data in (frame, tmp_path / "t.csv"):
        found = fit_table(data, "y", QUICK, reading=Reading(missing=()), progress=False)
        assert found.schema.columns[0].categories == ("DE", "FR", "NA", "US")
        given = [found.schema.tensor(one) for one in (frame, tmp_path / "t.csv", frame.to_dict("records"))]
        assert all(x.equal(given[0]) for x in given)
    said = fit_table(frame, "y", QUICK, progress=False).notes
    assert any("'country': 30 times 'NA' is read as missing (--missing" in note for note in said)


def test_rows_whose_target_is_such_a_word_have_none_in_every_kind_of_file(tmp_path):
    frame = pd.DataFrame({"x": np.random.default_rng(0).normal(size=200), "y": ["mild", "None", "severe", "mild"] * 50})
    frame.to_csv(tmp_path / "t.csv", index=False)
    for data in (frame, tmp_path / "t.csv"):
        found = fit_table(data, "y", QUICK, progress=False)
        assert found.schema.target.classes == ("mild", "severe")
        assert any("50 of 200 rows have no y" in note for note in found.notes)
        found = fit_table(data, "y", QUICK, reading=Reading(missing=("NA",)), progress=False)
        assert found.schema.target.classes == ("None", "mild", "severe")
    assert "'None' is read as missing" in str(fit_table(frame, "y", QUICK, progress=False).notes)
    target = fit_target(pa.array(["a", "b", "NA"]), "y", np.arange(3))
    assert target.encode(pa.array(["a", "NA", "", None]))[1].tolist() == [True, False, False, False]


def test_a_schema_of_before_keeps_its_categories():
    """What a frame had as a category is one still; a word that was none is missing."""
    before = {
        "columns": [{"type": "categorical", "name": "c", "categories": ["DE", "NA"], "indicator": False}],
        "target": {"name": "y", "classes": None, "labels": "text", "mean": 0.0, "std": 1.0, "reason": ""},
        "format": 1,
    }
    schema = Schema.from_dict(before)
    assert schema.encode_rows([{"c": "NA"}, {"c": "DE"}, {"c": "?"}]).x.tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 1]]
    assert schema.encode(pa.table({"c": ["NA", "DE", "?"]})).x.tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 1]]


def test_codes_are_one_code_as_numbers_and_as_text(tmp_path):
    codes = np.random.default_rng(0).integers(1, 4, 200)
    frame = pd.DataFrame({"code": codes, "y": np.arange(200) + 0.5})
    frame.to_csv(tmp_path / "t.csv", index=False)
    forms = [frame, frame.assign(code=codes.astype(float)), frame.assign(code=codes.astype(str)), tmp_path / "t.csv"]
    frame.assign(code=codes.astype(float)).to_csv(tmp_path / "floats.csv", index=False)
    forms.append(tmp_path / "floats.csv")
    for data in forms:
        schema = fit_table(data, "y", QUICK, kinds={"code": "categorical"}, progress=False).schema
        found = [schema.tensor(f) for f in (*forms, frame.to_dict("records"))]
        assert all(x.equal(found[0]) for x in found) and found[0].sum(1).eq(1).all()


@pytest.mark.parametrize("value", [pd.NA, pd.NaT, None, float("nan"), np.float64("nan"), np.nan, ""])
def test_every_mark_of_a_missing_cell_in_a_row(value):
    frame = _frame(None).assign(y=np.random.default_rng(1).normal(size=240))
    schema = fit_table(frame, "y", QUICK, progress=False).schema
    found = schema.encode_rows([{"country": value, "x": value, "z": 0.0}])
    assert not found.rejected and found.imputed == {"country": 1, "x": 1}
    scalars = {"country": np.str_("DE"), "x": np.float32(1), "z": np.int64(2)}
    assert schema.encode_rows([scalars]).kept.all()
