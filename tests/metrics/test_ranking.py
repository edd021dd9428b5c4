import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from vbdl import metrics


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 80), st.integers(1, 20), st.integers(0, 10_000))
def test_equal_to_sklearn_with_ties(n, levels, seed):
    rng = np.random.default_rng(seed)
    scores, labels = rng.integers(0, levels, n) / 7, rng.integers(0, 2, n)
    labels[:2] = 0, 1
    s, y = torch.from_numpy(scores), torch.from_numpy(labels)
    assert metrics.auroc(s, y) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert metrics.aupr(s, y) == pytest.approx(average_precision_score(labels, scores), abs=1e-12)
    fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
    assert metrics.fpr_at_tpr(s, y) == pytest.approx(fpr[tpr >= 0.95 - 1e-12].min(), abs=1e-12)


def test_constant_scores_are_exact():
    scores, y = torch.zeros(10), torch.tensor([1] * 3 + [0] * 7)
    assert metrics.auroc(scores, y) == 0.5
    assert metrics.aupr(scores, y) == pytest.approx(0.3, abs=1e-15)
    assert metrics.fpr_at_tpr(scores, y) == 1.0


def test_a_missing_class_is_refused():
    for metric in (metrics.auroc, metrics.aupr, metrics.fpr_at_tpr):
        with pytest.raises(ValueError, match="no negative rows"):
            metric(torch.rand(3), torch.ones(3, dtype=torch.bool))
        with pytest.raises(ValueError, match="NaN"):
            metric(torch.tensor([0.1, math.nan]), torch.tensor([0, 1]))


def test_delong_interval_covers_the_truth():
    # two normals one apart: AUROC = Φ(1/√2)
    truth, hits, repeats = 0.5 * (1 + math.erf(0.5)), 0, 400
    generator = torch.Generator().manual_seed(0)
    for _ in range(repeats):
        scores = torch.randn(120, generator=generator)
        y = torch.arange(120) < 50
        interval = metrics.auroc_interval(scores + y.float(), y)
        hits += interval.lower <= truth <= interval.upper
    # 5 standard deviations of a binomial of 0.95 are 0.054
    assert abs(hits / repeats - 0.95) < 0.04


def test_delong_variance_is_the_pairwise_definition():
    generator = torch.Generator().manual_seed(1)
    scores = (torch.randn(40, generator=generator) * 3).round().double()
    y = torch.arange(40) % 3 == 0
    scores = scores + y.double()
    a, b = scores[y].numpy(), scores[~y].numpy()
    psi = (a[:, None] > b).astype(float) + 0.5 * (a[:, None] == b)
    variance = psi.mean(1).var(ddof=1) / len(a) + psi.mean(0).var(ddof=1) / len(b)
    area = psi.mean()
    half = 1.959963984540054 * math.sqrt(variance) / (area * (1 - area))
    expected = 1 / (1 + math.exp(-(math.log(area / (1 - area)) - half)))
    assert metrics.auroc_interval(scores, y).lower == pytest.approx(expected, rel=1e-12)


def test_perfect_separation_does_not_claim_certainty():
    interval = metrics.auroc_interval(torch.arange(10.0), torch.arange(10) >= 5)
    assert interval.value == 1.0 and interval.upper == 1.0
    assert interval.lower == pytest.approx(0.05 ** (1 / 5))
