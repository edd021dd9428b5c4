"""Each of the three applications inside a predictor: predict(x) returns the action, saved and compiled with it."""

import json
import math
import threading
import time

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import vbdl
from vbdl.artifact.modules import describe, rebuild
from vbdl.decision import (
    AnomalyFlags,
    Drive,
    ExpectedCost,
    HandOver,
    Mode,
    PathBounds,
    Risk,
    mixture_tail,
    path_risk,
    with_decision,
)
from vbdl.decision.distribution import Evidence
from vbdl.engine.predictor import Predictor
from vbdl.likelihoods.bernoulli import Bernoulli
from vbdl.likelihoods.categorical import Categorical
from vbdl.likelihoods.heteroscedastic import HeteroscedasticGaussian
from vbdl.posteriors.ensemble import DeepEnsemble

HORIZON = 5


def _predictor(outputs, likelihood, **settings):
    torch.manual_seed(0)
    members = [nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, outputs)) for _ in range(6)]
    return Predictor(DeepEnsemble(members), likelihood, **{"compile": False, **settings})


@pytest.fixture(scope="module")
def paths():
    return _predictor(2 * HORIZON, HeteroscedasticGaussian())


@pytest.fixture(scope="module")
def returns():
    return _predictor(2, HeteroscedasticGaussian())


@pytest.fixture(scope="module")
def x():
    return torch.randn(300, 4, generator=torch.Generator().manual_seed(1))


def _again(predictor):
    """The predictor with its likelihood taken through JSON and tensors."""
    state = {n: t.clone() for n, t in predictor.likelihood.state_dict().items()}
    return predictor.replace(likelihood=rebuild(json.loads(json.dumps(describe(predictor.likelihood))), state))


def test_hand_over_is_each_rows_own_mode_and_survives_storage(x):
    predictor = _predictor(3, Categorical())
    u = predictor(x).epistemic
    warn, hand = float(u.quantile(0.6)), float(u.quantile(0.9))
    deciding = with_decision(predictor, HandOver((warn, warn / 2), (hand, hand / 2), kind="epistemic"))
    p = deciding(x)
    assert torch.equal(p.action, (u >= warn).long() + (u >= hand).long())
    assert set(p.action.tolist()) == set(Mode) and torch.equal(p.risk, u.double())
    assert torch.equal(deciding(x[7:8]).action, p.action[7:8])  # no memory of other rows
    again = _again(deciding)
    assert torch.equal(again(x).action, p.action) and again.likelihood.decision.deadline is None


