"""Gaussian and heteroscedastic outputs: the predictive is the mixture, never a normal of averaged scales."""

import math

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vbdl.likelihoods.gaussian import Gaussian
from vbdl.likelihoods.heteroscedastic import HeteroscedasticGaussian

FIELDS = ("mean", "total", "aleatoric", "epistemic", "standard_error", "covariance")


def predict(parameters, splits=None, covariance=True):
    likelihood = HeteroscedasticGaussian(covariance=covariance)
    pieces = parameters.split(splits or len(parameters))
    summary = likelihood.summarize(pieces[0])
    for piece in pieces[1:]:
        summary = likelihood.merge(summary, likelihood.summarize(piece))
    return likelihood.prediction(likelihood.finish(summary), len(parameters), parameters)


def components(samples=11, batch=5, outputs=3, dtype=torch.float32):
    """(samples, batch, outputs, 2) means and log-variances"""
    return torch.randn(samples, batch, outputs, 2, dtype=dtype) * torch.tensor([3.0, 0.7], dtype=dtype)


def test_two_members_far_apart_have_a_wide_predictive():
    parameters = torch.tensor([[[[-5.0, 2 * math.log(0.1)]]], [[[5.0, 2 * math.log(0.1)]]]])
    p = predict(parameters)
    torch.testing.assert_close(p.std, torch.tensor([[math.sqrt(25 + 0.01)]]))
    torch.testing.assert_close(p.aleatoric, torch.tensor([[0.01]]))
    torch.testing.assert_close(p.epistemic, torch.tensor([[25.0]]))
    assert float(p.log_prob(torch.tensor([0.0]))) < -1000 and float(p.log_prob(torch.tensor([5.0]))) > 0


@settings(max_examples=200, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 11), st.integers(0, 5), st.integers(1, 3)),
    offset=st.sampled_from([0.0, 1.0, 1000.0]),
    seed=st.integers(0, 2**32 - 1),
    split=st.integers(1, 11),
)
def test_variances_add_by_the_law_of_total_variance(shape, offset, seed, split):
    generator = torch.Generator().manual_seed(seed)
    parameters = torch.randn(*shape, 2, generator=generator)
    parameters[..., 0] += offset
    p, exact = predict(parameters, split), parameters.double()
    # a mean near 1000 is known to 6e-5 (a unit in the last place of float32), and merging multiplies it by distances
    # of order 1 between the pieces
    close = lambda a, b: torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6 + 2e-7 * offset)
    close(p.mean, exact[..., 0].mean(0))
    close(p.epistemic, (exact[..., 0] - exact[..., 0].mean(0)).square().mean(0))
    close(p.aleatoric, exact[..., 1].exp().mean(0))
    torch.testing.assert_close(p.total, p.aleatoric + p.epistemic, rtol=1e-6, atol=1e-6)


def test_variance_at_a_mean_of_a_thousand():
    """E[x^2] - E[x]^2 has nothing left here in float32: its error is 0.06, the variance 1e-4."""
    parameters = components(1000, 3, 2)
    parameters[..., 0] = 1000 + 0.01 * torch.randn(1000, 3, 2)
    for splits in (1000, 7):
        p = predict(parameters, splits)
        expected = parameters[..., 0].double().var(0, correction=0)
        torch.testing.assert_close(p.epistemic.double(), expected, rtol=0.01, atol=0)


def test_merging_any_split_is_the_whole():
    parameters = components(13)
    whole = predict(parameters)
    for splits in (1, 2, [1, 12], [5, 1, 7]):
        for name in FIELDS:
            merged = getattr(predict(parameters, splits), name)
            # variances of order 10
            torch.testing.assert_close(merged, getattr(whole, name), rtol=1e-5, atol=1e-5)


