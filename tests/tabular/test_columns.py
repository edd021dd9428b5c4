"""Cells to numbers: the same from a table and from dicts, and never a guess."""

import datetime
import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pytest
import torch

from vbdl.tabular import Schema, infer
from vbdl.tabular.column_inference import MIN_ROWS


def table(n=200, seed=0):
    random = np.random.default_rng(seed)
    return pa.table(
        {
            "age": pa.array([None if i % 7 == 0 else float(v) for i, v in enumerate(random.normal(40, 9, n))]),
            "rooms": random.integers(1, 9, n),
            "city": [["Porto", "Lisbon", "Faro", None][i] for i in random.integers(0, 4, n)],
            "owner": random.random(n) < 0.4,
            "when": pa.array([datetime.datetime(2020, 1, 1) + datetime.timedelta(hours=int(h)) for h in range(n)]),
            "y": random.normal(size=n),
        }
    )


@pytest.fixture(scope="module")
def schema():
    return infer(table(), "y", kinds={"when": "date"})[0]


def test_types_are_inferred(schema):
    kinds = {c.name: type(c).__name__ for c in schema.columns}
    assert kinds == {"age": "Numeric", "rooms": "Numeric", "city": "Categorical", "owner": "Boolean", "when": "Date"}
    assert schema.features[:3] == ["age", "age is missing", "rooms"]
    assert {"city = Porto", "city is another", "city is missing"} < set(schema.features)


def test_statistics_are_those_of_the_training_rows():
    data = table()
    rows = np.arange(0, 200, 2)
    column = infer(data, "y", rows, {"when": "date"})[0].columns[0]
    values = np.array([v for v in np.array(data["age"].to_pylist(), dtype=float)[rows] if not math.isnan(v)])
    assert column.mean == pytest.approx(values.mean(), rel=1e-12)
    assert column.std == pytest.approx(values.std(), rel=1e-12)
    assert column.fill == pytest.approx(np.median(values), rel=1e-12)
    changed = data.set_column(
        0, "age", pa.array([v if i % 2 == 0 else 1e6 for i, v in enumerate(data["age"].to_pylist())])
    )
    assert infer(changed, "y", rows, {"when": "date"})[0].columns[0] == column


def test_standardized_and_imputed(schema):
    data = table()
    x = schema.encode(data).x
    missing = np.array(data["age"].is_null())
    assert torch.equal(x[:, 1], torch.from_numpy(missing).float())
    known = x[torch.from_numpy(~missing), 0].double()
    assert abs(float(known.mean())) < 1e-6 and abs(float(known.std(correction=0)) - 1) < 1e-6
    age = schema.columns[0]
    assert np.allclose(x[missing, 0], (age.fill - age.mean) / age.std, atol=1e-7)
    assert schema.encode(data).imputed["age"] == missing.sum()


def test_one_number_a_category(schema):
    x = schema.encode(table()).x
    where = [i for i, name in enumerate(schema.features) if name.startswith("city")]
    assert torch.equal(x[:, where].sum(1), torch.ones(200))


cells = st.fixed_dictionaries(
    {
        "age": st.none() | st.floats(-1e30, 1e30) | st.just(math.nan) | st.integers(-(10**6), 10**6).map(float),
        "rooms": st.none() | st.integers(-(2**53), 2**53),
        "city": st.none() | st.sampled_from(["Porto", "Faro", "Lisbon", "Braga", "", "NA"]),
        "owner": st.none() | st.booleans(),
        "when": st.none() | st.datetimes(datetime.datetime(1900, 1, 1), datetime.datetime(2200, 1, 1)),
    }
)


@hypothesis.given(st.lists(cells, min_size=1, max_size=5))
@hypothesis.settings(max_examples=100, deadline=None)
def test_dicts_and_tables_give_the_same_bits(schema, rows):
    types = {
        "age": pa.float64(),
        "rooms": pa.int64(),
        "city": pa.string(),
        "owner": pa.bool_(),
        "when": pa.timestamp("us"),
    }
    columns = {n: pa.array([r[n] for r in rows], t) for n, t in types.items()}
    by_table, by_row = schema.encode(pa.table(columns)), schema.encode_rows(rows)
    assert torch.equal(by_table.x, by_row.x)
    assert by_table.rejected == by_row.rejected
    assert by_table.unseen == by_row.unseen and by_table.imputed == by_row.imputed


def test_an_unseen_category_has_its_own_number_and_is_reported(schema):
    row = table().slice(0, 1).to_pylist()[0]
    found = schema.encode_rows([{**row, "city": "Braga"}, row])
    assert found.unseen == {"city": 1}
    assert found.x[0, schema.features.index("city is another")] == 1
    assert found.rejected == {}


def test_rare_categories_share_the_number_of_unseen_ones():
    words = ["a"] * 50 + ["b"] * 50 + ["rare"] * (MIN_ROWS - 1)
    found, _ = infer(pa.table({"word": words, "y": np.arange(len(words)) + 0.5}), "y")
    assert found.columns[0].categories == ("a", "b")
    assert found.encode_rows([{"word": "rare"}]).x.tolist() == [[0, 0, 1]]


