import math

import numpy as np
import pytest
import torch
from scipy import stats

from vbdl import metrics


def _scores(n, seed=0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 1000


def test_streamed_mean_equals_the_whole_even_far_from_zero():
    x = _scores(10_000)
    identity = lambda v: v
    whole, parts = metrics.Mean(identity), metrics.Mean(identity)
    whole.update(x)
    for chunk in x.split(77):
        other = metrics.Mean(identity)
        other.update(chunk)
        parts.merge(other)
    a, b = whole.compute(), parts.compute()
    assert a.value == pytest.approx(float(x.mean()), rel=1e-15)
    assert b.value == pytest.approx(a.value, rel=1e-12)
    assert b.standard_error == pytest.approx(float(x.std()) / 100, rel=1e-10)
    assert b.n == 10_000


def test_mean_of_a_score_over_batches():
    probs = torch.rand(30, 3, generator=torch.Generator().manual_seed(0)).softmax(1)
    y = torch.arange(30) % 3
    stream = metrics.Mean(metrics.brier_score)
    stream.update(probs[:7], y[:7])
    stream.update(probs[7:], y[7:])
    stream.update(probs[:0], y[:0])
    expected = metrics.mean_estimate(metrics.brier_score(probs, y))
    assert stream.compute().value == pytest.approx(expected.value, rel=1e-13)
    with pytest.raises(ValueError, match="same score"):
        stream.merge(metrics.Mean(metrics.categorical_nll))


def test_none_and_one_row():
    stream = metrics.Mean(lambda v: v)
    with pytest.raises(ValueError, match="no rows yet"):
        stream.compute()
    stream.update(torch.tensor([2.0]))
    estimate = stream.compute()
    assert estimate.value == 2.0 and math.isnan(estimate.standard_error)
    with pytest.raises(ValueError, match="two rows"):
        estimate.interval()
    stream.reset()
    assert stream.n == 0


def test_a_nan_score_is_refused_not_averaged():
    stream = metrics.Mean(lambda v: v)
    with pytest.raises(ValueError, match="NaN or infinite value in row 1"):
        stream.update(torch.tensor([0.0, math.nan]))
    assert stream.n == 0


def test_t_interval_is_scipys():
    x = _scores(25)
    interval = metrics.mean_estimate(x).interval(0.9)
    expected = stats.t.interval(0.9, 24, float(x.mean()), stats.sem(x.numpy()))
    assert (interval.lower, interval.upper) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("k, n", [(0, 5), (5, 5), (3, 10), (1, 1)])
def test_proportion_interval_is_clopper_pearson(k, n):
    interval = metrics.proportion_interval(k, n)
    exact = stats.binomtest(k, n).proportion_ci(0.95, method="exact")
    assert (interval.lower, interval.upper) == pytest.approx((exact.low, exact.high), abs=1e-10)


def test_bootstrap_of_a_mean_agrees_with_the_t_interval():
    x = _scores(400) - 1000
    by_bootstrap = metrics.bootstrap(lambda v: v.mean(), x, n_resamples=2000)
    by_formula = metrics.mean_estimate(x).interval()
    assert by_bootstrap.value == by_formula.value
    assert by_bootstrap.lower == pytest.approx(by_formula.lower, abs=0.01)
    assert by_bootstrap.upper == pytest.approx(by_formula.upper, abs=0.01)
    again = metrics.bootstrap(lambda v: v.mean(), x, n_resamples=2000)
    assert again == by_bootstrap


def test_paired_comparison_is_the_paired_t_test():
    a, b = _scores(50), _scores(50, 1) + 0.3
    ours = metrics.compare(a, b)
    assert ours.p_value == pytest.approx(stats.ttest_rel(a.numpy(), b.numpy()).pvalue, rel=1e-9)
    flipped = metrics.compare(a, b, method="permutation")
    assert flipped.p_value == pytest.approx(ours.p_value, abs=0.02)
    assert metrics.compare(a, a + 1.0).settled and metrics.compare(a, a).p_value == 1.0
    assert not metrics.compare(a, a).settled
    with pytest.raises(ValueError, match="same rows"):
        metrics.compare(a, b[:-1])


def test_pairing_sees_what_separate_intervals_do_not():
    difficulty = _scores(100) * 10
    noise = torch.randn(100, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 0.1
    assert metrics.compare(difficulty + 0.2 + noise, difficulty).settled


def test_permutation_of_three_rows_is_the_exact_count():
    # 2 of the 8 sign patterns are as extreme
    ours = metrics.compare(torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3), method="permutation", n_resamples=20_000)
    assert ours.p_value == pytest.approx(0.25, abs=0.015)


def test_rows_keeps_and_merges():
    scores, y = _scores(40), torch.arange(40) % 2
    a, b = metrics.Rows(metrics.auroc), metrics.Rows(metrics.auroc)
    buffer = scores[:10].clone()
    a.update(buffer, y[:10])
    buffer.zero_()  # what was handed in may be reused by the caller
    b.update(scores[10:], y[10:])
    assert a.merge(b).compute() == metrics.auroc(scores, y)
    with pytest.raises(ValueError, match="same number of rows"):
        a.update(scores, y[:3])
    with pytest.raises(ValueError, match="no rows yet"):
        metrics.Rows(metrics.auroc).compute()


def test_coverage_of_the_t_interval():
    hits = 0
    for seed in range(400):
        interval = metrics.mean_estimate(_scores(10, seed)).interval()
        hits += interval.lower <= 1000 <= interval.upper
    assert abs(hits / 400 - 0.95) < 0.035
    assert isinstance(np.float64(float(metrics.mean_estimate(_scores(5)))), np.float64)


def test_block_intervals_hold_the_mean_of_rows_that_are_alike():
    """Of an autoregression, whose rows near in time are alike: 95 % by blocks, and far fewer by independent rows."""
    generator = torch.Generator().manual_seed(1)
    series, n = 600, 1500
    value, held, naive = torch.zeros(series), 0, 0
    path = torch.empty(n, series)
    for step in range(n):
        value = 0.8 * value + torch.randn(series, generator=generator)
        path[step] = value
    for column in path.T.double():
        found = metrics.block_interval(torch.mean, column)
        independent = metrics.mean_estimate(column).interval()
        held += found.lower <= 0 <= found.upper
        naive += independent.lower <= 0 <= independent.upper
    assert 0.92 <= held / series <= 0.97  # three standard errors of 600 trials around 0.95, less 0.3 % for the blocks
    assert naive / series < 0.6


def test_block_intervals_of_independent_rows_are_those_of_the_mean():
    rows = torch.randn(4000, generator=torch.Generator().manual_seed(0)).double()
    widths = [metrics.block_interval(torch.mean, rows.roll(k)).upper - rows.mean() for k in range(0, 200, 10)]
    usual = metrics.mean_estimate(rows).interval().upper - rows.mean()
    assert 1.0 < torch.stack(widths).mean() / usual < 1.15  # Student's t of 19 instead of many degrees of freedom: 1.07


def test_block_intervals_refuse_what_has_no_blocks():
    with pytest.raises(ValueError, match="from 2 to the number of rows, 3"):
        metrics.block_interval(torch.mean, torch.randn(3))
    with pytest.raises(ValueError, match="same number of rows"):
        metrics.block_interval(metrics.rmse, torch.randn(30), torch.randn(31))