def test_every_output_is_kept_with_its_covariance():
    parameters = components(1000, 2, 5, torch.float64)
    p = predict(parameters)
    means = parameters[..., 0]
    for row in range(2):
        expected = np.cov(means[:, row].T.numpy(), bias=True) + np.diag(parameters[:, row, :, 1].exp().mean(0))
        np.testing.assert_allclose(p.covariance[row].numpy(), expected, rtol=1e-10)
    torch.testing.assert_close(p.covariance.diagonal(dim1=1, dim2=2), p.total)
    assert predict(parameters, covariance=False).covariance is None


def test_the_density_is_the_mixtures():
    parameters = components(dtype=torch.float64)
    p, y = predict(parameters), torch.randn(5, 3, dtype=torch.float64)
    std = (parameters[..., 1] / 2).exp()
    expected = scipy.special.logsumexp(
        scipy.stats.norm.logpdf(y, parameters[..., 0], std).sum(-1), axis=0, b=1 / len(parameters)
    )
    np.testing.assert_allclose(p.log_prob(y).numpy(), expected, rtol=1e-10)
    one = predict(parameters[:, :, :1])
    torch.testing.assert_close(one.log_prob(y[:, 0]), one.log_prob(y[:, :1]))


def test_distribution_function_and_quantiles_are_the_mixtures():
    parameters = components(dtype=torch.float64)
    p = predict(parameters)
    levels = torch.tensor([0.001, 0.05, 0.5, 0.9, 0.999], dtype=torch.float64)
    quantiles = p.quantile(levels)
    assert quantiles.shape == (5, 5, 3)
    for row, output in ((0, 0), (3, 2)):
        mean, std = parameters[:, row, output, 0].numpy(), (parameters[:, row, output, 1] / 2).exp().numpy()
        cdf = lambda v, m=mean, s=std: scipy.stats.norm.cdf(v, m, s).mean()
        for index, level in enumerate(levels.tolist()):
            root = scipy.optimize.brentq(lambda v, q=level, f=cdf: f(v) - q, -60, 60, xtol=1e-12)
            assert float(quantiles[index, row, output]) == pytest.approx(root, abs=1e-9)
    torch.testing.assert_close(p.cdf(quantiles[2]), torch.full((5, 3), 0.5, dtype=torch.float64))
    torch.testing.assert_close(p.quantile(0.5), quantiles[2])


def test_a_central_interval_holds_its_share():
    p = predict(components(dtype=torch.float64))
    low, high = p.interval(0.8)
    torch.testing.assert_close(p.cdf(high) - p.cdf(low), torch.full((5, 3), 0.8, dtype=torch.float64))
    torch.testing.assert_close(p.cdf(low), torch.full((5, 3), 0.1, dtype=torch.float64))


@pytest.mark.parametrize("level", [90, 1.0, -0.1])
def test_a_level_in_per_cent_is_refused(level):
    with pytest.raises(ValueError, match="0.9 for 90 %"):
        predict(components()).interval(level)


@pytest.mark.parametrize("q", [0.0, 1.0, -0.5, [0.5, 1.5]])
def test_a_level_outside_zero_and_one_is_refused(q):
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        predict(components()).quantile(torch.tensor(q))


def test_without_samples_there_is_no_mixture():
    likelihood = HeteroscedasticGaussian()
    p = likelihood.prediction(likelihood.finish(likelihood.summarize(components())), 11)
    with pytest.raises(ValueError, match=r"samples=True"):
        p.quantile(0.5)


def test_the_standard_error_is_that_of_repeated_experiments():
    """Over 4000 experiments of 11 samples each; a standard deviation is then known to 1.1 %."""
    p = predict(torch.randn(11, 4000, 3, 2), covariance=False)
    torch.testing.assert_close(p.standard_error.square().mean(0).sqrt(), p.mean.std(0), rtol=0.05, atol=0)


