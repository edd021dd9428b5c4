"""A network with its own scaling: registered or named, saved, trusted from the working directory, and served."""

import json
import logging
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from starlette.testclient import TestClient
from torch import nn

import vbdl
from vbdl.artifact.manifest import ArtifactError
from vbdl.serve import Model, app

REGISTERED = """
import vbdl
from torch import nn

@vbdl.register
class Scale(nn.Module):
    def __init__(self, low: float, high: float):
        super().__init__()
        self.low, self.high = low, high

    def forward(self, x):
        return (x - self.low) / (self.high - self.low)

def make():
    return nn.Sequential(Scale(0.0, 255.0), nn.Flatten(), nn.Linear(4, 3))
"""
NAMED = """
import torch
from torch import nn
from layers_of_hospital import Scale

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.out = Scale(), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.scale(x).flatten(1))
"""
LAYERS = """
from torch import nn

class Scale(nn.Module):
    def forward(self, x):
        return x / 255
"""


@pytest.fixture
def hospital(tmp_path, monkeypatch):
    """A module of its own in the working directory, imported here as from a script beside it."""
    name = f"hospital_{tmp_path.name}".replace("-", "_")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield name
    for loaded in (name, "layers_of_hospital"):
        sys.modules.pop(loaded, None)


def predictor(network):
    torch.manual_seed(0)
    return vbdl.Predictor(vbdl.DeepEnsemble(network, 3), vbdl.Categorical(), compile=False)


def command(*arguments):
    """A command as an installed script runs it, which has no folder of its own to import from."""
    return subprocess.run(
        [sys.executable, "-P", "-m", "vbdl.cli", *arguments], capture_output=True, text=True, timeout=120
    )


def test_a_network_with_its_own_scaling_is_served(hospital, tmp_path):
    (tmp_path / f"{hospital}.py").write_text(REGISTERED)
    predict = predictor(__import__(hospital).make())
    x = torch.randint(256, (5, 1, 2, 2)).float()
    folder = predict.save(tmp_path / "model", example=x)
    with TestClient(app(Model(folder, trust=(hospital,), compile=False))) as client:
        while (ready := client.get("/ready")).status_code != 200:
            assert "failed" not in ready.text
            time.sleep(0.02)
        rows = client.post("/v1/predict", json={"inputs": x.tolist()}).json()["predictions"]
        wrong = [
            client.post("/v1/predict", content=body, headers={"Content-Type": "application/json"})
            for body in (
                b'{"inputs": [[[1, 2], [3, 4]]]}',
                b'{"image": 3}',
                b"[]",
                b'{"inputs": [[[[1, "a"], [3, 4]]]]}',
            )
        ]
    expected = vbdl.load(folder, trust=(hospital,), batch_invariant=True, compile=False)(x)
    assert torch.equal(torch.tensor([row["probs"] for row in rows]), expected.probs)
    for refused in wrong:
        assert refused.status_code == 422
        message = refused.json()["error"]["message"]
        assert '{"inputs": [row, ...]}, each row an array of numbers of shape [1, 2, 2]' in message


@pytest.mark.parametrize("trusted", [True, False])
def test_a_command_finds_trusted_packages_in_its_folder(hospital, tmp_path, trusted):
    (tmp_path / f"{hospital}.py").write_text(NAMED)
    (tmp_path / "layers_of_hospital.py").write_text(LAYERS)
    x = torch.randint(256, (5, 1, 2, 2)).float()
    predict = predictor(__import__(hospital).Net())
    predict.save(tmp_path / "model", architecture=f"{hospital}:Net", example=x)
    np.save(tmp_path / "rows.npy", x.numpy())
    packages = (hospital, "layers_of_hospital") if trusted else (hospital,)
    done = command("predict", "model", "rows.npy", "out", "--trust", *packages)
    if trusted:
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode == 1 and f"--trust {hospital} layers_of_hospital" in done.stderr
        assert "PYTHONPATH" in done.stderr


def test_save_says_what_load_and_serve_will_lack(tmp_path, caplog):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = nn.Linear(4, 3)

        def forward(self, x):
            return self.inside(x)

    with caplog.at_level(logging.WARNING, "vbdl"):
        predictor(Own()).save(tmp_path / "own")
    assert "does not describe its network" in caplog.text and "architecture='module:function'" in caplog.text
    assert "example=x" in caplog.text
    with pytest.raises(ArtifactError, match="does not describe its network"):
        vbdl.load(tmp_path / "own")
    loaded = vbdl.load(tmp_path / "own", module=Own(), compile=False)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "vbdl"):
        loaded.save(tmp_path / "again", example=torch.zeros(1, 4))  # known before: nothing to say
        predict = predictor(nn.Linear(4, 3))
        predict(torch.zeros(2, 4))
        vbdl.with_decision(predict, vbdl.decision.Referral()).save(tmp_path / "derived")  # its rows are known
    assert not caplog.records
    inputs = json.loads((tmp_path / "derived" / "manifest.json").read_text())["inputs"]
    assert inputs["tensors"][0]["shape"] == [4]


def test_warm_up_compiles_for_the_example_by_default():
    predict = predictor(nn.Linear(4, 3))
    x = torch.randn(9, 4)
    predict.warm_up(example=x)
    assert predict.sealed and predict(x).probs.shape == (9, 3) and predict(x[:1]).probs.shape == (1, 3)
    with pytest.raises(RuntimeError, match="not warmed up"):
        predict(torch.randn(64, 4))
    assert predictor(nn.Linear(4, 3)).warm_up(64, example=x)(torch.randn(50, 4)).probs.shape == (50, 3)