def test_path_risk_in_the_predictor_is_that_of_sampled_paths(paths, x):
    bounds = PathBounds(-1.5, torch.linspace(1.0, 2.0, HORIZON))
    deciding = with_decision(paths, HandOver((0.57, 0.3), (0.62, 0.5), bounds=bounds))
    p = deciding(x, samples=True)
    mean, std = p.samples[..., 0].double(), (0.5 * p.samples[..., 1].double()).exp()
    noise = torch.randn(4000, *mean.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    sampled = path_risk((mean + std * noise).flatten(0, 1), bounds.lower, bounds.upper)
    # 24,000 sampled paths a row, 6 standard errors
    assert float((p.risk - sampled.probability).abs().max()) < 6 * 0.5 / math.sqrt(4000 * 6)
    assert set(p.action.tolist()) == set(Mode)
    assert torch.equal(_again(deciding)(x).risk, p.risk)
    # the same however the draws are cut into chunks
    np.testing.assert_allclose(deciding.replace(chunk_size=4)(x).risk, p.risk, rtol=1e-6)


def test_a_tiny_path_risk_is_not_rounded_to_zero():
    parameters = torch.zeros(1, 1, 3, 2)
    assert float(PathBounds(upper=9.0)(parameters)) == pytest.approx(3 * stats.norm.sf(9.0), rel=1e-9)
    assert float(PathBounds(upper=-40.0)(parameters)) == 1.0
    with pytest.raises(ValueError, match="give lower, upper or both"):
        PathBounds()
    with pytest.raises(ValueError, match="has a NaN"):
        PathBounds(math.nan)


def test_drive_remembers_and_fails_safe(x):
    predictor = _predictor(3, Categorical(), tiles=(1,))
    order = predictor(x).total.argsort()
    calm, wild = x[order[:1]], x[order[-1:]]
    low, high = float(predictor(calm).total[0]), float(predictor(wild).total[0])
    middle = (low + high) / 2
    machine = HandOver((middle, middle), (high * 2, high), dwell=3, deadline=0.5, latched=False)
    deciding = with_decision(predictor, machine)
    deciding(calm)  # traced before the clock runs
    with Drive(deciding) as drive:
        modes = [drive(frame).mode for frame in (calm, wild, calm, calm, calm)]
        assert modes == [Mode.DRIVE, Mode.WARN, Mode.WARN, Mode.WARN, Mode.DRIVE]
        assert drive.prediction.action.tolist() == [Mode.DRIVE]
        assert drive(None).reason == "missing" and drive.prediction is None
        assert drive(torch.zeros(1, 99)).reason == "failed"
        assert drive(calm * float("nan")).reason == "failed"
        assert drive(torch.cat((calm, calm))).reason == "failed"
        assert drive.machine.mode == Mode.HAND_OVER and machine.mode == Mode.DRIVE
    with pytest.raises(TypeError, match="needs a predictor with a HandOver decision"):
        Drive(predictor)


def test_a_prediction_that_hangs_hands_over_at_the_deadline(x):
    deciding = with_decision(_predictor(3, Categorical()), HandOver((9, 9), (9, 9), deadline=1.0, latched=False))
    predict, free = deciding.__class__.__call__, threading.Event()
    free.set()

    class Hanging(Predictor):
        def __call__(self, x, samples=False):
            free.wait(60)
            return predict(self, x, samples)

    deciding(x[:1])  # traced before the clock runs
    deciding.__class__ = Hanging
    with Drive(deciding) as drive:
        assert drive(x[:1]).reason != "late"
        free.clear()
        begun = time.perf_counter()
        assert drive(x[:1]) == drive.machine.fail("late")  # told while it hangs
        assert time.perf_counter() - begun > 0.9  # at the deadline
        begun = time.perf_counter()
        assert drive(x[:1]).reason == "late" and time.perf_counter() - begun < 0.9  # the thread is still at it
        free.set()
        until = time.perf_counter() + 30
        while drive(x[:1]).reason == "late":
            assert time.perf_counter() < until, "it hangs no more, and is late still"


def test_risk_is_the_textbook_and_shrinks_with_epistemic_variance(returns, x):
    deciding = with_decision(returns, Risk(0.975, fraction=0.5, limit=0.3, max_var=0.2))
    p = deciding(x)
    kept = returns(x, samples=True).samples.double()
    means, stds = kept[..., 0], (0.5 * kept[..., 1]).exp()
    exact = mixture_tail(means, stds, 0.975)
    np.testing.assert_allclose(p.var, exact.var, rtol=1e-4)
    np.testing.assert_allclose(p.es, exact.es, rtol=1e-4)
    mean, std = p.mean.double().numpy(), p.total.double().sqrt().numpy()
    # the VaR of the position itself is at most the budget, and the position the whole one where that allows it
    position = p.action.numpy()
    short = mixture_tail(-means, stds, 0.975).var.numpy()
    own = np.where(position < 0, -position * short, position * exact.var.numpy())
    free = np.clip(0.5 * mean / std**2, -0.3, 0.3)
    assert float(own.max()) <= 0.2 * (1 + 1e-5)
    loose = own < 0.2 * (1 - 1e-4)
    assert 0 < int(loose.sum()) < 300
    np.testing.assert_allclose(position[loose], free[loose], rtol=1e-4)
    assert torch.equal(_again(deciding)(x).action, p.action)
    # the variance between members enters: without it the position would be larger
    alone = (0.5 * p.mean / p.aleatoric).clamp(-0.3, 0.3)
    assert bool((with_decision(returns, Risk(limit=0.3))(x).action.abs() <= alone.abs() + 1e-7).all())


def test_risk_of_broken_numbers_is_no_position():
    mean = torch.tensor([[math.nan], [0.1], [math.inf], [0.1]])
    total = torch.tensor([[1.0], [math.nan], [1.0], [0.0]])
    assert Risk()(Evidence(mean=mean, total=total))["action"].tolist() == [[0.0]] * 4
    for bad in ({"level": 1.0}, {"fraction": 0.0}, {"fraction": 2.0}, {"limit": 0.0}, {"max_var": -1.0}):
        with pytest.raises(ValueError):
            Risk(**bad)


def test_anomaly_flags_keep_their_budget_inside_a_predictor(returns, x):
    flags = AnomalyFlags(0.05, "epistemic").fit(returns(x[:200]).epistemic.squeeze(1))
    deciding = with_decision(returns, flags)
    p = deciding(x)
    assert p.action.dtype == torch.bool
    assert torch.equal(p.action, flags.flag(p.epistemic.squeeze(1), 0.05))
    assert float(p.action[:200].double().mean()) <= 0.05
    assert torch.equal(_again(deciding)(x).action, p.action)
    with pytest.raises(ValueError, match="fit on at least"):
        AnomalyFlags(0.001).fit(torch.rand(10))
    with pytest.raises(RuntimeError, match="needs a rate of false alarms"):
        with_decision(returns, AnomalyFlags().fit(torch.rand(10)))(x)


@pytest.mark.slow
@pytest.mark.parametrize(
    "decision",
    [
        HandOver((0.6, 0.3), (0.9, 0.5), bounds=PathBounds(-1.5, 1.5)),
        Risk(max_var=0.2),
    ],
    ids=lambda d: type(d).__name__,
)
def test_compiled_with_the_predictor(paths, x, decision):
    deciding = with_decision(paths, decision)
    eager, compiled = deciding(x), deciding.replace(compile=True)(x)
    for name in ("action", "risk", "var", "es"):
        if getattr(eager, name, None) is not None:
            np.testing.assert_allclose(getattr(compiled, name), getattr(eager, name), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "decision",
    [
        HandOver((0.6, 0.3), (0.9, 0.5), deadline=0.1, bounds=PathBounds(-1.5, torch.linspace(1, 2, HORIZON))),
        HandOver((0.6, 0.3), (0.9, 0.5), bounds=PathBounds(upper=1.5)),
        Risk(max_var=0.2),
    ],
)
def test_saved_and_loaded_it_acts_the_same(paths, x, decision, tmp_path):
    deciding = with_decision(paths, decision)
    expected = deciding(x)
    deciding.save(tmp_path / "model")
    found = vbdl.load(tmp_path / "model")(x)
    for name in ("action", "risk", "var", "es"):
        if getattr(expected, name, None) is not None:
            assert torch.equal(getattr(found, name), getattr(expected, name))


def test_a_decision_for_another_kind_of_prediction_is_said_to_be_that(x):
    predict = _predictor(2, Categorical())
    with pytest.raises(AttributeError, match="reads 'mean', but the prediction has only probs.*Risk for a regression"):
        with_decision(predict, Risk())(x)


def test_a_cost_of_classes_is_not_read_from_questions_of_yes_or_no(x):
    """Two probabilities that do not sum to one are no distribution of two classes."""
    predict = _predictor(2, Bernoulli())
    cost = ExpectedCost(torch.tensor([[0.0, 1.0], [5.0, 0.0]]))
    with pytest.raises(ValueError, match="has 2 binary outputs"):
        with_decision(predict, cost)(x)
    with pytest.raises(ValueError, match="has 2 binary outputs"):
        cost(predict(x))
    assert cost(predict(x).probs[:, 1]).shape == (300,)
    assert with_decision(_predictor(1, Bernoulli()), cost)(x).action.shape == (300,)


def test_a_path_risk_of_no_path_is_named(paths, x):
    machine = HandOver((0.6, 0.3), (0.9, 0.5), bounds=PathBounds(-1.0))
    with pytest.raises(ValueError, match="a path risk needs a regression"):
        with_decision(_predictor(2, Categorical()), machine)(x)
    with pytest.raises(ValueError, match=f"upper has 2 steps, but the path has {HORIZON}"):
        with_decision(paths, HandOver((0.6, 0.3), (0.9, 0.5), bounds=PathBounds(-1.0, torch.ones(2))))(x)
