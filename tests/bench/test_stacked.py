"""Stacked evaluation and its sums, against the predictor and against the metrics of whole tensors."""

import math

import pytest
import torch
from torch import nn

import vbdl
from vbdl import metrics
from vbdl.bench.methods.mc_dropout import _together
from vbdl.bench.methods.training import DecayedAdam
from vbdl.bench.stacked import stacked_parameters
from vbdl.bench.summary import classified, regressed
from vbdl.calling.likelihood_members import replicate


def network(p: float = 0.0, outputs: int = 1) -> nn.Module:
    drop = [nn.Dropout(p)] if p else []
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), *drop, nn.Linear(8, outputs))


@pytest.mark.parametrize("kind", ["dropout", "mean-field"])
def test_draws_of_a_split_are_the_predictors(kind):
    splits, draws = 3, 7
    base = vbdl.MCDropout(network(0.3)) if kind == "dropout" else vbdl.MeanField(network(), 10, initial_std=0.3)
    q, likelihood = vbdl.DeepEnsemble(base, splits), vbdl.Gaussian(std=0.5)
    replicate(likelihood, splits)
    with torch.no_grad():
        likelihood.log_std.copy_(torch.tensor([[-1.0], [0.0], [1.0]]))
    x = torch.randn(splits, 11, 3)
    found = torch.cat(list(stacked_parameters(q, likelihood, x, draws, seed=5)))
    assert found.shape == (draws, splits, 11, 1, 2)
    predict = vbdl.Predictor(q, likelihood, splits * draws, seed=5, compile=False)
    for split in range(splits):
        samples = predict(x[split], samples=True).samples
        torch.testing.assert_close(found[:, split], samples[split::splits], rtol=1e-5, atol=1e-6)


def test_chunks_and_tiles_change_nothing(monkeypatch):
    q = vbdl.DeepEnsemble(vbdl.MCDropout(network(0.3)), 2)
    x = torch.randn(2, 9, 3)
    whole = torch.cat(list(stacked_parameters(q, vbdl.Gaussian(learned=False), x, 6)))
    monkeypatch.setattr("vbdl.bench.stacked._ROWS", 8)
    chunks = list(stacked_parameters(q, vbdl.Gaussian(learned=False), x, 6))
    assert len(chunks) == 6
    torch.testing.assert_close(torch.cat(chunks), whole, rtol=0, atol=1e-6)


def test_members_belong_to_their_split():
    nets = [network(outputs=2) for _ in range(6)]
    x = torch.randn(3, 4, 3)
    (found,) = stacked_parameters(vbdl.DeepEnsemble(nets), vbdl.HeteroscedasticGaussian(), x, 99, per_split=2)
    assert found.shape == (2, 3, 4, 1, 2)
    for split in range(3):
        for member in range(2):
            torch.testing.assert_close(
                found[member, split, :, 0], nets[2 * split + member](x[split]), atol=1e-6, rtol=0
            )
    with pytest.raises(ValueError, match="6 members, not 5"):
        list(stacked_parameters(vbdl.DeepEnsemble(nets[:5]), vbdl.HeteroscedasticGaussian(), x, 1, per_split=2))


@pytest.mark.parametrize("sizes", [(10,), (1, 2, 7), (5, 5)])
def test_regression_sums_are_those_of_the_whole_mixture(sizes):
    draws, splits, rows = 10, 2, 6
    mean, log_variance = torch.randn(draws, splits, rows), torch.randn(draws, splits, rows)
    parameters = torch.stack((mean, log_variance), dim=-1).unsqueeze(-2)
    y, scale, center = torch.randn(splits, rows), torch.tensor([2.0, 0.1]), torch.tensor([5.0, -1.0])
    found = regressed(parameters.split(sizes), y, scale, center)
    for k in range(splits):
        means, stds = mean[:, k].double(), (0.5 * log_variance[:, k].double()).exp()
        s, c = float(scale[k]), float(center[k])
        target = y[k].double() * s + c
        args = (means * s + c, stds * s, target)
        torch.testing.assert_close(found.nll[k], metrics.mixture_nll(*args), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found.pit[k], metrics.mixture_cdf(*args), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found.crps[k], metrics.crps_mixture(*args), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found.loss[k], (target - args[0].mean(0)).square(), rtol=1e-9, atol=1e-9)
        total = (stds * s).square().mean(0) + (means * s).var(0, correction=0)
        torch.testing.assert_close(found.total[k], total, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found.epistemic[k] + found.aleatoric[k], found.total[k], rtol=1e-9, atol=1e-9)


def test_classification_sums_are_the_likelihoods():
    logits, y = torch.randn(9, 2, 5, 3), torch.randint(3, (2, 5))
    found = classified(logits.split((4, 5)), y)
    likelihood = vbdl.Categorical()
    for k in range(2):
        p = likelihood.prediction(likelihood.finish(likelihood.summarize(logits[:, k])), 9)
        torch.testing.assert_close(found.probs[k].float(), p.probs, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.total[k].float(), p.total, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.epistemic[k].float(), p.epistemic, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.nll[k], metrics.categorical_nll(found.probs[k], y[k]))
        torch.testing.assert_close(found.loss[k], 1 - metrics.correct(found.probs[k], y[k]))


def test_decay_by_member_is_adams_own():
    weights = torch.randn(2, 4)
    ours = nn.Parameter(weights.clone())
    optimizer = DecayedAdam([ours], 0.1, torch.tensor([0.5, 0.01]))
    plain = [nn.Parameter(w.clone()) for w in weights]
    others = [torch.optim.Adam([p], lr=0.1, weight_decay=d) for p, d in zip(plain, (0.5, 0.01), strict=True)]
    for _ in range(4):
        gradient = torch.randn(2, 4)
        ours.grad = gradient.clone()
        optimizer.step()
        for p, g, other in zip(plain, gradient, others, strict=True):
            p.grad = g.clone()
            other.step()
    torch.testing.assert_close(ours.detach(), torch.stack([p.detach() for p in plain]))


def test_parts_with_other_chunks_are_put_together_in_order():
    draws = torch.arange(12.0).view(12, 1, 1).expand(12, 3, 2) * torch.tensor([1.0, 10.0, 100.0]).view(3, 1)
    parts = [([2, 0], iter(draws[:, [2, 0]].split(5))), ([1], iter(draws[:, [1]].split(4)))]
    found = list(_together(parts, 3, 11, size=3))
    assert [len(c) for c in found] == [3, 3, 3, 2]
    assert torch.equal(torch.cat(found), draws[:11])


def test_a_precision_is_a_noise_level():
    """tau of the protocol is in target units: the likelihood under it is Gal's formula."""
    tau, scale = 0.15, 9.0
    mean, y = torch.randn(20, 1, 5), torch.randn(1, 5)
    noise = torch.full_like(mean, 2 * math.log(1 / (math.sqrt(tau) * scale)))
    found = regressed([torch.stack((mean, noise), -1).unsqueeze(-2)], y, torch.tensor([scale]), torch.zeros(1))
    error = (scale * (y - mean)).double()
    formula = torch.logsumexp(-0.5 * tau * error.square(), 0) - math.log(20) - 0.5 * math.log(2 * math.pi / tau)
    torch.testing.assert_close(-found.nll, formula, rtol=1e-6, atol=1e-6)
