"""The Hub's mixin on a folder, without a network."""

import pytest
import torch
from torch import nn

import vbdl

pytest.importorskip("huggingface_hub")


def predictor() -> vbdl.Predictor:
    q = vbdl.DeepEnsemble([nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)) for _ in range(3)])
    return vbdl.Predictor(q, vbdl.Categorical(), compile=False)


def test_a_folder_of_ones_own(tmp_path):
    from vbdl.artefact.hub import HubPredictor

    predict, x = predictor(), torch.randn(5, 4)
    HubPredictor(predict).save_pretrained(tmp_path / "model")
    assert torch.equal(vbdl.load(tmp_path / "model")(x).probs, predict(x).probs)
    assert torch.equal(HubPredictor.from_pretrained(tmp_path / "model")(x).probs, predict(x).probs)
