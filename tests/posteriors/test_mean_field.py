"""Mean-field inference against what can be computed exactly: Bayesian linear regression."""

import pytest
import torch
from torch import nn

from vbdl.engine.predictor import Predictor
from vbdl.likelihoods.gaussian import Gaussian
from vbdl.posteriors.mean_field import MeanField

N, FEATURES, NOISE, PRIOR = 53, 3, 0.3, 1.5


def regression(correlation=0.0):
    x = torch.randn(N, FEATURES, dtype=torch.float64)
    x[:, 1] = correlation * x[:, 0] + (1 - correlation**2) ** 0.5 * x[:, 1]
    return x, x @ torch.tensor([[1.0], [-2.0], [0.5]]).double() + NOISE * torch.randn(N, 1, dtype=torch.float64)


def exact(x, y):
    """Posterior mean and precision of the weights."""
    precision = x.T @ x / NOISE**2 + torch.eye(FEATURES, dtype=x.dtype) / PRIOR**2
    return torch.linalg.solve(precision, x.T @ y / NOISE**2), precision


def fitted(x, y, steps, n_samples):
    """By gradient descent on the loss itself, with a falling step."""
    net = nn.Linear(FEATURES, 1, bias=False).double()
    q = MeanField(net, n_data=N, prior=PRIOR, initial_std=0.1, n_samples=n_samples)
    likelihood = Gaussian(1, std=NOISE, learned=False).double()
    optimizer = torch.optim.Adam(q.parameters(), lr=0.03)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        q.loss(x, y, likelihood).backward()
        optimizer.step()
        schedule.step()
    return q, likelihood


@pytest.mark.parametrize(
    "correlation, steps, n_samples, mean_error, variance_error",
    [(0.7, 400, 8, 0.008, 0.15), pytest.param(0.0, 1500, 32, 0.003, 0.04, marks=pytest.mark.slow)],
)
def test_the_optimum_is_the_closed_form(correlation, steps, n_samples, mean_error, variance_error):
    """In the family of independent normals it is the exact mean, and the reciprocal of the precision's diagonal."""
    x, y = regression(correlation)
    mean, precision = exact(x, y)
    q, likelihood = fitted(x, y, steps, n_samples)
    found, log_std = q.module.inner.weight.detach().T, q.module.log_std["weight"].detach().T
    # Monte Carlo noise left by the last steps; the posterior std is about 0.04
    torch.testing.assert_close(found, mean, rtol=0, atol=mean_error)
    variance = 1 / precision.diagonal().unsqueeze(1)
    torch.testing.assert_close((2 * log_std).exp(), variance, rtol=variance_error, atol=0)

    predict = Predictor(q, likelihood, n_samples=2000, tiles=(64,), compile=False)
    p = predict(x[:11])
    torch.testing.assert_close(p.mean, x[:11] @ mean, rtol=0, atol=0.03)
    # a variance of 2000 draws is known to 3 %, four of those and the optimum's own error
    torch.testing.assert_close(p.epistemic, x[:11].square() @ variance, rtol=0.12 + variance_error, atol=0)
    torch.testing.assert_close(p.aleatoric, torch.full((11, 1), NOISE**2, dtype=torch.float64))


def test_the_closed_form_is_a_stationary_point():
    """The gradient of the expected loss, by 600 draws, is zero there to Monte Carlo error, and not beside it."""
    x, y = regression(0.5)
    mean, precision = exact(x, y)
    likelihood = Gaussian(1, std=NOISE, learned=False).double()

    def gradient(scale):
        q = MeanField(nn.Linear(FEATURES, 1, bias=False).double(), N, prior=PRIOR, n_samples=1)
        with torch.no_grad():
            q.module.inner.weight.copy_(mean.T)
            q.module.log_std["weight"].copy_((-0.5 * precision.diagonal().log()).unsqueeze(0) + scale)
        each = []
        for _ in range(600):
            q.zero_grad()
            q.loss(x, y, likelihood).backward()
            each.append(torch.cat([q.module.inner.weight.grad, q.module.log_std["weight"].grad]).flatten())
        each = torch.stack(each)
        return each.mean(0) / (each.std(0) / len(each) ** 0.5)  # in standard errors

    assert float(gradient(0.0).abs().max()) < 4
    assert float(gradient(0.3).abs()[FEATURES:].min()) > 4


def test_training_draws_are_not_those_of_prediction():
    """A posterior whose loss was evaluated on the very draws it predicts with would look better than it is."""
    q = MeanField(nn.Linear(3, 1, bias=False), 101, initial_std=1.0)
    x = torch.eye(3)
    predicted = Predictor(q, Gaussian(), n_samples=7, compile=False)(x, samples=True).samples[..., 0]
    trained = []
    handle = q.module.inner.register_forward_hook(lambda m, i, out: trained.append(out.detach()))
    for _ in range(7):
        q.loss(x, torch.zeros(3, 1), Gaussian())
    handle.remove()
    for a in trained:
        assert not any(torch.allclose(a, b, atol=1e-4) for b in predicted)


def test_trained_weights_are_the_initial_means():
    net = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 7))
    q = MeanField(net, 101)
    for name, p in net.named_parameters():
        assert torch.equal(q.module.inner.get_parameter(name), p)
    assert q.module.inner is not net
