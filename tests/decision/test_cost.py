import math

import numpy as np
import pytest
import torch

from vbdl import decision
from vbdl.decision import REFER, ExpectedCost, decide, realized_cost
from vbdl.decision.distribution import Evidence


def test_least_expected_cost_equals_brute_force_for_500_matrices():
    rng = np.random.default_rng(0)
    for _ in range(500):
        classes, actions, n = rng.integers(2, 5), rng.integers(1, 5), rng.integers(1, 8)
        # eighths: sums are exact, so that ties are ties
        cost = rng.integers(0, 6, (classes, actions)).astype(float)
        probs = rng.multinomial(8, np.ones(classes) / classes, n) / 8
        refer = float(rng.integers(0, 5))
        expected = []
        for p in probs:
            costs = [sum(p[k] * cost[k, a] for k in range(classes)) for a in range(actions)]
            best = min(range(actions), key=lambda a: (costs[a], a))
            expected.append(best if costs[best] <= refer else REFER)
        p, c = torch.from_numpy(probs), torch.from_numpy(cost)
        actions_found = decide(p, c, refer)
        assert actions_found.tolist() == expected
        # a unit twice as large or 1024 times smaller is the same problem, exactly
        assert torch.equal(decide(p, c * 2, refer * 2), actions_found)
        assert torch.equal(decide(p, c / 1024, refer / 1024), actions_found)


def test_a_row_decides_alone_as_in_a_batch():
    generator = torch.Generator().manual_seed(0)
    probs = torch.randn(257, 5, generator=generator).softmax(1)
    rule = ExpectedCost(torch.rand(5, 5, generator=generator), 0.45)
    together = rule.expected(probs)
    for i in (0, 100, 256):
        assert torch.equal(rule.expected(probs[i : i + 1])[0], together[i])


def test_chow_rule():
    # error costs 1, referral 0.2: refer below 80 % confidence
    probs = torch.tensor([[0.81, 0.19], [0.79, 0.21], [0.2, 0.8]], dtype=torch.float64)
    assert decide(probs, 1 - torch.eye(2), 0.2).tolist() == [0, REFER, 1]


def test_binary_column_and_prediction_objects():
    cost = torch.tensor([[0.0, 1.0], [5.0, 0.0]])
    p = torch.tensor([0.1, 0.2, 0.9])
    assert decide(p, cost).tolist() == [0, 1, 1]
    assert ExpectedCost(cost)(Evidence(probs=p, total=p)).tolist() == [0, 1, 1]


def test_broken_probabilities_are_referred():
    probs = torch.tensor([[0.5, 0.5], [math.nan, 0.5]])
    assert decide(probs, 1 - torch.eye(2), 1.0).tolist() == [0, REFER]
    assert decide(probs, 1 - torch.eye(2)).tolist() == [0, REFER]


def test_realized_cost_and_refusals():
    cost = torch.tensor([[0.0, 1.0], [5.0, 0.0]])
    paid = realized_cost(torch.tensor([0, 1, REFER]), torch.tensor([1, 0, 1]), cost, 0.5)
    assert paid.tolist() == [5.0, 1.0, 0.5]
    with pytest.raises(ValueError, match="pass refer_cost"):
        realized_cost(torch.tensor([REFER]), torch.tensor([1]), cost)
    with pytest.raises(ValueError, match="2 classes"):
        decide(torch.ones(1, 3) / 3, cost)
    with pytest.raises(ValueError, match="NaN or infinite"):
        ExpectedCost(torch.tensor([[math.inf]]))
    with pytest.raises(ValueError, match=r"\(classes, actions\)"):
        ExpectedCost(torch.zeros(3))


def test_the_british_name_is_deprecated():
    actions, y, cost = torch.tensor([0, 1]), torch.tensor([1, 1]), torch.tensor([[0.0, 1.0], [5.0, 0.0]])
    with pytest.warns(DeprecationWarning, match="called vbdl.decision.realized_cost"):
        assert decision.realised_cost(actions, y, cost).tolist() == realized_cost(actions, y, cost).tolist()
    with pytest.raises(AttributeError, match="no attribute 'realized_costs'"):
        decision.realized_costs  # noqa: B018
