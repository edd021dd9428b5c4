"""Columns in memory: what pandas, NumPy and Arrow have types for is taken, or refused by its name."""

import datetime
import decimal

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from vbdl.tabular import as_table, infer

N = 120
RANDOM = np.random.default_rng(0)
MONTHS = pd.Series(pd.period_range("2020-01", periods=N, freq="M"))
GAP = np.arange(N) % 7 > 0

TAKEN = {
    "periods": (MONTHS, "Date"),
    "periods as objects": (MONTHS.astype(object), "Date"),
    "categories of periods": (MONTHS.map(lambda p: p.month).astype("category"), "Categorical"),
    "intervals": (pd.Series(pd.IntervalIndex.from_breaks(np.arange(5)).take(np.arange(N) % 4)), "Categorical"),
    "cut": (pd.Series(pd.cut(RANDOM.normal(size=N), [-9, 0, 9])), "Categorical"),
    "cut with gaps": (pd.Series(pd.cut(np.where(GAP, RANDOM.normal(size=N), np.nan), [-9, 0, 9])), "Categorical"),
    "durations": (pd.Series(pd.to_timedelta(RANDOM.integers(0, 999, N), unit="s")), "Numeric"),
    "nullable whole numbers": (pd.Series(RANDOM.integers(0, 50, N), dtype="Int64").where(GAP), "Numeric"),
    "nullable numbers": (pd.Series(RANDOM.normal(size=N), dtype="Float64").where(GAP), "Numeric"),
    "nullable truth": (pd.Series(RANDOM.random(N) > 0.5, dtype="boolean").where(GAP), "Boolean"),
    "truth and None": (pd.Series([None if i % 7 == 0 else bool(i % 2) for i in range(N)]), "Boolean"),
    "strings": (pd.Series(RANDOM.choice(["u", "v"], N), dtype="string").where(GAP), "Categorical"),
    "strings of Arrow": (pd.Series(RANDOM.choice(["u", "v"], N), dtype="string[pyarrow]"), "Categorical"),
    "sparse": (pd.Series(pd.arrays.SparseArray(np.where(RANDOM.random(N) > 0.7, 1.5, 0))), "Numeric"),
    "zoned": (pd.Series(pd.date_range("2020-01-01", periods=N, tz="Europe/Berlin")), "Date"),
    "decimals": (pd.Series([decimal.Decimal(i) / 4 for i in range(N)]), "Numeric"),
    "halves": (pd.Series(RANDOM.normal(size=N).astype(np.float16)), "Numeric"),
}
ARROW = {
    "durations of Arrow": (pa.array([datetime.timedelta(seconds=i) for i in range(N)]), "Numeric"),
    "runs": (pa.RunEndEncodedArray.from_arrays([N // 2, N], [1.5, 2.5]), "Numeric"),
    "large text": (pa.array(["a", "b"] * (N // 2), pa.large_string()), "Categorical"),
    "dictionary": (pa.array(["1", "2"] * (N // 2)).dictionary_encode(), "Categorical"),
    "wide decimals": (pa.array([decimal.Decimal(i) for i in range(N)], pa.decimal256(50, 2)), "Numeric"),
}
REFUSED = {
    "complex": (pd.Series(RANDOM.normal(size=N) + 1j), "complex numbers"),
    "mixed": (pd.Series([1.5 if i % 2 else "a" for i in range(N)]), "values of several types .float, str"),
    "times of day": (pd.Series([datetime.time(i % 24) for i in range(N)]), "time64.* no kind of input"),
    "lists": (pd.Series([[1, 2]] * N), "list.* no kind of input"),
    "large whole numbers": (pd.Series([10**30] * N, dtype=object), "int, which is no type"),
    "objects": (pd.Series([object()] * N), "object, which is no type"),
}


def _forms(column):
    y = np.arange(N) + 0.5
    yield {"a column": column, "y": y}
    if isinstance(column, pd.Series):
        yield pd.DataFrame({"a column": column, "y": y})


@pytest.mark.parametrize("name", [*TAKEN, *ARROW])
def test_a_kind_of_column_is_taken(name):
    column, kind = (TAKEN | ARROW)[name]
    encoded = []
    for data in _forms(column):
        schema, _ = infer(as_table(data), "y", kinds={"a column": "date"} if kind == "Date" else {})
        assert type(schema.columns[0]).__name__ == kind
        found = schema.encode(data)
        assert not found.rejected and bool(found.x.isfinite().all())
        encoded.append(found.x)
    assert all(x.equal(encoded[0]) for x in encoded)


@pytest.mark.parametrize("name", REFUSED)
def test_a_kind_of_column_is_refused_by_name_and_reason(name):
    column, reason = REFUSED[name]
    for data in _forms(column):
        with pytest.raises(ValueError, match=f"column 'a column' holds {reason}"):
            infer(as_table(data), "y")


def test_a_duration_is_its_seconds_in_a_row_too():
    column, _ = TAKEN["durations"]
    schema, _ = infer(as_table({"t": column, "y": np.arange(N) + 0.5}), "y")
    by_table = schema.encode({"t": column}).x
    assert by_table.equal(schema.encode_rows([{"t": v.to_pytimedelta()} for v in column]).x)
    assert by_table.equal(schema.encode_rows([{"t": v.total_seconds()} for v in column]).x)


def test_columns_of_several_lengths_are_named():
    with pytest.raises(ValueError, match="column 'b' has 1 rows, and column 'a' has 2"):
        as_table({"a": [1, 2], "b": [1]})
    with pytest.raises(ValueError, match=r"column 'a' has the shape \(2, 2\)"):
        as_table({"a": np.eye(2)})
