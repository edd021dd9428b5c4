"""`vbdl inspect` and `vbdl export`."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import vbdl
from vbdl.cli import main
from vbdl.export import load_package


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    q = vbdl.DeepEnsemble([nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)) for _ in range(3)])
    predict = vbdl.Predictor(q, vbdl.Categorical(), compile=False, tiles=(4,))
    folder = tmp_path_factory.mktemp("models") / "model"
    return predict.save(
        folder, example=torch.zeros(1, 4), metrics={"accuracy": 0.875}, extras={"columns": ["a\x1b[31m"]}
    )


def test_inspect_says_what_a_model_is(model, capsys):
    assert main(["inspect", str(model)]) == 0
    said = capsys.readouterr().out
    for part in ("Deep ensemble of 3 members", "Sequential(Linear, Tanh, Linear)", "F32 [4]", "Categorical", "0.875"):
        assert part in said
    assert main(["inspect", str(model), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["n_samples"] == 3


def test_inspect_of_what_is_no_model(model, tmp_path, capsys):
    assert main(["inspect", str(tmp_path / "nowhere")]) == 1
    assert "an artifact is a folder" in capsys.readouterr().err
    hostile = tmp_path / "hostile"
    hostile.mkdir()
    for file in model.iterdir():
        (hostile / file.name).write_bytes(file.read_bytes())
    about = json.loads((hostile / "manifest.json").read_text())
    about["metrics"] = {"\x1b]0;owned\x07": 1.0}
    (hostile / "manifest.json").write_text(json.dumps(about))
    assert main(["inspect", str(hostile)]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_export_from_the_command_line(model, tmp_path, capsys, monkeypatch):
    pytest.importorskip("onnxscript")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows = np.random.default_rng(0).normal(size=(10, 4)).astype(np.float32)
    np.save(tmp_path / "rows.npy", rows)
    out = tmp_path / "package"
    command = [
        "export",
        str(model),
        str(out),
        "--backend",
        "onnx",
        "--tiles",
        "2",
        "--example",
        str(tmp_path / "rows.npy"),
    ]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "tiles of 2 rows" in said and "compared with the model on 10 rows" in said
    expected = vbdl.load(model)(torch.from_numpy(rows))
    torch.testing.assert_close(load_package(out)(torch.from_numpy(rows))["probs"], expected.probs, rtol=0, atol=1e-5)
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "several.npz", rows=rows)
    (tmp_path / "rows.csv").write_text("a,b,c,d\n1,2,3,4\n")
    for name in ("objects.npy", "several.npz", "rows.csv"):
        assert main([*command[:-1], str(tmp_path / name)]) == 1
        assert f"{name} is not a .npy file of numbers" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["inspect", "export"])
def test_help_waits_for_no_torch(command):
    program = (
        "import sys; from vbdl.cli import main\n"
        f"try: main(['{command}', '--help'])\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "MODEL" in done.stdout and done.stdout.splitlines()[-1] == "False"
