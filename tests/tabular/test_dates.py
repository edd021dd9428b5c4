"""Dates as people write them, and refusals where they have two readings."""

import datetime

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from vbdl.tabular import TableOptions, fit_table, infer
from vbdl.tabular.dates import NoDate, instant, order_of
from vbdl.tabular.parts import divide
from vbdl.tabular.reading import Reading

DAYS = pd.date_range("2023-11-20", periods=90, freq="37h")

FORMS = {
    "%Y-%m-%d %H:%M": "",
    "%Y/%m/%d": "",
    "%d/%m/%Y": "day-first",
    "%d.%m.%Y %H:%M": "day-first",
    "%d-%m-%y": "day-first",
    "%m/%d/%Y": "month-first",
    "%m/%d/%Y %I:%M %p": "month-first",
    "%m-%d-%y": "month-first",
    "%d %b %Y": "",
    "%d-%b-%y": "",
    "%B %d, %Y": "",
    "%a, %d %b %Y %H:%M:%S +0000": "",
    "%a %b %d %H:%M:%S %Y": "",
    "%Y%m%d": "",
    "%Y%m%dT%H%M": "",
    "%Y%m%d%H%M%S": "",
    "%Y年%m月%d日": "",
}


@pytest.mark.parametrize("form, order", FORMS.items())
def test_every_way_of_writing_gives_the_instants_that_were_written(form, order):
    words = list(DAYS.strftime(form))
    assert order_of(words, "when") == order
    clock = "%H" in form or "%I" in form
    for word, day in zip(words, DAYS, strict=True):
        right = day.to_pydatetime() if clock else datetime.datetime(day.year, day.month, day.day)
        assert instant(word, order) == right.replace(tzinfo=datetime.UTC), word


@pytest.mark.parametrize("form", FORMS)
def test_a_split_by_time_follows_the_dates_and_not_their_letters(form):
    order = np.random.default_rng(0).permutation(len(DAYS))
    table = pa.table({"x": np.arange(90.0), "when": list(DAYS[order].strftime(form))})
    parts = divide(table, ["x"], None, time="when")
    # the very rows that a split by their days as timestamps gives, where text has no time of the day
    exact = DAYS[order] if ("%H" in form or "%I" in form) else DAYS[order].normalize()
    right = divide(pa.table({"x": np.arange(90.0), "when": exact}), ["x"], None, time="when")
    assert all(parts.rows[name].tolist() == right.rows[name].tolist() for name in right.rows)


@pytest.mark.parametrize(
    "word, right",
    [
        ("1er janvier 2024", (2024, 1, 1)),
        ("31. Dezember 2024", (2024, 12, 31)),
        ("3 de agosto de 2024", (2024, 8, 3)),
        ("5 märz 2024", (2024, 3, 5)),
        ("January 31st, 2024", (2024, 1, 31)),
        ("2024-W05-1", (2024, 1, 29)),
        ("2024-02", (2024, 2, 1)),
        ("Q3 2024", (2024, 7, 1)),
    ],
)
def test_names_of_months_weeks_and_quarters(word, right):
    assert instant(word) == datetime.datetime(*right, tzinfo=datetime.UTC)


def test_zones_are_subtracted():
    for word in ("2024-01-31 18:30:00+02:00", "31 Jan 2024 18:30 +0200", "31/01/2024 18:30:00 +02"):
        assert instant(word, "day-first") == datetime.datetime(2024, 1, 31, 16, 30, tzinfo=datetime.UTC)


@pytest.mark.parametrize(
    "word",
    ["yesterday", "2024-02-30", "2024-13-01", "31/31/2024", "10112024", "18:30", "31.12.2024 25:00", "", "1/2/3"],
)
def test_what_is_no_date_is_none(word):
    with pytest.raises(NoDate):
        instant(word, "day-first")


def test_two_readings_are_refused_and_named():
    words = ["03/04/2024", "05/06/2024"]
    with pytest.raises(ValueError, match=r"3 April 2024 \(day-first\) or 4 March 2024 \(month-first\).*--date-format"):
        order_of(words, "when")
    table = pa.table({"x": np.arange(60.0), "when": [f"{1 + i % 12:02d}/{1 + i // 12:02d}/2024" for i in range(60)]})
    with pytest.raises(ValueError, match="column 'when'.*--date-format"):
        divide(table, ["x"], None, time="when")
    found = [
        divide(table, ["x"], None, time="when", reading=Reading(date_format=form)).rows["test"].tolist()
        for form in ("day-first", "%d/%m/%Y", "month-first")
    ]
    assert found[0] == found[1] != found[2]