@pytest.mark.parametrize(
    "cell, said",
    [
        ({"age": "forty"}, "'forty' is not a number"),
        ({"age": "40"}, "'40' is not a number"),
        ({"age": True}, "True is not a number"),
        ({"age": math.inf}, "inf is not finite"),
        ({"age": 10**400}, "is not finite"),
        ({"age": 1e300}, "too large"),
        ({"owner": 2}, "2 is neither true nor false"),
        ({"city": ["Porto"]}, "is not a category"),
        ({"when": "yesterday"}, "'yesterday' is not a date"),
    ],
)
def test_a_cell_that_cannot_be_read_rejects_its_row_only(schema, cell, said):
    good = table().slice(3, 1).to_pylist()[0]
    found = schema.encode_rows([good, {**good, **cell}, good])
    assert list(found.rejected) == [1] and said in found.rejected[1]
    assert torch.equal(found.x[0], found.x[2]) and not found.x[1].any()
    assert found.kept.tolist() == [True, False, True]
    with pytest.raises(ValueError, match="row 1"):
        schema.tensor([good, {**good, **cell}])


def test_a_column_left_out_is_not_a_missing_cell(schema):
    good = table().slice(3, 1).to_pylist()[0]
    found = schema.encode_rows([{k: v for k, v in good.items() if k != "rooms"}])
    assert "column 'rooms' is not given" in found.rejected[0]
    with pytest.raises(ValueError, match="no column 'rooms'"):
        schema.encode(table().drop_columns(["rooms"]))


def test_text_in_a_table_is_read_as_numbers_where_it_can_be(schema):
    data = table(20)
    text = [" 31.5", "1e3", "NA", "", "old", None, *["40"] * 14]
    found = schema.encode(data.set_column(0, "age", pa.array(text)))
    assert list(found.rejected) == [4] and "'old'" in found.rejected[4]
    same = schema.encode(data.set_column(0, "age", pa.array([31.5, 1e3, None, None, 0.0, None, *[40.0] * 14])))
    keep = [i for i in range(20) if i != 4]
    assert torch.equal(found.x[keep], same.x[keep])


@pytest.mark.parametrize(
    "kind", [pa.float32(), pa.int8(), pa.uint64(), pa.decimal128(30, 2), pa.dictionary(pa.int32(), pa.int64())]
)
def test_numbers_of_any_type(schema, kind):
    data = table(5)
    values = pa.array([1, 2, 3, 4, 5], pa.int64())
    column = values.dictionary_encode() if pa.types.is_dictionary(kind) else values.cast(kind)
    as_given = schema.encode(data.set_column(1, "rooms", column)).x
    assert torch.equal(as_given, schema.encode(data.set_column(1, "rooms", values)).x)


def test_json_and_back(schema):
    import json

    again = Schema.from_dict(json.loads(json.dumps(schema.to_dict())))
    assert again == schema
    assert torch.equal(again.encode(table()).x, schema.encode(table()).x)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"format": 99}, "format 99"),
        ({"columns": []}, "no column"),
        ({"columns": [{"type": "numeric", "name": "a"}]}, "missing required field"),
        ({"extra": 1}, "unknown field"),
        ({"columns": [{"type": "python", "name": "a"}]}, "Invalid value"),
    ],
)
def test_a_damaged_schema_is_refused(schema, change, said):
    with pytest.raises(ValueError, match=said):
        Schema.from_dict({**schema.to_dict(), **change})


def test_the_example_is_a_row(schema):
    assert schema.example().shape == (1, len(schema.features)) and bool(schema.example().isfinite().all())


def test_no_rows(schema):
    assert schema.encode(table().slice(0, 0)).x.shape == (0, len(schema.features))
    assert schema.encode_rows([]).x.shape == (0, len(schema.features))


def test_a_wide_table_is_not_listed_again_for_each_of_its_columns(monkeypatch):
    """The names of a table's columns are a new list at every look: one look a column is quadratic."""
    from vbdl.tabular import inference, parts, schema

    class Counting:
        looks = 0

        def __init__(self, table):
            self.table = table

        @property
        def column_names(self):
            Counting.looks += 1
            return self.table.column_names

        def __getattr__(self, name):
            return getattr(self.table, name)

    looks = []
    for width in (20, 80):
        data = pa.table({**{f"x{i}": np.random.default_rng(i).normal(size=60) for i in range(width)}, "y": range(60)})
        for module in (inference, schema):
            monkeypatch.setattr(module, "as_table", lambda *_: Counting(data))  # noqa: B023
        Counting.looks = 0
        infer(data, "y")[0].encode(data)
        parts.divide(Counting(data), [f"x{i}" for i in range(width)], None)
        looks.append(Counting.looks)
    assert looks[0] == looks[1]
