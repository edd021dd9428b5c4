"""What a table is taken for, and how its rows are divided."""

import datetime

import numpy as np
import pyarrow as pa
import pytest
import torch

from vbdl.data.splitting import DEFAULT_SHARES
from vbdl.tabular import infer
from vbdl.tabular.parts import divide
from vbdl.tabular.target import decide, fit_target

N = 120


def one(column, target=None):
    target = np.linspace(0, 1, len(column)) if target is None else target
    return infer(pa.table({"x": column, "keep": np.arange(len(column)) % 7, "y": target}), "y")


@pytest.mark.parametrize(
    "column, reason",
    [
        (pa.array([f"id-{i}" for i in range(N)]), "an id or free text"),
        (pa.array([3.0] * N), "it is 3 in every training row"),
        (pa.array(["same"] * N), "it is 'same' in every training row"),
        (pa.array(["-"] * N), "it is '-' in every training row"),
        (pa.array([" "] * N), "no value in any training row"),
        (pa.nulls(N), "no value in any row"),
        (pa.array([None] * N, pa.float64()), "no value in any training row"),
    ],
)
def test_columns_that_say_nothing_are_left_out_with_a_reason(column, reason):
    schema, left_out = one(column)
    assert schema.names == ["keep"] and reason in left_out["x"]


def test_a_constant_with_gaps_is_kept_for_its_gaps():
    schema, _ = one(pa.array([None if i % 3 else 1.0 for i in range(N)]))
    assert schema.features[:2] == ["x", "x is missing"]


@pytest.mark.parametrize("column", [[datetime.date(2020, 1, 1)] * N, [datetime.datetime(2020, 1, 1)] * N])
def test_dates_are_refused_with_what_to_do(column):
    with pytest.raises(ValueError, match="--ignore x.*--date x.*in vbdl fit, split by it .--time x"):
        one(pa.array(column))


