import math

import pytest
import torch

from vbdl import metrics


def _members(members=3, batch=20, classes=4):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(members, batch, classes, generator=generator, dtype=torch.float64).softmax(2)


def test_equal_members_have_no_diversity():
    same = _members(1).expand(3, -1, -1)
    d = metrics.diversity(same)
    assert d.disagreement == 0 and d.variance == 0
    assert d.mutual_information == pytest.approx(0, abs=1e-15)
    assert d.pairwise_kl == pytest.approx(0, abs=1e-15)
    assert math.isnan(d.error_correlation)


def test_by_hand_for_two_members():
    probs = torch.tensor([[[0.9, 0.1], [0.5, 0.5]], [[0.1, 0.9], [0.5, 0.5]]], dtype=torch.float64)
    d = metrics.diversity(probs)
    kl = 0.8 * math.log(9)
    entropy = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    assert d.disagreement == 0.5
    assert d.pairwise_kl == pytest.approx(kl / 2, rel=1e-12)
    assert d.mutual_information == pytest.approx((math.log(2) - entropy) / 2, rel=1e-12)
    assert d.variance == pytest.approx(2 * 0.16 / 2, rel=1e-12)


def test_errors_together_and_apart():
    right, wrong = [0.9, 0.1], [0.1, 0.9]
    together = torch.tensor([[right, wrong, right, wrong]] * 2)
    apart = torch.tensor([[right, wrong, right, wrong], [wrong, right, wrong, right]])
    y = torch.zeros(4, dtype=torch.int64)
    assert metrics.diversity(together, y).error_correlation == pytest.approx(1)
    assert metrics.diversity(together, y).q_statistic == 1
    assert metrics.diversity(apart, y).error_correlation == pytest.approx(-1)
    assert metrics.diversity(apart, y).q_statistic == -1


def test_mutual_information_is_the_mean_divergence_to_the_mean():
    p = _members()
    mean = p.mean(0)
    expected = float((p * (p / mean).log()).sum(2).mean())
    d = metrics.diversity(p)
    assert d.mutual_information == pytest.approx(expected, rel=1e-10)
    assert 0 <= d.mutual_information <= math.log(4)


def test_one_member_is_refused():
    with pytest.raises(ValueError, match="two members"):
        metrics.diversity(_members(1))
    with pytest.raises(ValueError, match="members, batch, classes"):
        metrics.diversity(_members()[0])
