"""The cut puts every operation where the data flow says: once, with the draw, with the input, or with both."""

import pytest
import torch
from torch import nn

from vbdl.compiling import graph
from vbdl.compiling.graph import BODY, DRAWN, ONCE, PREFIX, cut, trace
from vbdl.engine import plan
from vbdl.engine.predictor import Predictor
from vbdl.likelihoods.gaussian import Gaussian
from vbdl.posteriors.ensemble import DeepEnsemble
from vbdl.posteriors.mc_dropout import MCDropout
from vbdl.posteriors.mean_field import MeanField


def names(region):
    return [getattr(node.target, "_opname", str(node.target)) for node in region.nodes]


def example(function, *arguments, kinds):
    return cut(trace(function, *arguments), kinds)


def test_every_operation_is_in_the_region_of_what_it_depends_on():
    def f(shared, drawn, x):
        return (x.sin() * drawn.exp() + shared.cos(),)

    found = example(f, torch.ones(3), torch.ones(3), torch.ones(3), kinds=[ONCE, DRAWN, PREFIX])
    assert [names(r) for r in found.regions] == [["cos"], ["exp"], ["sin"], ["mul", "add"]]
    assert found.output_depends_on_draw


def test_the_regions_put_together_are_the_whole():
    def f(shared, drawn, x):
        a, b = x.chunk(2)
        return ((a * drawn).sum() + (b + shared).max(0).values,)

    arguments = (torch.randn(3), torch.randn(3), torch.randn(6))
    found = example(f, *arguments, kinds=[ONCE, DRAWN, PREFIX])
    values = dict(zip(found.placeholders, arguments, strict=True))
    for region in found.regions:
        values.update(zip(region.outputs, region.graph(*[values[n] for n in region.inputs]), strict=True))
    torch.testing.assert_close(values[found.outputs[0]], f(*arguments)[0])


def test_an_output_without_a_draw_is_noticed():
    found = example(lambda d, x: (x * 2,), torch.ones(3), torch.ones(3), kinds=[DRAWN, PREFIX])
    assert not found.output_depends_on_draw


def test_odd_products_are_what_they_were():
    """Padding to 64 bytes changes no number beyond rounding, for every kind of product."""
    x, w, b, v = torch.randn(5, 11), torch.randn(11, 7), torch.randn(7), torch.randn(11)
    stacked = torch.randn(3, 5, 11), torch.randn(3, 11, 7)

    def f(x, w, b, v, s, t):
        return x @ w, torch.addmm(b, x, w, beta=0.5, alpha=2), s @ t, torch.baddbmm(b, s, t), x @ v, s.mT @ s

    arguments = (x, w, b, v, *stacked)
    for found, expected in zip(trace(f, *arguments)(*arguments), f(*arguments), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def execution(q, outputs, x, **settings):
    predict = Predictor(q, Gaussian(outputs), compile=False, tiles=(64,), **settings)
    predict(x)
    return next(iter(predict.executions.by_shape.values()))[0]


def matrix_products(region):
    return sum(name in ("mm", "addmm", "bmm", "baddbmm") for name in names(region))


def test_layers_before_the_first_dropout_run_once_for_all_draws():
    net = nn.Sequential(nn.Linear(3, 11), nn.ReLU(), nn.Linear(11, 70), nn.Dropout(0.05), nn.Linear(70, 50))
    regions = execution(MCDropout(net), 50, torch.randn(13, 3), n_samples=7).chunking(7).cut.regions
    assert matrix_products(regions[PREFIX]) == 2 and matrix_products(regions[BODY]) == 1
    assert "keep" in names(regions[DRAWN]) and "keep" not in names(regions[BODY])


class Places(nn.Module):
    """Drops units at each of nine places, each through operations of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(6, 40), nn.Dropout(0.3), nn.Linear(40, 5)

    def forward(self, x):
        h = self.first(x.unsqueeze(1).expand(-1, 9, -1)).relu()
        return self.last(torch.cat([self.drop(h).mean(1), self.drop(h[..., ::2].softmax(-1)).mean(1)], -1)[:, :40])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masks_are_kept_in_bytes(dtype, monkeypatch):
    q, x = MCDropout(Places().to(dtype)), torch.randn(13, 6, dtype=dtype)
    regions = execution(q, 5, x, n_samples=7).chunking(7).cut.regions
    kept = [n.meta["val"].dtype for n in regions[DRAWN].nodes if n.name in regions[DRAWN].outputs]
    assert torch.uint8 in kept and dtype not in kept
    found = Predictor(q, Gaussian(5), 7, compile=False)(x).mean
    monkeypatch.setattr(graph, "_larger_copies", lambda region: [])
    assert torch.equal(found, Predictor(q, Gaussian(5), 7, compile=False)(x).mean)


def test_many_masks_are_made_again_where_that_takes_little_time(monkeypatch):
    q, x = MCDropout(Places()), torch.randn(13, 6)
    expected = Predictor(q, Gaussian(5), 7, compile=False, tiles=(64,))(x).mean
    monkeypatch.setattr(plan, "_KEPT", 0)
    for share, keeps in ((0, True), (1e9, False)):
        monkeypatch.setattr(plan, "_SHARE", share)
        assert execution(q, 5, x, n_samples=7).plan.keep_draws is keeps
        predict = Predictor(q, Gaussian(5), 7, compile=False, tiles=(64,))
        for _ in range(2):
            torch.testing.assert_close(predict(x).mean, expected)


def test_weights_are_drawn_once_a_draw_not_once_a_batch():
    found = execution(MeanField(nn.Linear(3, 5), 101), 5, torch.randn(13, 3), n_samples=7, joint=True).chunking(7).cut
    assert names(found.regions[DRAWN]).count("normal") == 2  # weight and bias
    assert "normal" not in names(found.regions[BODY]) and matrix_products(found.regions[PREFIX]) == 0


def test_members_share_nothing_but_the_input():
    found = execution(DeepEnsemble(nn.Linear(30, 50), 3), 50, torch.randn(13, 30)).chunking(3).cut
    assert matrix_products(found.regions[BODY]) == 1 and matrix_products(found.regions[PREFIX]) == 0


@pytest.mark.parametrize("random", [torch.rand_like, torch.bernoulli])
def test_torchs_own_randomness_is_refused(random):
    """Mean-field and ensembles keep no masks: a draw from torch's generator would be out of reach of the seed."""

    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 5)

        def forward(self, x):
            return self.linear(x + random(x.sigmoid()))

    for q in (DeepEnsemble(Noisy(), 3), MeanField(Noisy(), 101)):
        with pytest.raises((ValueError, NotImplementedError), match="torch's generator"):
            Predictor(q, Gaussian(5), n_samples=3, compile=False)(torch.randn(7, 3))
