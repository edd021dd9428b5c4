"""Dropout networks without their dropped units: the numbers of the masked network, whatever lies between the layers."""

import importlib

import pytest
import torch
from torch import nn

from vbdl import Categorical, DeepEnsemble, MCDropout, Predictor

compact = importlib.import_module("vbdl.compiling.rewrite.compact")  # the package's own name of it is the function


class Residual(nn.Module):
    """A site whose units something else needs too: they are gathered, not left out where they are made."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(23, 47), nn.Linear(47, 47), nn.Linear(47, 5)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        h = self.first(x).relu()
        return self.head(self.dropout(h + self.second(self.dropout(h)).tanh()))


def batch_norm():
    norm = nn.BatchNorm1d(47)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return norm


NETWORKS = {
    "two sites": lambda: nn.Sequential(
        nn.Linear(23, 47), nn.ReLU(), nn.Dropout(0.5), nn.Linear(47, 61), nn.GELU(), nn.Dropout(0.4), nn.Linear(61, 5)
    ),
    "no bias": lambda: nn.Sequential(
        nn.Linear(23, 47), nn.Dropout(0.5), nn.Linear(47, 61, bias=False), nn.Tanh(), nn.Dropout(0.5), nn.Linear(61, 5)
    ),
    "normalized": lambda: nn.Sequential(
        nn.Dropout(0.3), nn.Linear(23, 47), batch_norm(), nn.ReLU(), nn.Dropout(0.5), nn.Linear(47, 5)
    ),
    "of a sequence": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 23)), nn.Linear(23, 47), nn.ReLU(), nn.Dropout(0.5), nn.Linear(47, 61), nn.SiLU(),
        nn.Dropout(0.5), nn.Linear(61, 5), nn.Flatten(),
    ),
    "residual": Residual,
}  # fmt: skip


def wide():
    layer = lambda n: (nn.Linear(n, 512), nn.ReLU(), nn.Dropout(0.5))
    return nn.Sequential(*layer(30), *layer(512), nn.Linear(512, 5))


def samples(q, x, **settings):
    predict = Predictor(
        q, Categorical(), n_samples=settings.pop("n_samples", 9), tiles=(64,), compile=False, **settings
    )
    return predict(x, samples=True).samples, predict.explain()


def choose(monkeypatch, way: str) -> None:
    masked_or_folded = {"fold": (1.0, 0.0)}.get(way, (0.0, 1.0))
    monkeypatch.setattr(compact, "_costs", lambda *_: (1.0, 0.0 if way == "thin" else 2.0, 0))
    monkeypatch.setattr(compact, "_masked_or_folded", lambda *_: masked_or_folded)


@pytest.mark.parametrize("way", ["thin", "fold"])
@pytest.mark.parametrize("network", NETWORKS)
def test_left_out_is_masked(network, way, monkeypatch):
    torch.manual_seed(0)
    q, x = MCDropout(NETWORKS[network]()), torch.randn(13, 23)
    choose(monkeypatch, "mask")
    expected, said = samples(q, x)
    assert "every draw is a smaller network" not in said and "folded into the weights after" not in said
    choose(monkeypatch, way)
    found, said = samples(q, x)
    assert ("every draw is a smaller network" if way == "thin" else "folded into the weights after it") in said
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_members_of_an_ensemble_of_dropout(monkeypatch):
    torch.manual_seed(0)
    q, x = DeepEnsemble([MCDropout(NETWORKS["two sites"]()) for _ in range(3)]), torch.randn(13, 23)
    choose(monkeypatch, "mask")
    expected, _ = samples(q, x)
    choose(monkeypatch, "thin")
    found, said = samples(q, x)
    assert "every draw is a smaller network" in said
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_chunks_leave_out_the_same(monkeypatch):
    choose(monkeypatch, "thin")
    torch.manual_seed(0)
    q, x = MCDropout(NETWORKS["two sites"]()), torch.randn(13, 23)
    whole, _ = samples(q, x)
    torch.testing.assert_close(samples(q, x, chunk_size=2)[0], whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(samples(q, x, n_samples=4)[0], whole[:4], rtol=1e-5, atol=1e-5)


def test_fewer_units_are_computed():
    """Chosen by the cost model itself: wide layers, many rows; a hidden layer costs (1 - p)^2 of its operations."""
    net = wide()
    predict = Predictor(MCDropout(net), Categorical(), n_samples=8, tiles=(256,), compile=False)
    said = predict.explain(torch.randn(256, 30))
    assert "every draw is a smaller network" in said
    plan = next(iter(predict.executions.by_shape.values()))[0].plan
    assert plan.body_flops < 0.4 * 2 * 256 * (512 * 512 + 512 * 5)


def test_too_little_memory_keeps_the_masks():
    net = wide()
    predict = Predictor(MCDropout(net), Categorical(), n_samples=8, tiles=(256,), compile=False, memory_budget=2**22)
    assert "the smaller networks of all draws take" in predict.explain(torch.randn(256, 30))
