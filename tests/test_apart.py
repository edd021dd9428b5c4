"""A network whose rows depend on each other is refused, however little they do; one that only rounds is taken."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import vbdl

LITTLE = 1e-2  # of what a layer adds


class Mixes(nn.Module):
    """A network that adds to each row a little of a function of the batch."""

    def __init__(self, of_batch: Callable[[Tensor], Tensor]):
        super().__init__()
        self.first, self.last, self.of_batch = nn.Linear(6, 8), nn.Linear(8, 3), of_batch

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).tanh()
        return self.last(hidden + LITTLE * self.of_batch(hidden))


def attending() -> nn.Module:
    """A transformer's layer whose sequence is the batch, normalized first: it sees no scale and no shift of a row."""
    layer = nn.TransformerEncoderLayer(6, 2, 16, norm_first=True)
    with torch.no_grad():
        layer.self_attn.out_proj.weight.mul_(0.1)
        layer.linear2.weight.mul_(0.1)
    return nn.Sequential(nn.Unflatten(1, (1, 6)), layer, nn.Flatten(), nn.Linear(6, 3)).eval()


MIXING: dict[str, Callable[[], nn.Module]] = {
    "attention": attending,
    "mean": lambda: Mixes(lambda h: h.mean(0)),
    "largest": lambda: Mixes(lambda h: h.amax(0)),
    "earlier rows": lambda: Mixes(lambda h: h.cumsum(0) - h),
    "later rows": lambda: Mixes(lambda h: h.flip(0).cumsum(0).flip(0) - h),
    "place": lambda: Mixes(lambda h: torch.arange(len(h), dtype=h.dtype).sin()[:, None]),
}


@pytest.mark.parametrize("rows", [1, 2, 20])
@pytest.mark.parametrize("method", ["ensemble", "mean-field"])
@pytest.mark.parametrize("name", MIXING)
def test_networks_that_mix_rows_a_little_are_refused(name, method, rows):
    make = MIXING[name]
    q = vbdl.DeepEnsemble([make(), make()]) if method == "ensemble" else vbdl.MeanField(make(), n_data=10)
    with pytest.raises(ValueError, match="depends on the other rows"):
        vbdl.Predictor(q, vbdl.Categorical(), n_samples=2, compile=False)(torch.randn(rows, 6))


def deep(dtype: torch.dtype) -> nn.Module:
    """A deep network of residual blocks, whose roundings add up."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.inside = nn.LayerNorm(64), nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))

        def forward(self, x: Tensor) -> Tensor:
            return x + 4.0 * self.inside(self.norm(x))

    return nn.Sequential(nn.Linear(6, 64), *(Block() for _ in range(24)), nn.Linear(64, 3)).to(dtype).eval()


@pytest.mark.parametrize("rows", [1, 2, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_networks_that_round_are_taken(dtype, autocast, rows):
    if autocast is not None and dtype != torch.float32:
        pytest.skip("autocast is of networks in float32")
    q = vbdl.DeepEnsemble([deep(dtype), deep(dtype)])
    x = torch.randn(rows, 6, dtype=dtype)
    assert len(vbdl.Predictor(q, vbdl.Categorical(), compile=False, autocast=autocast)(x).probs) == rows


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_quantized_layers_are_taken():
    net = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 3)).eval()
    quantized = torch.ao.quantization.quantize_dynamic(net, {nn.Linear})
    p = vbdl.Predictor(vbdl.MCDropout(quantized), vbdl.Categorical(), n_samples=4, compile=False)(torch.randn(9, 6))
    assert p.probs.shape == (9, 3)
