"""The default calibration of a table's model: halves, folds, and whether it is worth applying."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import vbdl
from vbdl.tabular import TableOptions, fit_table
from vbdl.tabular.calibrating import CalibrationRows, calibrate_by_default

_SHARES = {"train": 0.3, "validation": 0.1, "calibration": 0.5, "test": 0.1}
_FAST = {"epochs": 8, "n_members": 2, "width": 16, "batch_size": 128, "shares": _SHARES}


def _table(order, n, seed):
    """Two classes hard to tell apart and an easy one, or a number whose noise grows; by `order` of its rows."""
    random = np.random.default_rng(seed)
    group = random.integers(0, n // 10, n)
    kind = random.choice(3, n, p=[0.25, 0.25, 0.5])
    if order == "sorted":
        kind.sort()
    x = random.normal(size=(n, 3))
    x[:, 0] += np.array([-0.4, 0.4, 0])[kind]
    x[:, 1] += np.array([0, 0, 5])[kind]
    amount = x[:, 0] + (0.3 + 2.0 * (kind < 2)) * random.normal(size=n)
    if order == "grouped":  # rows of a group stand together, as files have them
        places = np.argsort(group, kind="stable")
        x, kind, amount, group = x[places], kind[places], amount[places], group[places]
    columns = {f"x{i}": x[:, i] for i in range(3)} | {"who": [f"g{g}" for g in group]}
    return columns, np.array(["a", "b", "c"])[kind], amount


# an order that says nothing is the easiest
@pytest.mark.parametrize("order", ["sorted", "grouped", pytest.param("shuffled", marks=pytest.mark.slow)])
@pytest.mark.parametrize("task", ["classification", "regression"])
def test_sets_and_intervals_hold_what_they_promise_in_any_order_of_rows(order, task):
    columns, word, amount = _table(order, 4_000, 0)
    options = {"group": "who"} if order == "grouped" else {"ignore": ("who",)}
    y = word if task == "classification" else amount
    found = fit_table({**columns, "y": y}, "y", TableOptions(**_FAST), progress=False, **options)
    columns, word, amount = _table("shuffled", 4_000, 1)
    p = found.predictor(found.schema.tensor({**columns}))
    if task == "classification":
        truth = torch.from_numpy(np.searchsorted(np.array(["a", "b", "c"]), word))
        covered = p.sets.gather(1, truth[:, None]).double().mean()
    else:
        truth = torch.from_numpy(amount)[:, None]
        covered = ((p.lower <= truth) & (truth <= p.upper)).double().mean()
    # the share that 1,000 calibration rows lead to, and the error of counting it on 4,000
    error = math.sqrt(0.9 * 0.1 * (1 / 1_000 + 1 / 4_000))
    assert abs(float(covered) - 0.9) < 3.5 * error


def _rows(together=None, when=None, n=200):
    return CalibrationRows(
        torch.arange(float(n)).unsqueeze(1),
        torch.zeros(n, dtype=torch.int64),
        torch.arange(n) if together is None else together,
        when,
    )


@pytest.mark.parametrize("parts", [2, 5])
def test_rows_that_belong_together_calibrate_together(parts):
    group = torch.arange(200) // 7
    at_random = _rows().divided(parts, 0)
    assert all(bool((part < 100).any()) and bool((part >= 100).any()) for part in at_random)
    by_group = _rows(group).divided(parts, 0)
    by_time = _rows(when=torch.arange(200).flip(0) // 3).divided(parts, 0)
    for found in (at_random, by_group, by_time):
        assert torch.equal(torch.cat(found).sort().values, torch.arange(200))
    groups = [set(group[part].tolist()) for part in by_group]
    assert len(set.union(*groups)) == sum(map(len, groups))
    assert all(int(later.max()) < int(earlier.min()) for earlier, later in zip(by_time, by_time[1:], strict=False))


def test_the_halves_are_by_group_and_time_where_the_split_is():
    random = np.random.default_rng(0)
    data = {"x": random.normal(size=800), "who": np.arange(800) // 8, "y": random.choice(["u", "v"], 800)}
    settings = TableOptions(**{**_FAST, "epochs": 1})
    for option in ("group", "time"):
        found = fit_table(data, "y", settings, **{option: "who"}, progress=False)
        sets, scaling = found.predictor.likelihood, found.predictor.likelihood.likelihood
        used = {int(sets.n_rows)} | ({int(scaling.n_rows)} if hasattr(scaling, "n_rows") else set())
        assert all(n % 8 == 0 for n in used), used  # whole groups, whole instants


class _Logits(nn.Module):
    """A classifier whose logit is the input times a factor."""

    def __init__(self, factor):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x):
        return torch.cat([torch.zeros_like(x), self.factor * x], dim=1)


def _by_default(factor, n, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 1, generator=generator)
    y = (torch.rand(n, generator=generator) < x.squeeze(1).sigmoid()).long()
    p = vbdl.Predictor(vbdl.DeepEnsemble([_Logits(factor)]), vbdl.Categorical(), compile=False)
    return calibrate_by_default(p, CalibrationRows(x, y, torch.arange(n)), 0.0, 0)


@pytest.mark.parametrize("factor, n, share", [(1.0, 40, 0.5), (8.0, 400, 1.0)])
def test_a_temperature_is_applied_where_held_out_rows_gain_by_it(factor, n, share):
    """Logits that are right as they are gain by chance, at most every second time; logits eight times too large do."""
    applied = []
    for seed in range(12):
        made = _by_default(factor, n, seed)
        [note] = made.notes
        with_it, without = (float(w) for w in note.replace(",", "").split() if w[0].isdigit() and "." in w)
        applied.append(hasattr(made.predictor.likelihood, "method"))
        assert applied[-1] == ("fitted" in note) == (with_it < without), note
    assert sum(applied) <= 12 * share if share < 1 else all(applied)


def test_the_two_scores_are_those_of_calibrate():
    """Cross-fitted by hand, each fold predicted by a predictor that was calibrated on the others."""
    data = _table("shuffled", 600, 0)
    for y in data[1:]:
        found = fit_table({**data[0], "y": y}, "y", TableOptions(**{**_FAST, "coverage": 0.0}), progress=False)
        [note] = [n for n in found.notes if "held-out" in n]
        p = found.predictor
        p = p.replace(likelihood=getattr(p.likelihood, "likelihood", p.likelihood))
        x = found.schema.tensor({**data[0]})[found.rows["calibration"]]
        where = found.rows["calibration"]
        t = torch.from_numpy(np.searchsorted(["a", "b", "c"], y)) if y.dtype.kind == "U" else torch.tensor(y)[:, None]
        rows = CalibrationRows(x, t[where], torch.arange(len(x)))
        each = []
        for fold in rows.divided(5, 0):
            rest = torch.tensor([i for i in range(len(x)) if i not in set(fold.tolist())])
            method = vbdl.Temperature() if t.ndim == 1 else vbdl.StdScaling()
            q = vbdl.calibrate(p, (x[rest], rows.y[rest]), method)
            each.append(-q(x[fold], samples=True).log_prob(rows.y[fold]))
        assert f"{float(torch.cat(each).mean()):.3g}"[:4] in note


def test_one_group_of_calibration_rows_is_not_halved():
    x = torch.randn(200, 1)
    rows = CalibrationRows(x, (x.squeeze(1) > 0).long(), torch.zeros(200, dtype=torch.int64))
    p = vbdl.Predictor(vbdl.DeepEnsemble([_Logits(1.0)]), vbdl.Categorical(), compile=False)
    made = calibrate_by_default(p, rows, 0.9, 0)
    assert type(made.predictor.likelihood.method).__name__ == "ConformalSets"
    assert "one group" in made.notes[0]
