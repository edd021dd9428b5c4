"""Classes of a user's own are stored by name and arguments, and imported only where the caller of load trusts them."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import vbdl
from vbdl.artifact import ArtifactError, modules, read

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from own_classes import Above, Forgetful, Halved, NoisyWeights, NotOpened, Powered, Shifted  # noqa: E402

X = torch.randn(40, 5, generator=torch.Generator().manual_seed(1))
Y = torch.arange(40) % 3


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), Shifted(8), nn.Dropout(0.3), nn.Linear(8, 3))


def of_posterior() -> vbdl.Predictor:
    return vbdl.Predictor(NoisyWeights(network(), "4.weight", 0.3), vbdl.Categorical(), 5, compile=False)


def of_layers() -> vbdl.Predictor:
    return vbdl.Predictor(vbdl.DeepEnsemble([network() for _ in range(3)]), vbdl.Categorical(), compile=False)


def of_likelihood() -> vbdl.Predictor:
    return vbdl.Predictor(vbdl.MCDropout(network()), Halved(0.25), 5, compile=False)


def of_calibration() -> vbdl.Predictor:
    return vbdl.calibrate(of_likelihood(), (X, Y), Powered((0.25, 0.5)))


def of_decision() -> vbdl.Predictor:
    return vbdl.with_decision(of_calibration(), Above(1.0, "total"))


KINDS = {f.__name__: f for f in (of_posterior, of_layers, of_likelihood, of_calibration, of_decision)}


def fields(predictor: vbdl.Predictor) -> dict[str, torch.Tensor]:
    return {n: t for n, t in vars(predictor(X)).items() if isinstance(t, torch.Tensor)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_registered_class_travels(kind, tmp_path):
    predict = KINDS[kind]()
    expected = fields(predict)
    folder = predict.save(tmp_path / "model")
    loaded = vbdl.load(folder)
    for name, value in fields(loaded).items():
        assert torch.equal(value, expected[name]), name
    assert vbdl.load(loaded.save(tmp_path / "again")).manifest == loaded.manifest
    assert "trust=('own_classes',)" in (folder / "README.md").read_text()


_FRESH = """
import sys, numpy as np, pytest, torch, vbdl
from vbdl.artifact import ArtifactError
torch.set_num_threads(1)
x = torch.from_numpy(np.load(sys.argv[1]))
for folder in sys.argv[2:]:
    with pytest.raises(ArtifactError, match="runs code.*trust=.'own_classes'"):
        vbdl.load(folder)
    with pytest.raises(ArtifactError, match="runs code"):
        vbdl.load(folder, trust=("own", "classes"))
assert "own_classes" not in sys.modules
for folder in sys.argv[2:]:
    fields = vars(vbdl.load(folder, trust=("own_classes",))(x))
    np.savez(folder + ".npz", **{n: t.numpy() for n, t in fields.items() if isinstance(t, torch.Tensor)})
"""


def test_a_fresh_process_imports_what_it_trusts_and_nothing_else(tmp_path):
    np.save(tmp_path / "x.npy", X.numpy())
    expected = {}
    for kind, build in KINDS.items():
        predict = build()
        expected[kind] = fields(predict)
        predict.save(tmp_path / kind)
    command = [sys.executable, "-c", _FRESH, str(tmp_path / "x.npy"), *(str(tmp_path / kind) for kind in KINDS)]
    path = {"PYTHONPATH": str(HERE)}
    subprocess.run(command, check=True, timeout=300, env=path)
    for kind in KINDS:
        with np.load(tmp_path / f"{kind}.npz") as arrays:
            assert {*arrays} == {*expected[kind]}
            for name in arrays:
                assert np.array_equal(arrays[name], expected[kind][name].numpy()), f"{kind}: {name}"


def test_the_command_line_trusts_by_name(tmp_path):
    of_decision().save(tmp_path / "model", example=X[:1])
    np.save(tmp_path / "x.npy", X.numpy())
    command = [sys.executable, "-m", "vbdl.cli", "predict", str(tmp_path / "model"), str(tmp_path / "x.npy")]
    run = lambda *more: subprocess.run(
        [*command, str(tmp_path / "out.npy"), "--columns", "action", *more],
        capture_output=True, text=True, timeout=300, env={"PYTHONPATH": str(HERE), "HOME": str(tmp_path)},
    )  # fmt: skip
    refused = run()
    assert refused.returncode != 0 and "trust=('own_classes',)" in refused.stderr
    done = run("--trust", "own_classes")
    assert done.returncode == 0, done.stderr
    assert np.load(tmp_path / "out.npy")["action"].tolist() == of_decision()(X).action.tolist()


def test_a_trusted_class_has_to_be_registered(tmp_path):
    folder = of_likelihood().save(tmp_path / "model")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["likelihood"] = {"class": "own_classes:NotOpened", "arguments": {}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="runs code"):
        vbdl.load(folder)
    with pytest.raises(ArtifactError, match="'own_classes:NotOpened' is not registered: put @vbdl.register above"):
        vbdl.load(folder, trust=("own_classes",))
    manifest["likelihood"]["class"] = "own_classes:Missing"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="cannot be imported"):
        vbdl.load(folder, trust=("own_classes",))


def test_what_is_not_registered_is_not_saved(tmp_path):
    with pytest.raises(
        ValueError, match="NotOpened cannot be stored because it is not registered: put @vbdl.register above"
    ):
        vbdl.Predictor(vbdl.MCDropout(network()), NotOpened(), compile=False).save(tmp_path / "model")
    with pytest.raises(ValueError, match="Forgetful does not keep the argument 'factor'.*config"):
        vbdl.Predictor(vbdl.MCDropout(network()), Forgetful(), compile=False).save(tmp_path / "model")
    assert not (tmp_path / "model").exists()

    class Inherited(Halved):
        pass

    with pytest.raises(ValueError, match="Inherited cannot be stored because it is not registered"):
        modules.describe(Inherited())
    with pytest.raises(ValueError, match="inside a function"):
        vbdl.register(Inherited)
    with pytest.raises(TypeError, match="class of nn.Module"):
        vbdl.register(Halved())
    with pytest.raises(TypeError, match="class of nn.Module"):
        vbdl.register(dict)


def test_arguments_of_another_type_are_refused(tmp_path):
    places = {of_posterior: ("posterior", "arguments", "spread"), of_likelihood: ("likelihood", "arguments", "factor")}
    for kind, path in places.items():
        folder = kind().save(tmp_path / kind.__name__)
        manifest = json.loads((folder / "manifest.json").read_text())
        part = manifest
        for key in path[:-1]:
            part = part[key]
        for wrong in ("much", [1.0], {"tensor": "module.4.weight"}):
            part[path[-1]] = wrong
            (folder / "manifest.json").write_text(json.dumps(manifest))
            with pytest.raises(ArtifactError):
                vbdl.load(folder)


def test_the_manifest_names_class_and_arguments(tmp_path):
    manifest = read(of_posterior().save(tmp_path / "model"))
    assert (manifest.posterior.name, manifest.posterior.arguments) == (
        "own_classes:NoisyWeights",
        {"name": "4.weight", "spread": 0.3},
    )
    layers = manifest.posterior.network.root.children
    assert layers["2"].name == "own_classes:Shifted" and layers["2"].arguments == {"features": 8}
