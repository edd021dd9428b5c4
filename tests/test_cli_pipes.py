"""Every command ends quietly where the reader of its output has left, as `head` does, and does its work."""

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest

from vbdl.cli import COMMANDS, main

_HELD = {**os.environ, "PYTHONUNBUFFERED": ""}  # what is printed leaves at the end, as it does for most


def _to_nobody(arguments, both=False):
    """Exit code and stderr of a command whose output nobody reads."""
    process = subprocess.Popen(
        [sys.executable, "-m", "vbdl.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if both else subprocess.PIPE,
        text=True,
        env=_HELD,
    )
    process.stdout.close()
    said = "" if both else process.stderr.read()
    return process.wait(timeout=240), said


@pytest.mark.parametrize("arguments", [[], ["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)])
@pytest.mark.parametrize("both", [False, True])
def test_help_to_nobody(arguments, both):
    assert _to_nobody(arguments, both) == (0, "")


def test_a_wrong_command_line_to_nobody():
    assert _to_nobody(["nothing"], both=True)[0] == 2
    assert _to_nobody(["evaluate", "there is", "no such"], both=True)[0] == 1


def _fit(folder):
    """A command that fits a model, the model and the table."""
    x = np.random.default_rng(0).normal(size=(200, 2))
    np.savetxt(folder / "t.csv", np.c_[x, x[:, 0] > 0], delimiter=",", header="a,b,y", comments="", fmt="%.3f")
    model, data = str(folder / "m"), str(folder / "t.csv")
    quick = ["--members", "1", "--epochs", "1", "--width", "4", "--no-figures"]
    return ["fit", data, "--target", "y", "--out", model, *quick], model, data


def test_work_to_nobody_is_done(tmp_path):
    fit, model, data = _fit(tmp_path)
    assert _to_nobody(fit) == (0, "")
    assert _to_nobody(["predict", model, data, str(tmp_path / "p.csv")]) == (0, "")
    assert (tmp_path / "m" / "manifest.json").is_file() and (tmp_path / "p.csv").is_file()


@pytest.mark.slow  # what these print leaves by the same lines as what the two above print
def test_answers_to_nobody(tmp_path):
    fit, model, data = _fit(tmp_path)
    assert main(fit) == 0
    for command in (["inspect", model], ["info"], ["evaluate", model, data, "--allow-training-rows", "--json"]):
        assert _to_nobody(command) == (0, ""), command


# at once or at the end is a matter of the stream, and not of who writes to it: both for what starts in no time
@pytest.mark.parametrize("held", ["", "1"])
@pytest.mark.parametrize("arguments", ["info", "--version", "--help"])
@pytest.mark.slow_where(cell=lambda p: p["arguments"] == "info" and p["held"])
def test_a_full_disk_is_an_error_still(arguments, held):
    with open("/dev/full", "w") as full:
        found = subprocess.run(
            [sys.executable, "-m", "vbdl.cli", arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=240,
            env={**_HELD, "PYTHONUNBUFFERED": held},
        )
    assert found.returncode == 1 and "No space left" in found.stderr and "Traceback" not in found.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_that_loads_a_model_can_be_told_whom_to_trust(name):
    """inspect reads what a model says of itself and loads nothing."""
    options = {field.name for field in dataclasses.fields(COMMANDS[name])}
    assert ("trust" in options) == ("model" in options and name != "inspect")


def test_a_trusted_network_is_predicted_from_the_command_line(tmp_path, monkeypatch, capsys):
    import torch

    import vbdl

    (tmp_path / "ownnetwork.py").write_text(
        "from torch import nn\n\nclass Net(nn.Sequential):\n    def __init__(self):\n"
        "        super().__init__(nn.Linear(3, 8), nn.Dropout(0.2), nn.Linear(8, 2))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import ownnetwork

    p = vbdl.Predictor(vbdl.MCDropout(ownnetwork.Net()), vbdl.Categorical(), 4, compile=False)
    p.save(tmp_path / "m", example=torch.zeros(1, 3), architecture="ownnetwork:Net", arguments={})
    np.save(tmp_path / "x.npy", np.zeros((5, 3), np.float32))
    command = ["predict", str(tmp_path / "m"), str(tmp_path / "x.npy"), str(tmp_path / "o.csv")]
    assert main(command) == 1 and "trust" in capsys.readouterr().err
    assert main([*command, "--trust", "ownnetwork"]) == 0
