"""Local reparameterization: the same distribution of every row, and what it is not."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vbdl import Gaussian, MeanField, Predictor

DRAWS = 4000
LOCAL = "draw their outputs, not their weights"


def posterior(net=None, std=0.3) -> MeanField:
    torch.manual_seed(0)
    return MeanField(net or nn.Linear(3, 2), n_data=101, initial_std=std)


def drawn(q, x, **settings):
    """(samples, rows, outputs) means of the draws, and the plan in words."""
    settings = {"n_samples": DRAWS, "tiles": (64,), "compile": False, **settings}
    predict = Predictor(q, Gaussian(2), **settings)
    return predict(x, samples=True).samples[..., 0].double(), predict.explain()


def test_one_layer_has_the_mean_and_variance_of_the_formula():
    """Kingma et al. 2015, equation 6; z-tests at 5 standard errors."""
    q, x = posterior(), torch.randn(7, 3)
    found, said = drawn(q, x)
    assert LOCAL in said
    inner = q.module.inner
    mean = (x @ inner.weight.mT + inner.bias).detach().double()
    variance = 0.3**2 * (x.double().square().sum(1, keepdim=True) + 1).expand_as(mean)
    assert float(((found.mean(0) - mean) / (variance / DRAWS).sqrt()).abs().max()) < 5
    assert float((found.var(0) / variance - 1).abs().max()) < 5 * (2 / DRAWS) ** 0.5


@pytest.mark.parametrize("tiles", [(64,), (128,)])
def test_two_layers_agree_with_drawn_weights_on_every_row(tiles):
    """Means, variances, quantiles and the covariance of a row's outputs, against other draws of the weights."""
    q = posterior(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)))
    x = torch.randn(5, 3)
    local, said = drawn(q, x, tiles=tiles)
    weights, other = drawn(q, x, tiles=tiles, joint=True, seed=1)
    assert LOCAL in said and LOCAL not in other
    assert ("2 mean-field layers" if tiles == (64,) else "1 mean-field layers") in said  # hidden ones by the tile
    error = ((local.var(0) + weights.var(0)) / DRAWS).sqrt()
    assert float(((local.mean(0) - weights.mean(0)) / error).abs().max()) < 5
    kurtosis = lambda t: ((t - t.mean(0)) ** 4).mean(0) / t.var(0) ** 2
    error = ((kurtosis(local) + kurtosis(weights) - 2) / DRAWS).sqrt()
    assert float(((local.var(0) / weights.var(0) - 1) / error).abs().max()) < 5
    for level in (0.05, 0.5, 0.95):  # the share of local draws below the other draws' quantile
        share = (local <= weights.quantile(level, dim=0)).double().mean(0)
        assert float(((share - level) / (2 * level * (1 - level) / DRAWS) ** 0.5).abs().max()) < 5
    for row in range(5):
        a, b = local[:, row].T.corrcoef()[0, 1].atanh(), weights[:, row].T.corrcoef()[0, 1].atanh()
        assert abs(float(a - b)) < 5 * (2 / DRAWS) ** 0.5 * 2


def test_rows_are_not_jointly_drawn_unless_asked():
    """Orthogonal inputs use different weights: jointly drawn they are uncorrelated, with shared noise they are not."""
    q, x = posterior(nn.Linear(3, 2, bias=False)), torch.eye(3)[:2]
    correlation = lambda s: float(s[:, :, 0].T.corrcoef()[0, 1])
    assert correlation(drawn(q, x)[0]) > 0.99
    assert abs(correlation(drawn(q, x, joint=True)[0])) < 5 / DRAWS**0.5


def test_which_layers_is_a_matter_of_the_predictor_not_of_the_batch():
    q, x = posterior(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))), torch.randn(130, 3)
    predict = Predictor(q, Gaussian(2), n_samples=7, tiles=(1, 64, 128), compile=False)
    whole = predict(x)
    for rows in (1, 40, 100):
        torch.testing.assert_close(predict(x[:rows]).mean, whole.mean[:rows], rtol=1e-5, atol=1e-5)


class Sequence(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.embed(x.unflatten(1, (2, 3))).relu().mean(1))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.square, self.head = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.square(self.square(x).relu()))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode, self.head = nn.Linear(6, 4, bias=False), nn.Linear(6, 2)

    def forward(self, x):
        return self.head(F.linear(self.encode(x).relu(), self.encode.weight.T))


@pytest.mark.parametrize("net, local", [(Sequence, 1), (Twice, 1), (Tied, 1)])
def test_weights_that_act_more_than_once_on_a_row_are_drawn(net, local):
    """Their uses are correlated, which noise of each output would lose: only the head is rewritten."""
    q, x = posterior(net()), torch.randn(5, 6)
    found, said = drawn(q, x, n_samples=7)
    assert f"{local} mean-field layers" in said
    joint, _ = drawn(q, x, n_samples=7, joint=True)
    assert found.shape == joint.shape and not torch.equal(found, joint)
