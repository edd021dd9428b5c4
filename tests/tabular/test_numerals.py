"""Numbers as people write them: what they are, and what is said where they are two."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest

from vbdl.tabular import TableOptions, fit_table, infer
from vbdl.tabular.numerals import Ambiguous, Mostly, recognize
from vbdl.tabular.reading import Reading

STYLES = [(".", ","), (",", "."), (".", "'"), (",", " "), (".", ""), (",", "")]


def written(value, decimal, thousands, digits=2):
    text = f"{value:,.{digits}f}"
    return text.translate({ord(","): thousands, ord("."): decimal})


@hypothesis.given(
    st.lists(st.floats(-1e9, 1e9).map(lambda v: round(v, 2)), min_size=2, max_size=30),
    st.sampled_from(STYLES),
    st.sampled_from(["", "%", "€", "EUR", "$"]),
    st.booleans(),
)
@hypothesis.settings(max_examples=200, deadline=None)
def test_what_is_recognized_is_what_was_written(values, style, unit, before):
    values = [*values, 1234567.25]  # no other reading
    words = [f"{unit} {w}" if before else f"{w} {unit}" for w in (written(v, *style) for v in values)]
    found = recognize(dict.fromkeys(words, 1), "x")
    assert [found.written.number(w) for w in words] == values
    assert (found.written.decimal, found.written.unit) == (style[0], unit.lower())


@pytest.mark.parametrize(
    "words, numbers",
    [
        (["(1,200.50)", "3"], [-1200.5, 3]),
        (["12-", "+3"], [-12, 3]),
        (["\u22125", "4 "], [-5, 4]),
        (["$-5", "-$1,000.0"], [-5, -1000]),
        (["12,34,567", "5.5"], [1234567, 5.5]),
        (["1\u202f234,5", "1 234"], [1234.5, 1234]),
        (["1e3", "2.5E-1"], [1000, 0.25]),
        (["0,126", "1,234"], [0.126, 1.234]),
        (["-0,126", "-2,612"], [-0.126, -2.612]),
        (["R$ 1.234,56", "7"], [1234.56, 7]),
    ],
)
def test_signs_groups_and_powers(words, numbers):
    found = recognize(dict.fromkeys(words, 1), "x")
    assert [found.written.number(w) for w in words] == numbers


@pytest.mark.parametrize(
    "words",
    [["A11", "A12"], ["50%", "0.5"], ["\u00a31", "$2"], ["12 kg", "3 kg"], ["2024-01-31"], ["12:30"], ["10.0.0.1"]],
)
def test_what_are_no_numbers_is_left_alone(words):
    assert recognize(dict.fromkeys(words, 1), "x") is None


def test_two_readings_are_refused_and_resolved():
    words = dict.fromkeys(["1,234", "12,345", "7"], 1)
    with pytest.raises(Ambiguous, match=r"'1,234' is 1234 \(--thousands \",\"\) or 1\.234 \(--decimal \",\"\)|or 1234"):
        recognize(words, "x")
    assert recognize(words, "x", decimal=",").written.number("1,234") == 1.234
    assert recognize(words, "x", thousands=",").written.number("1,234") == 1234
    assert recognize(words, "x", decimal=".").written.number("1,234") == 1234


def test_cells_that_are_mostly_numbers_say_which_are_not():
    found = recognize({**dict.fromkeys(map(str, range(99)), 1), "abc": 1}, "x")
    assert found == Mostly(0.99, ("abc",))


def _table(n=300):
    random = np.random.default_rng(0)
    income = random.lognormal(8, 1, n)
    return {
        "income": [f"{v:,.2f}" if i % 2 else f"{v:.2f}" for i, v in enumerate(income)],
        "score": [f"{v} %" for v in random.integers(0, 100, n)],
        "visits": ["?" if i % 50 == 0 else f"{v} " for i, v in enumerate(random.integers(0, 40, n))],
        "price": [written(v, ",", ".") + " €" for v in random.lognormal(8, 1, n)],
        "code": [f"{v:03d}" for v in random.integers(0, 12, n)],
        "y": np.where(income > np.median(income), "rich", "poor"),
    }


QUICK = TableOptions(epochs=1, n_members=2, width=8, depth=1)


def test_a_table_of_them_is_numbers_and_says_so():
    found = fit_table(_table(), "y", QUICK, progress=False)
    kinds = {c.name: type(c).__name__ for c in found.schema.columns}
    assert kinds == {n: "Numeric" for n in ("income", "score", "visits", "price")} | {"code": "Categorical"}
    for name in kinds:
        assert any(f"column {name!r}" in note for note in found.notes), name
    assert found.schema.columns[2].indicator
    values = [float(w.replace(",", "")) for w in _table()["income"]]
    train = np.array(values)[found.rows["train"].numpy()]
    assert found.schema.columns[0].mean == pytest.approx(train.mean(), rel=1e-12)


def test_a_cell_is_the_same_number_by_file_row_and_frame(tmp_path):
    data = _table()
    pd.DataFrame(data).to_csv(tmp_path / "t.csv", index=False)
    pd.DataFrame(data).to_csv(tmp_path / "semicolons.csv", index=False, sep=";")
    pa.parquet.write_table(pa.table(data), tmp_path / "t.parquet")
    pd.DataFrame(data).to_csv(tmp_path / "latin.csv", index=False, encoding="cp1252")
    for given in (data, tmp_path / "t.csv", pd.DataFrame(data)):
        found = fit_table(given, "y", QUICK, kinds={"code": "categorical"}, progress=False)
        rows = [dict(zip(data, row, strict=True)) for row in zip(*data.values(), strict=True)]
        x = found.schema.tensor(rows)
        for other in (data, pd.DataFrame(data), *(tmp_path / f for f in ("t.csv", "semicolons.csv", "t.parquet"))):
            assert x.equal(found.schema.tensor(other)), other
    options = Reading(encoding="cp1252")
    found = fit_table(
        tmp_path / "latin.csv", "y", QUICK, kinds={"code": "categorical"}, reading=options, progress=False
    )
    assert x.equal(found.schema.tensor(tmp_path / "latin.csv")) and found.schema.reading.encoding == "cp1252"
    with pytest.raises(ValueError, match="not text in UTF-8: --encoding"):
        fit_table(tmp_path / "latin.csv", "y", QUICK, progress=False)


def test_a_file_of_decimal_commas_is_read_so_throughout(tmp_path):
    """1.234 beside 1,5 is a thousand: read alone a program takes it for a number with decimals."""
    random = np.random.default_rng(0)
    big, small = random.integers(1_000, 900_000, 300), random.normal(size=300)
    both = list(zip(big.tolist(), small.round(2).tolist(), strict=True))
    lines = [f"{written(b, ',', '.', 0)};{written(s, ',', '')};{written(b * s, ',', '')}" for b, s in both]
    (tmp_path / "t.csv").write_text("\n".join(["big;small;y", *lines]))
    found = fit_table(tmp_path / "t.csv", "y", QUICK, progress=False)
    columns = {c.name: c for c in found.schema.columns}
    train = found.rows["train"].numpy()
    assert columns["big"].mean == pytest.approx(big[train].mean(), rel=1e-12)
    assert columns["small"].mean == pytest.approx(small.round(2)[train].mean(), abs=1e-12)
    assert found.schema.target.mean == pytest.approx((big * small.round(2))[train].mean(), abs=0.01)
    x = found.schema.tensor(tmp_path / "t.csv")
    assert x.equal(found.schema.tensor({"big": big, "small": small.round(2)}))
    assert x.equal(found.schema.tensor([{"big": b, "small": s} for b, s in both]))


def test_a_target_written_by_people_is_a_number():
    random = np.random.default_rng(0)
    x = random.normal(size=300)
    data = {"x": x, "y": [f"€ {5000 + 900 * v:,.2f}" for v in x]}
    found = fit_table(data, "y", QUICK, progress=False)
    assert found.schema.target.task == "regression" and 4_500 < found.schema.target.mean < 5_500
    digits = {"x": x, "y": [str(v) for v in random.integers(0, 30, 300)]}  # names of classes
    assert fit_table(digits, "y", QUICK, progress=False).schema.target.task == "classification"


def test_a_column_that_is_almost_numbers_names_the_way_out():
    data = {"x": [*map(str, np.random.default_rng(0).normal(size=299)), "n.v."], "z": np.arange(300) % 7}
    data["y"] = np.arange(300) + 0.5
    _, left_out = infer(pa.table(data), "y")
    assert "99.7% of its cells are numbers ('n.v.' are not: --missing" in left_out["x"]
    schema, _ = infer(pa.table(data), "y", reading=Reading(missing=("n.v.",)))
    assert type(schema.columns[0]).__name__ == "Numeric" and schema.columns[0].indicator
