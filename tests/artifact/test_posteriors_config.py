"""The methods of vbdl say how they are made by `config()`, as a method of the user's own does; storage reads that."""

import pytest
import torch
from torch import nn

import vbdl
from vbdl.artifact.card import method
from vbdl.artifact.manifest import read
from vbdl.methods import METHODS


@vbdl.register
class HalfDropout(vbdl.MCDropout):
    """MC dropout whose constructor takes no rate, and which does not say how it is made."""

    def __init__(self, module, seed=0):
        super().__init__(module, 0.5, seed=seed)


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Dropout(0.1), nn.Linear(4, 1))


def layered():
    return nn.Sequential(vbdl.BayesianLinear(3, 4, prior=0.3), nn.ReLU(), nn.Linear(4, 1))


MADE = {
    "dropout": lambda: vbdl.MCDropout(network(), {"2": 0.3}, [nn.ReLU, "0"], seed=3),
    "mean-field": lambda: vbdl.MeanField(network(), 50, {"": 0.7, "3": vbdl.ScaleMixture()}, ["3"], 0.1, 2, 5),
    "layered": lambda: vbdl.MeanField(layered(), 50, n_samples=3, seed=5),
    "ensemble": lambda: vbdl.DeepEnsemble(network(), 3, seed=4),
}


@pytest.mark.parametrize("name", MADE)
def test_config_makes_the_posterior_again(name):
    q = MADE[name]()
    again = type(q)(layered() if name == "layered" else network(), **q.config())
    assert again.config() == q.config()
    again.load_state_dict(q.state_dict())
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    one, other = (vbdl.Predictor(p, vbdl.Gaussian(), compile=False, n_samples=3)(x).mean for p in (q, again))
    assert torch.equal(one, other)


def test_what_config_returns_is_what_the_constructor_was_given():
    assert MADE["dropout"]().config() == {"p": {"2": 0.3}, "deterministic": [nn.ReLU, "0"], "seed": 3}
    assert MADE["mean-field"]().config() == {
        "n_data": 50, "prior": {"3.weight": vbdl.ScaleMixture(), "3.bias": vbdl.ScaleMixture()},
        "parameters": ["3.weight", "3.bias"], "initial_std": pytest.approx(0.1), "n_samples": 2, "seed": 5,
    }  # fmt: skip
    assert MADE["layered"]().config() == {"n_data": 50, "n_samples": 3, "seed": 5}
    assert MADE["ensemble"]().config() == {"n_members": 3, "seed": 4, "shared": []}


def test_an_ensemble_of_several_architectures_has_a_config_a_part():
    q = vbdl.DeepEnsemble([network(), network(), nn.Linear(3, 1)])
    assert [part.config()["n_members"] for part in q.parts] == [2, 1]
    with pytest.raises(ValueError, match="ask its parts"):
        q.config()


def test_an_inherited_config_that_the_constructor_does_not_take_is_refused_when_saving(tmp_path):
    predict = vbdl.Predictor(HalfDropout(network()), vbdl.Gaussian(), 2, compile=False)
    with pytest.raises(ValueError, match="returns 'deterministic', which its constructor does not take"):
        vbdl.save(predict, tmp_path / "model.vbdl")


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("dropout", "MC dropout"),
        ("mean-field", "Mean-field variational inference"),
        ("ensemble", "Deep ensemble of 3 members"),
    ],
)
def test_the_card_calls_a_method_what_the_table_calls_it(name, title, tmp_path):
    x = torch.zeros(2, 3)
    predict = vbdl.Predictor(MADE[name](), vbdl.Gaussian(), 3, compile=False)
    predict(x)
    vbdl.save(predict, tmp_path / "model.vbdl")
    assert method(read(tmp_path / "model.vbdl")) == title
    assert any(title.lower().startswith(m.words.lower()) for m in METHODS.values())


def test_members_of_an_ensemble_are_called_what_the_table_calls_them(tmp_path):
    q = vbdl.DeepEnsemble(MADE["layered"](), 2)
    vbdl.save(vbdl.Predictor(q, vbdl.Gaussian(), 2, compile=False), tmp_path / "model.vbdl")
    said = method(read(tmp_path / "model.vbdl"))
    assert said == "Deep ensemble of 2 members of mean-field variational inference"
