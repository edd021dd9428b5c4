import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vbdl.data.splitting import split

SHARES = {"train": 0.6, "calibration": 0.25, "test": 0.15}


def _is_partition(parts, n):
    rows = torch.cat(list(parts.values()))
    return rows.numel() == n and torch.equal(rows.sort().values, torch.arange(n))


@settings(max_examples=80, deadline=None)
@given(st.integers(20, 300), st.integers(0, 1000), st.sampled_from(["", "stratify", "groups", "time"]))
def test_parts_never_overlap_and_hold_every_row(n, seed, kind):
    generator = torch.Generator().manual_seed(seed)
    column = torch.randint(0, max(3, n // 4), (n,), generator=generator)
    try:
        parts = split(n, SHARES, seed=seed, **({kind: column} if kind else {}))
    except ValueError as error:
        # a few large groups or instants can leave a part empty, which is said and not hidden
        assert "would have no row" in str(error) and kind in ("groups", "time")
        return
    assert _is_partition(parts, n) and list(parts) == list(SHARES)
    if kind in ("", "stratify"):
        for name, share in SHARES.items():
            assert abs(parts[name].numel() - share * n) <= 1
    if kind == "groups":
        owners = [set(column[rows].tolist()) for rows in parts.values()]
        assert all(not a & b for i, a in enumerate(owners) for b in owners[:i])
    if kind == "time":
        ends = [(int(column[r].min()), int(column[r].max())) for r in parts.values()]
        assert all(a[1] < b[0] for a, b in zip(ends, ends[1:], strict=False))


def test_stratified_parts_have_every_class_in_its_share():
    y = torch.tensor([0] * 900 + [1] * 90 + [2] * 10)[torch.randperm(1000)]
    parts = split(1000, SHARES, stratify=y)
    for name, share in SHARES.items():
        counts = torch.bincount(y[parts[name]], minlength=3)
        assert (counts - share * torch.tensor([900, 90, 10])).abs().max() <= 2
        assert counts[2] >= 1


def test_group_shares_come_close():
    tracks = torch.arange(3000) // 30
    parts = split(3000, groups=tracks)
    for name, share in {"train": 0.7, "validation": 0.1, "calibration": 0.1, "test": 0.1}.items():
        assert abs(parts[name].numel() - share * 3000) <= 30


def test_names_of_patients():
    names = ["ann", "bob", "ann", "cid", "dan", "bob", "eve"]
    parts = split(7, {"a": 0.5, "b": 0.5}, groups=names)
    owners = [{names[i] for i in rows} for rows in parts.values()]
    assert not owners[0] & owners[1]


def test_seeded():
    a, b, c = (split(500, seed=s)["train"] for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    groups = torch.arange(500) // 5
    a, b = (split(500, groups=groups, seed=s)["train"] for s in (0, 1))
    assert not torch.equal(a, b)


def test_rows_are_spread_evenly():
    # each row as likely as any other to be in the test part
    hits = np.zeros(40)
    for seed in range(600):
        hits[split(40, {"a": 0.75, "b": 0.25}, seed=seed)["b"]] += 1
    assert abs(hits / 600 - 0.25).max() < 5 * (0.25 * 0.75 / 600) ** 0.5


def test_by_time_needs_no_sorted_rows():
    time = torch.tensor([5.0, 1.0, 3.0, 2.0, 4.0])
    parts = split(5, {"past": 0.6, "future": 0.4}, time=time)
    assert parts["past"].tolist() == [1, 2, 3] and parts["future"].tolist() == [0, 4]


@pytest.mark.parametrize("form", ["numpy", "pandas index", "pandas series", "python", "numbers"])
def test_by_time_takes_dates(form):
    dates = np.datetime64("2020-01-01") + np.random.default_rng(0).permutation(100)
    given = {
        "numpy": dates,
        "pandas index": pd.DatetimeIndex(dates),
        "pandas series": pd.Series(dates, index=np.arange(100)[::-1]),
        "python": dates.astype(object).tolist(),
        "numbers": dates.astype(np.int64).tolist(),
    }[form]
    parts = list(split(np.int64(100), time=given).values())
    for earlier, later in zip(parts, parts[1:], strict=False):
        assert dates[earlier].max() < dates[later].min()


def test_a_missing_date_is_named():
    with pytest.raises(ValueError, match="time has no date in row 3"):
        split(
            4, {"a": 0.5, "b": 0.5}, time=np.array(["2020-01-01", "2020-01-02", "2020-01-03", "NaT"], "datetime64[D]")
        )


def test_what_is_refused():
    with pytest.raises(ValueError, match="sum to one"):
        split(10, {"a": 0.5, "b": 0.4})
    with pytest.raises(ValueError, match="positive"):
        split(10, {"a": 1.0, "b": 0.0})
    with pytest.raises(ValueError, match="part 'test' would have no row"):
        split(2, {"train": 0.9, "test": 0.1})
    with pytest.raises(ValueError, match="at least 1"):
        split(0)
    with pytest.raises(ValueError, match="contradict"):
        split(4, time=torch.arange(4), groups=torch.arange(4))
    with pytest.raises(ValueError, match="one value per row"):
        split(4, groups=torch.arange(3))
    with pytest.raises(ValueError, match="NaN in row 1"):
        split(3, {"a": 0.5, "b": 0.5}, time=torch.tensor([0.0, float("nan"), 1.0]))