@pytest.mark.parametrize(
    "column, said",
    [
        (np.arange(N), True),
        (np.arange(N)[::-1] * 7.0, True),
        (pa.array([str(i) for i in range(N)]), True),
        (np.arange(N) // 2, False),
        (np.arange(N) + 0.5, False),
    ],
)
def test_a_column_that_numbers_the_rows_is_named(column, said):
    notes: list[str] = []
    table = pa.table({"row number": column, "keep": np.linspace(0, 1, N), "y": np.arange(N) % 2})
    infer(table, "y", notes=notes)
    assert any("is it an id? (--ignore 'row number' leaves it out)" in note for note in notes) == said


def test_a_number_too_large_to_scale_by_is_named():
    with pytest.raises(ValueError, match="column 'x' has 1.79.*e\\+308 in it, too large to scale by"):
        one(np.where(np.arange(N) == 3, np.finfo(np.float64).max, np.arange(N)))


def test_names_stand_in_hints_as_a_shell_takes_them():
    for column, option in (
        ([datetime.date(2020, 1, 1)] * N, "--date"),
        ([["list"]] * N, "--ignore"),
    ):
        with pytest.raises(ValueError, match=f"{option} 'of today'"):
            infer(pa.table({"of today": pa.array(column), "keep": np.arange(N) % 7, "y": np.arange(N) % 2}), "y")
    notes: list[str] = []
    table = {"of today": [str(i % 9) for i in range(N)], "code": [f"0{i % 9}" for i in range(N)], "y": np.arange(N) % 2}
    infer(pa.table(table), "y", notes=notes)
    assert any("(--categorical 'of today': words)" in note for note in notes)


def test_lists_are_refused():
    with pytest.raises(ValueError, match="no kind of input"):
        one(pa.array([[1.0, 2.0]] * N))


@pytest.mark.parametrize(
    "options, said",
    [
        ({"target": "z"}, "no column 'z'"),
        ({"kinds": {"nothing": "numeric"}}, "no column 'nothing'"),
        ({"kinds": {"x": "number"}}, "is none of"),
        ({"ignore": ["x"]}, "no column is left"),
    ],
)
def test_what_is_not_there_is_named(options, said):
    data = pa.table({"x": np.arange(N), "y": np.arange(N)})
    with pytest.raises(ValueError, match=said):
        infer(data, options.pop("target", "y"), **options)


@pytest.mark.parametrize(
    "column, task",
    [
        (["a", "b", "a", "b"], "classification"),
        ([True, False, True, True], "classification"),
        ([0, 1, 1, 0], "classification"),
        ([0.0, 1.0, 1.0, 2.0], "classification"),
        ([0.5, 1.0, 1.5, 2.0], "regression"),
        (list(range(30)), "regression"),
    ],
)
def test_the_target_decides_the_task(column, task):
    found, reason = decide(pa.array(column), "y")
    assert found == task and reason


def test_the_task_can_be_given():
    assert decide(pa.array([3, 4, 5]), "y", "regression")[0] == "regression"
    with pytest.raises(ValueError, match="can only be classified"):
        decide(pa.array(["a", "b"]), "y", "regression")


@pytest.mark.parametrize(
    "column, labels",
    [
        (["no", "yes", "no"], ["no", "yes"]),
        ([10, 9, 10, -1], [-1, 9, 10]),
        ([True, False], [False, True]),
        ([2.0, 1.0], [1, 2]),
    ],
)
def test_classes_come_back_as_they_were(column, labels):
    target = fit_target(pa.array(column), "y", np.arange(len(column)))
    assert [target.label(i) for i in range(len(target.classes))] == labels
    y, known = target.encode(pa.array(column))
    assert bool(known.all()) and [target.label(int(i)) for i in y] == column


def test_a_class_that_training_did_not_have_is_an_error_and_a_missing_one_is_not():
    target = fit_target(pa.array(["a", "b"]), "y", np.arange(2))
    y, known = target.encode(pa.array(["b", None]))
    assert y.tolist() == [1, 0] and known.tolist() == [True, False]
    with pytest.raises(ValueError, match="row 1 is 'c'"):
        target.encode(pa.array(["a", "c"]))


# -- parts


def rows_of(parts):
    return torch.cat(list(parts.rows.values()))


def test_parts_are_disjoint_and_complete():
    data = pa.table({"x": np.arange(200.0), "y": np.arange(200) % 3})
    parts = divide(data, ["x"], torch.arange(200) % 3)
    assert torch.equal(rows_of(parts).sort().values, torch.arange(200))
    shares = torch.bincount(torch.arange(200)[parts.rows["train"]] % 3) / len(parts.rows["train"])
    assert torch.allclose(shares, torch.full((3,), 1 / 3), atol=0.02)


def test_equal_rows_never_come_apart():
    x = np.repeat(np.arange(150.0), 1 + (np.arange(150) % 2))
    parts = divide(pa.table({"x": x}), ["x"], None)
    seen = {name: set(x[r.numpy()]) for name, r in parts.rows.items()}
    names = list(seen)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert not seen[a] & seen[b]
    assert not parts.overlap_is_meant and "repeat" in parts.notes[0]


def test_a_table_of_few_different_rows_is_divided_all_the_same():
    parts = divide(pa.table({"x": np.arange(300) % 4}), ["x"], None)
    assert parts.overlap_is_meant and "only 4 of 300" in parts.notes[0]
    assert {n: len(r) for n, r in parts.rows.items()} == {n: round(300 * s) for n, s in DEFAULT_SHARES.items()}


def test_groups_and_equal_rows_stay_together():
    random = np.random.default_rng(0)
    patient, x = random.integers(0, 90, 400), random.integers(0, 380, 400)
    parts = divide(pa.table({"x": x, "patient": [f"p{p}" for p in patient]}), ["x"], None, group="patient")
    for values in (patient, x):
        of = {name: set(values[r.numpy()]) for name, r in parts.rows.items()}
        assert sum(len(v) for v in of.values()) == len(set(values))


def test_parts_follow_each_other_in_time():
    when = np.random.default_rng(0).permutation(100)
    table = pa.table({"x": np.arange(100.0), "t": pa.array(when, pa.timestamp("s"))})
    parts = divide(table, ["x"], None, time="t")
    ends = [(when[r.numpy()].min(), when[r.numpy()].max()) for r in parts.rows.values()]
    assert all(a[1] < b[0] for a, b in zip(ends, ends[1:], strict=False))


def test_a_missing_time_has_no_place():
    with pytest.raises(ValueError, match="1 missing"):
        divide(pa.table({"x": [1, 2], "t": [1, None]}), ["x"], None, time="t")


def test_group_and_time_contradict():
    with pytest.raises(ValueError, match="contradict"):
        divide(pa.table({"x": [1, 2], "t": [1, 2]}), ["x"], None, time="t", group="t")
