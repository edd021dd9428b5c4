"""What is saved predicts the same after loading, bit for bit: every posterior, network, likelihood and setting."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import vbdl

CLASSES, TILE, SAMPLES = 3, 64, 5


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(7, 11), nn.ReLU(), nn.Dropout(0.3), nn.Linear(11, CLASSES))


def cnn() -> nn.Module:
    """With buffers of a trained network, far from what a constructor makes."""
    norm = nn.BatchNorm2d(3, eps=1e-3)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    norm.num_batches_tracked.fill_(17)
    block = nn.Sequential(
        nn.Conv2d(2, 3, (3, 1), padding="same", bias=False), norm, nn.LeakyReLU(0.2), nn.Dropout2d(0.4)
    )
    return nn.Sequential(block, nn.MaxPool2d(2), nn.Flatten(), nn.LayerNorm(18), nn.Linear(18, CLASSES))


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(6, 2, 13, dropout=0.2, activation="gelu", batch_first=True)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(30, CLASSES))


NETWORKS = {"mlp": (mlp, (7,)), "cnn": (cnn, (2, 7, 5)), "transformer": (transformer, (5, 6))}

POSTERIORS = {
    "dropout": lambda make: vbdl.MCDropout(make(), seed=3),
    "dropout with choices": lambda make: vbdl.MCDropout(make(), p=0.25, deterministic=(nn.ReLU, nn.Embedding)),
    "mean-field": lambda make: vbdl.MeanField(make(), n_data=101, prior={"": vbdl.Normal(0.7)}, n_samples=2),
    "mean-field, some weights": lambda make: vbdl.MeanField(
        make(), 101, prior=vbdl.ScaleMixture(), parameters=[nn.Linear], initial_std=0.1
    ),
    "ensemble": lambda make: vbdl.DeepEnsemble([make() for _ in range(4)]),
    "ensemble of two architectures": lambda make: vbdl.DeepEnsemble([make(), make(), nn.Sequential(make())]),
    "ensemble of dropout": lambda make: vbdl.DeepEnsemble([vbdl.MCDropout(make()) for _ in range(3)]),
    "ensemble of mean-field": lambda make: vbdl.DeepEnsemble(
        [vbdl.MeanField(make(), 101, prior=0.3, initial_std=0.1) for _ in range(3)]
    ),
}


def predictor(posterior: str = "dropout", network: str = "mlp", likelihood=None, **settings) -> vbdl.Predictor:
    make, _ = NETWORKS[network]
    q = POSTERIORS[posterior](make)
    settings = {"n_samples": q.n_draws or SAMPLES, "seed": 12, "tiles": (TILE,), "compile": False, **settings}
    return vbdl.Predictor(q, likelihood or vbdl.Categorical(), **settings)


def inputs(network: str = "mlp", rows: int = 9) -> torch.Tensor:
    return torch.randn(rows, *NETWORKS[network][1], generator=torch.Generator().manual_seed(5))


def assert_equal(a, b) -> None:
    assert type(a).__name__ == type(b).__name__ and vars(a).keys() == vars(b).keys()
    for name, value in vars(a).items():
        other = getattr(b, name)
        if isinstance(value, torch.Tensor):
            assert torch.equal(value.nan_to_num(), other.nan_to_num()), name  # the error of one draw is NaN
        else:
            assert value == other, name


_FAST = [(p, "mlp") for p in POSTERIORS] + [("ensemble of mean-field", "cnn"), ("dropout", "transformer")]
CELLS = _FAST + [
    pytest.param(p, n, marks=pytest.mark.slow) for p in POSTERIORS for n in NETWORKS if (p, n) not in _FAST
]


@pytest.mark.parametrize("posterior, network", CELLS)
def test_a_loaded_predictor_predicts_the_same(posterior, network, tmp_path):
    predict, x = predictor(posterior, network), inputs(network)
    expected = predict(x, samples=True)
    generator = torch.get_rng_state()
    loaded = vbdl.load(predict.save(tmp_path / "model"))
    assert torch.equal(torch.get_rng_state(), generator), "saving or loading drew from torch's generator"
    assert_equal(loaded(x, samples=True), expected)
    assert (loaded.seed, loaded.n_samples, loaded.tiles) == (12, predict.n_samples, (TILE,))
    # nothing is lost on the way through a second artifact
    again = vbdl.load(loaded.save(tmp_path / "again"))
    assert_equal(again(x, samples=True), expected)
    assert again.manifest == loaded.manifest


_FRESH = """
import sys, numpy as np, torch, vbdl
torch.set_num_threads(1)
x = torch.from_numpy(np.load(sys.argv[1]))
for folder in sys.argv[2:]:
    p = vbdl.load(folder)(x)
    np.savez(folder + ".npz", **{n: t.numpy() for n, t in vars(p).items() if isinstance(t, torch.Tensor)})
"""


def test_a_fresh_process_predicts_the_same_numbers(tmp_path):
    """All three methods; the first of them compiled, in both processes."""
    x = inputs()
    np.save(tmp_path / "x.npy", x.numpy())
    expected = {}
    for name in ("dropout", "mean-field", "ensemble"):
        predict = predictor(name, compile=name == "dropout")
        expected[name] = predict(x)
        predict.save(tmp_path / name)
    folders = [str(tmp_path / name) for name in expected]
    subprocess.run([sys.executable, "-c", _FRESH, str(tmp_path / "x.npy"), *folders], check=True, timeout=300)
    for name, folder in zip(expected, folders, strict=True):
        with np.load(folder + ".npz") as found:
            assert {*found} == {n for n, t in vars(expected[name]).items() if isinstance(t, torch.Tensor)}
            for field in found:
                assert np.array_equal(found[field], getattr(expected[name], field).numpy()), f"{name}: {field}"


class Spectral(nn.Module):
    """Multiplies the frequencies of its input by complex weights, as Fourier neural operators do."""

    def __init__(self):
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(5, dtype=torch.complex64)), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.fft.irfft(torch.fft.rfft(x) * self.weight, n=8))


@pytest.mark.filterwarnings("ignore:complex parameters are trained and not drawn")
@pytest.mark.parametrize(
    "make", [lambda: vbdl.DeepEnsemble([Spectral(), Spectral()]), lambda: vbdl.MeanField(Spectral(), 9)]
)
def test_complex_weights_are_saved_whole(tmp_path, make):
    x, predict = torch.randn(4, 8), vbdl.Predictor(make(), vbdl.Categorical(), 2, compile=False)
    vbdl.save(predict, tmp_path / "model", example=x)
    again = vbdl.load(tmp_path / "model", module=Spectral())
    torch.testing.assert_close(again(x).probs, predict(x).probs, rtol=0, atol=0)