def test_nll_is_that_of_torch():
    likelihood = Gaussian(n_outputs=3, std=0.7)
    outputs, y = torch.randn(5, 3), torch.randn(5, 3)
    expected = -torch.distributions.Normal(outputs, 0.7).log_prob(y).sum(1)
    torch.testing.assert_close(likelihood.nll(likelihood(outputs), y), expected)
    mean, log_variance = torch.randn(2, 5, 3)
    own = HeteroscedasticGaussian()
    expected = -torch.distributions.Normal(mean, (log_variance / 2).exp()).log_prob(y).sum(1)
    torch.testing.assert_close(own.nll(own(torch.cat((mean, log_variance), -1)), y), expected)


def test_nll_sums_over_everything_but_the_batch():
    parameters, y = torch.randn(5, 3, 7, 2), torch.randn(5, 3, 7)
    expected = -torch.distributions.Normal(parameters[..., 0], (parameters[..., 1] / 2).exp()).log_prob(y).sum((1, 2))
    torch.testing.assert_close(HeteroscedasticGaussian().nll(parameters, y), expected)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_beta_nll_is_the_papers_formula(beta):
    likelihood = HeteroscedasticGaussian(beta=beta)
    mean, log_variance = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    y = torch.randn(5, 3)
    loss = likelihood.training_loss(likelihood(torch.cat((mean, log_variance), -1)), y)
    each = -torch.distributions.Normal(mean, (log_variance / 2).exp()).log_prob(y)
    expected = (log_variance.exp().detach() ** beta * each).sum(1)
    torch.testing.assert_close(loss, expected)
    found = torch.autograd.grad(loss.sum(), (mean, log_variance))
    torch.testing.assert_close(found, torch.autograd.grad(expected.sum(), (mean, log_variance)))
    if beta == 1.0:  # the gradient of the mean is that of squared error
        torch.testing.assert_close(found[0], (mean - y).detach())


def test_noise_is_learned_or_fixed():
    learned, fixed = Gaussian(2, std=0.3), Gaussian(2, std=0.3, learned=False)
    assert len(list(learned.parameters())) == 1 and not list(fixed.parameters())
    torch.testing.assert_close(fixed.noise_std, torch.tensor([0.3, 0.3]))
    assert "log_std" in fixed.state_dict()


@pytest.mark.parametrize("log_variance", [1e4, -1e4])
def test_extreme_log_variances_stay_finite(log_variance):
    likelihood = HeteroscedasticGaussian()
    parameters = likelihood(torch.tensor([[0.5, log_variance]]))
    assert bool(likelihood.nll(parameters, torch.tensor([[1.0]])).isfinite().all())
    p = predict(parameters.expand(3, 1, 1, 2))
    assert all(bool(getattr(p, name).isfinite().all()) for name in FIELDS)


@pytest.mark.parametrize(
    "y, shape, message",
    [
        (torch.tensor([[1.0], [float("nan")]]), (2, 1, 2), "row 1 is not finite"),
        (torch.tensor([float("inf"), 1.0]), (2, 1, 2), "row 0 is not finite"),
        (torch.zeros(2, 3), (2, 1, 2), r"targets \(2, 3\) do not fit outputs \(2, 1\)"),
        (torch.zeros(2), (2, 3, 2), r"targets \(2,\) do not fit outputs \(2, 3\)"),
        (torch.zeros(2, dtype=torch.bool), (2, 1, 2), "real numbers"),
    ],
)
def test_wrong_targets_are_refused_with_the_reason(y, shape, message):
    for likelihood in (Gaussian(shape[1]), HeteroscedasticGaussian()):
        with pytest.raises(ValueError, match=message):
            likelihood.check_targets(y, shape)


def test_wrong_outputs_are_refused_with_the_reason():
    with pytest.raises(ValueError, match="n_outputs=4"):
        Gaussian(n_outputs=2)(torch.randn(5, 4))
    with pytest.raises(ValueError, match="means, then log-variances"):
        HeteroscedasticGaussian()(torch.randn(5, 3))
    with pytest.raises(ValueError, match="std > 0"):
        Gaussian(1, std=0.0)
    with pytest.raises(ValueError, match="beta must lie between"):
        HeteroscedasticGaussian(beta=2.0)
