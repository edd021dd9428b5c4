"""A likelihood with what is inside it survives JSON and tensors, and nothing else gets in."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from vbdl import calibration
from vbdl.artifact.modules import describe, rebuild
from vbdl.calibration import CalibratedLikelihood
from vbdl.decision import AnomalyFlags, ExpectedCost, Referral
from vbdl.decision.deciding import DecidingLikelihood
from vbdl.likelihoods.bernoulli import Bernoulli
from vbdl.likelihoods.categorical import Categorical
from vbdl.likelihoods.gaussian import Gaussian
from vbdl.likelihoods.heteroscedastic import HeteroscedasticGaussian


def _around(module):
    state = {n: t.clone() for n, t in module.state_dict().items()}
    return rebuild(json.loads(json.dumps(describe(module))), state)


def _rows(classes=3):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, classes, generator=generator) * 2
    return logits, torch.multinomial((logits / 2).softmax(1), 1, generator=generator).squeeze(1)


METHODS = [
    calibration.Temperature(),
    calibration.VectorScaling(),
    calibration.MatrixScaling(0.3),
    calibration.Temperature("probs"),
    calibration.EnsembleTemperature(),
    calibration.Dirichlet(0.3),
    calibration.Platt(False),
    calibration.Beta(),
    calibration.Histogram(7, "mass"),
    calibration.Isotonic(),
    calibration.BBQ(),
    calibration.ConformalSets(0.2, calibration.RAPS(0.02, 1), per_class=True, never_empty=True),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("decision", [None, Referral("epistemic", 0.1), ExpectedCost(1 - torch.eye(3), 0.4)])
def test_classification(method, decision):
    logits, y = _rows()
    method.fit(logits if method.acts_on == "logits" else logits.softmax(1), y)
    likelihood = CalibratedLikelihood(Categorical(), method, 200, 3)
    if decision is not None:
        likelihood = DecidingLikelihood(likelihood, decision)
    back = _around(likelihood)
    outputs = torch.randn(5, 9, 3, generator=torch.Generator().manual_seed(1))
    results = []
    for one in (likelihood, back):
        fields = one.finish(one.summarize(one(outputs)))
        results.append(one.prediction(fields, 5))
    for name, value in vars(results[0]).items():
        other = getattr(results[1], name)
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
    inner = back.likelihood if decision is not None else back
    assert int(inner.n_rows) == 200 and int(inner.n_overlap) == 3


@pytest.mark.parametrize(
    "method",
    [
        calibration.StdScaling(),
        calibration.CDFRecalibration(),
        calibration.AbsoluteIntervals(0.2),
        calibration.NormalizedIntervals(0.2),
        calibration.CQR(0.2),
    ],
    ids=lambda m: type(m).__name__,
)
def test_regression(method):
    generator = torch.Generator().manual_seed(0)
    likelihood = HeteroscedasticGaussian(covariance=True)
    outputs = torch.randn(4, 60, 4, generator=generator)
    parameters = likelihood(outputs.flatten(0, 1)).unflatten(0, (4, 60))
    prediction = likelihood.prediction(likelihood.finish(likelihood.summarize(parameters)), 4, parameters)
    method.fit_prediction(prediction, torch.randn(60, 2, generator=generator) * 2)
    calibrated = CalibratedLikelihood(likelihood, method, 60, 0)
    back = _around(calibrated)
    found = [one.prediction(one.finish(one.summarize(parameters)), 4, parameters) for one in (calibrated, back)]
    for name, value in vars(found[0]).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, getattr(found[1], name))
    q = [p.quantile(0.3) for p in found]
    assert torch.equal(*q)


def test_covariance_is_scaled_with_the_variances():
    generator = torch.Generator().manual_seed(0)
    likelihood = HeteroscedasticGaussian(covariance=True)
    parameters = likelihood(torch.randn(40, 4, generator=generator)).unsqueeze(0).repeat(3, 1, 1, 1)
    parameters = parameters + 0.3 * torch.randn(parameters.shape, generator=generator)
    scaling = calibration.StdScaling()
    scaling.log_scale = torch.tensor([0.5, -0.2], dtype=torch.float64)
    calibrated = CalibratedLikelihood(likelihood, scaling, 1, 0)
    p = calibrated.prediction(calibrated.finish(calibrated.summarize(parameters)), 3)
    np.testing.assert_allclose(p.covariance.diagonal(dim1=1, dim2=2), p.total, rtol=1e-5)


def test_likelihoods_alone_and_their_learned_noise():
    noise = Gaussian(2, std=3.0)
    with torch.no_grad():
        noise.log_std.copy_(torch.tensor([0.1, -0.4]))
    assert torch.equal(_around(noise).noise_std, noise.noise_std)
    assert _around(Categorical(1)).class_axis == 1
    assert isinstance(_around(Bernoulli()), Bernoulli)
    members = Gaussian(2)
    members.log_std = nn.Parameter(torch.randn(3, 2))
    members.n_members = 3
    back = _around(CalibratedLikelihood(members, calibration.Temperature(), 1, 0))
    assert back.n_members == 3 and torch.equal(back.likelihood.log_std, members.log_std)


def test_what_was_promised_is_kept():
    u = torch.rand(500, generator=torch.Generator().manual_seed(0))
    rule = Referral().for_risk(u, u > 0.97, 0.05)
    back = _around(rule)
    assert back.certificate == rule.certificate and torch.equal(back.refer(u), rule.refer(u))
    flags = AnomalyFlags().fit(u)
    assert torch.equal(_around(flags).p_values(u), flags.p_values(u))


def test_strangers_are_refused():
    class Own(nn.Module):
        pass

    class Temperature(nn.Module):
        pass

    for stranger in (Own(), Temperature(), nn.Linear(1, 1)):
        with pytest.raises(ValueError, match="cannot be stored because it is not registered"):
            describe(stranger)
    good = describe(Categorical())
    for bad in (
        {**good, "class": "os.system"},
        {**good, "class": None},
        {**good, "arguments": {"command": "x"}},
        {"class": "CalibratedLikelihood", "arguments": {"likelihood": {"module": {"class": "Linear"}}}},
        {"class": "ExpectedCost", "arguments": {"cost": {"tensor": "cost"}}},
    ):
        with pytest.raises(ValueError):
            rebuild(bad, {})
    with pytest.raises(ValueError, match="has no tensor"):
        rebuild(good, {"weight": torch.zeros(1)})
