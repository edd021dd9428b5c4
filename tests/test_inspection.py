"""`vbdl.inspect` names every stochastic site, and why others are not."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vbdl


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(6, 2, 11, dropout=0.1)  # the sequence first, the batch second
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.lstm = nn.LSTM(6, 5, 2, dropout=0.3)
        self.single = nn.GRU(5, 5, 1)
        self.single.dropout = 0.2
        self.unused = nn.Dropout(0.4)
        self.nothing = nn.Dropout(0.0)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        x = self.encoder(x.transpose(0, 1))
        x = self.single(self.lstm(x)[0])[0][-1]
        return self.head(F.dropout(self.nothing(x), 0.25, self.training))


def test_every_site_is_named_with_its_mask_and_its_batch():
    report = vbdl.inspect(Everything(), torch.randn(4, 7, 6))
    lines = "\n".join(report.stochastic)
    assert "encoder.layers.0.self_attn (multi_head_attention_forward): p=0.1, a mask of 1x2x7x7 per draw" in lines
    assert "encoder.layers.0.dropout1 (dropout): p=0.1, a mask of 7x1x6 per draw, batch on axis 1" in lines
    assert "lstm (lstm): p=0.3, a mask of 7x1x5 per draw, batch on axis 1" in lines
    assert "the module (dropout): p=0.25, a mask of 1x5 per draw, batch on axis 0" in lines
    still = "\n".join(report.deterministic)
    assert "unused (Dropout): not called for this example" in still
    assert "nothing (dropout): p=0.0, so it drops nothing" in still
    assert "single (GRU): p=0.2 acts between layers, but it has one" in still
    assert "strategy       stacked" in report.plan and "recurrent layer, whose weights they share" in report.plan


def test_operations_normalization_and_ties():
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Dropout2d(0.5), nn.Flatten(), nn.Linear(5 * 9, 2))
    report = vbdl.inspect(net, torch.randn(2, 3, 5, 5))
    assert report.flops == 2 * (9 * 5 * 27 + 45 * 2)
    assert report.normalization == ["1 (BatchNorm2d): has seen no batch yet: train it before predicting"]
    net(torch.randn(2, 3, 5, 5))
    assert "statistics of 1 batches" in vbdl.inspect(net).normalization[0]
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    assert vbdl.inspect(tied).tied == ["0.weight = 1.weight"]
    assert vbdl.inspect(tied).parameters == 15


def test_without_an_example_it_says_what_it_cannot_see():
    report = vbdl.inspect(Everything())
    assert any("lstm (LSTM): p=0.3 between its 2 layers" in line for line in report.stochastic)
    assert "inspect(module, example)" in str(report)


def test_other_randomness_is_named():
    class Noisy(nn.Module):
        def forward(self, x):
            return x + torch.randn_like(x)

    assert "randn_like is called in the module itself" in str(vbdl.inspect(Noisy(), torch.randn(2, 3)))


def test_a_module_without_dropout_is_told_what_to_use():
    assert "use BatchEnsemble or DeepEnsemble or IVON or Laplace" in str(
        vbdl.inspect(nn.Linear(2, 2), torch.randn(3, 2))
    )


def test_the_module_is_left_as_it_was():
    net = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(0.5)).train()
    before = {n: t.clone() for n, t in net.state_dict().items()}
    vbdl.inspect(net, torch.randn(4, 3))
    assert net.training and all(torch.equal(t, before[n]) for n, t in net.state_dict().items())


def test_an_example_may_be_an_array():
    net, x = nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.5)), torch.randn(4, 3)
    assert str(vbdl.inspect(net, x.numpy())) == str(vbdl.inspect(net, x))


def test_only_modules_are_inspected():
    with pytest.raises(TypeError, match="nn.Module"):
        vbdl.inspect("net")
