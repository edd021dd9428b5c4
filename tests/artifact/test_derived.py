"""A predictor made of a loaded one is saved as completely as the one that was loaded."""

import copy
import pickle

import pytest
import torch
from torch import nn

import vbdl
from vbdl import calibration, decision

EXTRAS = {"columns": ["a", "b"], "unit": "kg"}


def network(width=8, outputs=2):
    """Of no layers that describe themselves: made by name."""
    return Own(width, outputs)


class Own(nn.Module):
    def __init__(self, width, outputs):
        super().__init__()
        self.first, self.last, self.drop = nn.Linear(3, width), nn.Linear(width, outputs), nn.Dropout(0.2)

    def forward(self, x):
        return self.last(self.drop(self.first(x).tanh()))


TRUST = (__name__.partition(".")[0],)
DERIVED = {
    "itself": lambda p: p,
    "replace": lambda p: p.replace(n_samples=2, seed=3, tiles=(8,)),
    "twice": lambda p: p.replace(seed=3).replace(seed=4),
    "device": lambda p: p.replace(device="cpu"),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda p: pickle.loads(pickle.dumps(p)),
    "calibrate": lambda p: vbdl.calibrate(p, rows(), calibration.BBQ()),
    "conformal": lambda p: vbdl.calibrate(p, rows(), calibration.ConformalSets(0.1)),
    "with_decision": lambda p: vbdl.with_decision(p, decision.Referral(threshold=0.6)),
    "both": lambda p: vbdl.with_decision(
        vbdl.calibrate(p, rows(), calibration.Isotonic()), decision.ExpectedCost(1 - torch.eye(2), 0.3)
    ),
}


def rows():
    generator = torch.Generator().manual_seed(5)
    return torch.randn(60, 3, generator=generator), torch.arange(60) % 2


# by default a posterior of one network and one of a list of them, which are stored in two ways
@pytest.fixture(
    scope="module",
    params=[
        "dropout",
        "two architectures",
        *(pytest.param(p, marks=pytest.mark.slow) for p in ("ensemble", "mean-field")),
    ],
)
def saved(request, tmp_path_factory):
    torch.manual_seed(0)
    q = {
        "dropout": lambda: vbdl.MCDropout(network(5)),
        "ensemble": lambda: vbdl.DeepEnsemble([network(5), network(5)]),
        "mean-field": lambda: vbdl.MeanField(network(5), 60),
        "two architectures": lambda: vbdl.DeepEnsemble([network(5), network(7)]),
    }[request.param]()
    folder = tmp_path_factory.mktemp("saved") / "m"
    several = request.param == "two architectures"
    target, arguments = f"{__name__}:network", {"width": 5}
    vbdl.Predictor(q, vbdl.Categorical(), n_samples=2, compile=False).save(
        folder,
        example=rows()[0],
        extras=EXTRAS,
        architecture=[target, target] if several else target,
        arguments=[arguments, {"width": 7}] if several else arguments,
    )
    return folder, several


# a network that is given is carried along by every way; one that is imported by its name needs no care, and is tried on
# the loaded predictor and on the longest way
@pytest.mark.parametrize("way", DERIVED)
@pytest.mark.parametrize("given", ["trust", "module"])
@pytest.mark.slow_where(cell=lambda p: p["given"] == "trust" and p["way"] not in ("itself", "both"))
def test_architecture_arguments_and_extras_are_kept(saved, way, given, tmp_path, monkeypatch):
    folder, several = saved
    modules = [network(5), network(7)] if several else network(5)
    how = {"trust": TRUST} if given == "trust" else {"module": modules}
    loaded = vbdl.load(folder, compile=False, **how)
    derived = DERIVED[way](loaded)
    expected = derived(rows()[0])
    if given == "module":  # whoever gave the network need not trust the name: saving does not import it
        monkeypatch.setattr("vbdl.artifact.networks._import", lambda target: pytest.fail(f"imported {target}"))
    derived.save(tmp_path / "again")
    monkeypatch.undo()
    found = vbdl.load(tmp_path / "again", trust=TRUST, compile=False)
    assert found.manifest.extras == EXTRAS and found.manifest.inputs == loaded.manifest.inputs
    assert found.manifest.posterior == loaded.manifest.posterior
    assert torch.equal(found(rows()[0]).probs, expected.probs)
    # what is given counts
    derived.save(tmp_path / "other", extras={"other": 1})
    assert vbdl.load(tmp_path / "other", trust=TRUST, compile=False).manifest.extras == {"other": 1}


def _likelihoods():
    x, y = rows()
    returns = torch.randn(60, 1, generator=torch.Generator().manual_seed(6))
    yes = lambda make: lambda p: vbdl.calibrate(p, (x, y.float()), make())
    of = lambda make: lambda p: vbdl.calibrate(p, (x, returns), make())
    return {
        "categorical": (vbdl.Categorical(), 2, lambda p: p),
        "bernoulli": (vbdl.Bernoulli(), 1, lambda p: p),
        "gaussian": (vbdl.Gaussian(), 1, lambda p: p),
        "heteroscedastic": (vbdl.HeteroscedasticGaussian(), 2, lambda p: p),
        "sets": (vbdl.Categorical(), 2, DERIVED["conformal"]),
        "platt": (vbdl.Bernoulli(), 1, yes(calibration.Platt)),
        "referral": (vbdl.Categorical(), 2, DERIVED["both"]),
        "intervals": (vbdl.Gaussian(), 1, of(lambda: calibration.CQR(0.2))),
        "risk": (vbdl.Gaussian(), 1, lambda p: vbdl.with_decision(of(calibration.StdScaling)(p), decision.Risk())),
        "hand-over": (vbdl.Gaussian(), 1, lambda p: vbdl.with_decision(p, decision.HandOver((1, 1), (2, 2)))),
    }


# every prediction by one network, and every kind of network by the first prediction
@pytest.mark.parametrize("name", _likelihoods())
@pytest.mark.parametrize("kind", ["layers", "reference", "supplied"])
@pytest.mark.slow_where(cell=lambda p: p["kind"] != "layers" and p["name"] != "categorical")
def test_the_code_of_the_card_runs_and_names_the_predictions_own_fields(name, kind, tmp_path):
    likelihood, outputs, derive = _likelihoods()[name]
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.2), nn.Linear(4, outputs))
    net = layers if kind == "layers" else network(4, outputs)
    predict = derive(vbdl.Predictor(vbdl.MCDropout(net), likelihood, n_samples=4, compile=False))
    named = {"architecture": f"{__name__}:network", "arguments": {"width": 4, "outputs": outputs}}
    folder = predict.save(tmp_path / "m", example=rows()[0], **(named if kind == "reference" else {}))
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    last = code.strip().splitlines()[-1]
    space = {"x": rows()[0], "network": net}
    exec(code.replace("this folder", str(folder)).replace(last, f"read = [{last}]"), space)
    assert all(isinstance(value, torch.Tensor) for value in space["read"])
    main = "p.probs, p.label" if "p.probs" in last else "p.mean, p.std"
    assert last.startswith(main) and ("p.probs" in last) == (space["p"].probs is not None)
    for added in ("sets", "lower", "upper", "action", "risk", "var", "es"):
        assert (f"p.{added}" in last.split(", ")) == (getattr(space["p"], added, None) is not None)
