"""Columns that programs misread without a word: dates as numbers, numbers with a word among them, truth as text."""

import numpy as np
import pandas as pd
import pytest
import torch

from vbdl.tabular.parts import moments
from vbdl.tabular.reading import Reading, as_table, read_table
from vbdl.tabular.target import decide

DAYS = pd.date_range("2023-01-05", periods=400)


@pytest.mark.parametrize("form", ["%d%m%Y", "%m%d%Y"])
def test_whole_numbers_that_are_dates_with_the_year_last_are_no_times(form, tmp_path):
    pd.DataFrame({"when": DAYS.strftime(form), "x": 1.0}).to_csv(tmp_path / "t.csv", index=False)
    table = read_table(tmp_path / "t.csv")
    with pytest.raises(ValueError, match=f"year last.*--date-format {form}"):
        moments(table, "when")
    order, _ = moments(table, "when", Reading(date_format=form))
    assert torch.equal(order.argsort(), torch.arange(400))


@pytest.mark.parametrize("values", [np.arange(400) + 10_000_000, np.arange(400), DAYS.strftime("%Y%m%d").astype(int)])
def test_other_whole_numbers_are_in_their_own_order(values):
    order, _ = moments(as_table({"when": list(map(int, values))}), "when")
    assert torch.equal(order.argsort(), torch.arange(400))


@pytest.mark.parametrize("odd", ["<5", "inf", "12..3", "1.4 kg", "see note"])
def test_a_target_of_numbers_with_a_word_among_them_is_no_class_for_each(odd):
    cells = [f"{v:.2f}" for v in np.random.default_rng(0).normal(50, 9, 400)]
    cells[7] = cells[99] = odd
    column = as_table({"y": cells}).column("y")
    with pytest.raises(ValueError, match="398 numbers and 2 cells that are none"):
        decide(column, "y")
    assert decide(column, "y", "classification")[0] == "classification"
    assert decide(column, "y", None, Reading(missing=(odd,)))[0] == "regression"


@pytest.mark.parametrize(
    "cells", [["a", "b", "1"] * 50, [str(i % 3) for i in range(90)] + ["x"] * 30, ["1st", "2nd"] * 9]
)
def test_words_and_codes_are_classes(cells):
    assert decide(as_table({"y": cells}).column("y"), "y")[0] == "classification"


def test_marks_of_pandas_for_a_missing_cell_are_missing_in_lists_too():
    frame = pd.DataFrame({"a": pd.array([1, None, 3], "Int64"), "b": pd.array(["x", None, "y"], "string")})
    for columns in ({n: list(frame[n]) for n in frame}, {n: frame[n].to_numpy(dtype=object) for n in frame}):
        table = as_table(columns)
        assert [table.column(n).null_count for n in ("a", "b")] == [1, 1]
        assert table.column("a").to_pylist() == [1, None, 3]


def test_truth_is_truth_in_text_too():
    from vbdl.tabular.columns import Boolean

    column = Boolean(name="b", mean=0.0, std=1.0, fill=0.0, indicator=False)
    for word, value in (("True", True), ("TRUE", True), ("false", False), ("0", 0), ("1", 1)):
        assert column.cell(word) == column.cell(value), word