def test_text_that_says_no_time_is_refused_and_numbers_stay_numbers():
    table = pa.table({"x": np.arange(60.0), "when": [f"week {i}" for i in range(60)]})
    with pytest.raises(ValueError, match="column 'when' holds text, and 'week 0' is not a date.*--date-format"):
        divide(table, ["x"], None, time="when")
    for cells in ([str(i) for i in range(60)], list(range(60)), pa.array(range(60), pa.duration("s"))):
        parts = divide(pa.table({"x": np.arange(60.0), "when": cells}), ["x"], None, time="when")
        assert parts.rows["train"].tolist() == list(range(42))
    with pytest.raises(ValueError, match="1 missing"):  # a rank would put it last
        divide(pa.table({"x": [1.0, 2.0], "when": [1.0, np.nan]}), ["x"], None, time="when")


@pytest.mark.parametrize("kind", ["text", "category", "dictionary", "timestamp", "period"])
def test_dates_split_alike_in_every_type(kind):
    days = pd.date_range("2024-01-01", periods=100).to_series().sample(frac=1, random_state=0)
    text = days.dt.strftime("%d/%m/%Y").reset_index(drop=True)
    column = {
        "text": text,
        "category": text.astype("category"),
        "dictionary": pa.array(text.tolist()).dictionary_encode(),
        "timestamp": days.reset_index(drop=True),
        "period": days.reset_index(drop=True).dt.to_period("D"),
    }[kind]
    data = {"x": np.random.default_rng(0).normal(size=100), "when": column, "y": np.arange(100) + 0.5}
    found = fit_table(data, "y", TableOptions(epochs=1, n_members=2, width=8), time="when", progress=False)
    assert found.rows["test"].tolist() == np.sort(np.argsort(days.to_numpy())[-10:]).tolist()


@pytest.mark.parametrize("form", ["%d/%m/%Y", "%m/%d/%Y", "%Y%m%d", "%d %B %Y", "%Y-%m-%d"])
def test_a_column_of_dates_is_the_same_number_in_every_writing(form):
    data = {"when": list(DAYS.strftime(form)), "y": np.arange(90) + 0.5}
    schema, _ = infer(pa.table(data), "y", kinds={"when": "date"})
    as_dates, _ = infer(pa.table({**data, "when": DAYS.normalize()}), "y", kinds={"when": "date"})
    x = schema.encode(pa.table(data)).x
    assert x.equal(as_dates.encode(pa.table({**data, "when": DAYS.normalize()})).x)
    assert x.equal(schema.encode_rows([{"when": word} for word in data["when"]]).x)
    assert schema.encode_rows([{"when": "99-99-9999"}]).rejected
    if form == "%Y%m%d":  # which a CSV file has as numbers
        assert x.equal(schema.encode(pa.table({**data, "when": [int(w) for w in data["when"]]})).x)


def test_marks_and_mistakes_among_dates():
    words = [f"{1 + i % 28:02d}.{1 + i % 12:02d}.2024" for i in range(120)]
    data = {"when": [("?", "n/a", w)[min(i % 9, 2)] for i, w in enumerate(words)], "y": np.arange(120) + 0.5}
    notes = []
    schema, _ = infer(pa.table(data), "y", kinds={"when": "date"}, notes=notes)
    assert schema.columns[0].indicator and schema.columns[0].order == "day-first"
    assert any("'?', 'n/a' is read as missing" in note for note in notes)
    assert schema.encode(pa.table(data)).x.equal(schema.encode_rows([{"when": w} for w in data["when"]]).x)
    wrong = {"when": [*words[:-1], "soon"], "y": data["y"]}
    with pytest.raises(ValueError, match="row 119, column 'when': 'soon' is not a date.*; 1 such cells"):
        infer(pa.table(wrong), "y", kinds={"when": "date"})
    wrong = {"when": [*words[:-1], "12/31/2024"], "y": data["y"]}
    with pytest.raises(ValueError, match="'12/31/2024' and '.*' are not dates of one order"):
        infer(pa.table(wrong), "y", kinds={"when": "date"})
