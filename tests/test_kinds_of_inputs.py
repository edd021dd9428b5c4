"""Inputs that are no dense tensors are refused in words; ensembles of quantized layers are those of a loop."""

import pytest
import torch
from torch import nn

import vbdl


@pytest.fixture(scope="module")
def predict() -> vbdl.Predictor:
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    return vbdl.Predictor(vbdl.DeepEnsemble(net, 2), vbdl.Categorical(), compile=False)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "make, words",
    [
        (lambda x: x.to_sparse(), "torch.sparse_coo: convert it with t.to_dense"),
        (lambda x: x.to_sparse_csr(), "torch.sparse_csr: convert it with t.to_dense"),
        (lambda x: torch.nested.nested_tensor([x[0], x[1]]), "nested tensor: pad it"),
        (lambda x: x.to("meta"), "on the meta device"),
        (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), r"dequantize\(\)"),
        (lambda x: x[0], r"give them a batch axis, x\[None\]"),
    ],
)
def test_other_inputs_are_refused_in_words(predict, make, words):
    x = torch.randn(4, 6)
    predict(x)
    with pytest.raises(ValueError, match=words):
        predict(make(x))


class HalfQuantized(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.b(self.a(x).relu())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("compiled", [False, True, "background"])
def test_members_have_their_own_quantized_weights(compiled):
    members = []
    for seed in range(3):
        torch.manual_seed(seed)
        net = HalfQuantized().eval()
        net.a = torch.ao.quantization.quantize_dynamic(nn.Sequential(net.a), {nn.Linear})[0]
        members.append(net)
    x = torch.randn(1, 6)
    with torch.no_grad():
        expected = torch.stack([net(x) for net in members]).mean(0)
    found = vbdl.Predictor(vbdl.DeepEnsemble(members), vbdl.Gaussian(3), compile=compiled)(x).mean
    torch.testing.assert_close(found, expected)
