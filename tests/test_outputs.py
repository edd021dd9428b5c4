"""Networks that return several outputs: the one to predict from is found by itself or chosen by `output=`."""

import warnings
from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vbdl
from vbdl.calling.outputs import pick

ROWS, CLASSES = 24, 3


@dataclass
class Heads:
    hidden: Tensor
    logits: Tensor
    cache: Any = None


class Cache:
    """An object that is no tensor, new in every call, like a cache of keys and values."""


Pair = namedtuple("Pair", ["logits", "auxiliary"])

KINDS = {
    "dict": lambda hidden, logits: {"hidden": hidden, "logits": logits, "cache": Cache()},
    "dataclass": lambda hidden, logits: Heads(hidden, logits, Cache()),
    "named tuple": lambda hidden, logits: Pair(logits, hidden),
    "tuple of one": lambda hidden, logits: (logits, None),
    "tuple": lambda hidden, logits: (hidden, logits),
    "other names": lambda hidden, logits: {"hidden": hidden, "scores": logits},
    "nested": lambda hidden, logits: {"hidden": hidden, "heads": [logits]},
}


def heads_of(outputs):
    return outputs["heads"][0]


CHOICES = {"tuple": 1, "other names": "scores", "nested": heads_of}


class Network(nn.Module):
    """Returns its logits among other outputs, as a container of one of KINDS, or alone."""

    def __init__(self, kind=None):
        super().__init__()
        self.kind = kind
        self.body, self.drop, self.head = nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, CLASSES)

    def forward(self, x):
        hidden = self.drop(self.body(x).tanh())
        logits = self.head(hidden)
        return logits if self.kind is None else KINDS[self.kind](hidden, logits)


def network(kind=None, seed=0):
    torch.manual_seed(seed)
    return Network(kind)


METHODS = {
    "MC dropout": lambda kind, output: vbdl.MCDropout(network(kind), output=output),
    "mean-field": lambda kind, output: vbdl.MeanField(network(kind).eval(), ROWS, output=output),
    "deterministic": lambda kind, output: vbdl.Deterministic(network(kind), output=output),
    "ensemble": lambda kind, output: vbdl.DeepEnsemble([network(kind, 0), network(kind, 1)], output=output),
    "stochastic": lambda kind, output: vbdl.Stochastic(network(kind), noisy=[nn.Dropout], output=output),
}


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(ROWS, 4, generator=generator), torch.randint(CLASSES, (ROWS,), generator=generator)


def trained(make, kind, output, data):
    q, likelihood = make(kind, output), vbdl.Categorical()
    vbdl.fit(q, data, likelihood, epochs=2, batch_size=8, compile=False)
    return vbdl.Predictor(q, likelihood, None if q.n_draws else 3, compile=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_training_and_prediction_are_those_of_the_chosen_tensor_alone(method, kind, data):
    alone = trained(METHODS[method], None, None, data)
    among = trained(METHODS[method], kind, CHOICES.get(kind), data)
    torch.testing.assert_close(
        among(data[0], samples=True).samples, alone(data[0], samples=True).samples, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["dict", "other names", "nested"])
def test_a_saved_predictor_remembers_the_choice(method, kind, data, tmp_path):
    predictor = trained(METHODS[method], kind, CHOICES.get(kind), data)
    predictor.save(tmp_path / "saved", example=data[0])
    loaded = vbdl.load(tmp_path / "saved", module=Network(kind), trust=(__name__.partition(".")[0],))
    assert loaded.posterior.output == predictor.posterior.output
    assert torch.equal(loaded(data[0]).probs, predictor(data[0]).probs)


def test_a_function_is_imported_only_if_it_is_trusted(data, tmp_path):
    trained(METHODS["MC dropout"], "nested", heads_of, data).save(tmp_path / "saved")
    with pytest.raises(ValueError, match="trust"):
        vbdl.load(tmp_path / "saved", module=Network("nested"))


def test_a_function_that_cannot_be_imported_is_not_saved(data, tmp_path):
    predictor = trained(METHODS["MC dropout"], "nested", lambda outputs: outputs["heads"][0], data)
    with pytest.raises(ValueError, match="top level of a module"):
        predictor.save(tmp_path / "saved")


def test_other_output_than_logits_is_chosen(data):
    q = vbdl.MCDropout(network("dict"), output="hidden")
    likelihood = vbdl.Gaussian(8)
    assert vbdl.Predictor(q, likelihood, 2, compile=False)(data[0]).mean.shape == (ROWS, 8)


def test_an_ensemble_has_the_output_of_its_members(data):
    q = vbdl.DeepEnsemble([vbdl.MCDropout(network("other names", s), output="scores") for s in range(2)])
    assert q.output == "scores"
    vbdl.fit(q, data, vbdl.Categorical(), epochs=1, compile=False)


def test_several_architectures_share_the_choice(data):
    wide = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), network("other names"))
    wide[2].body = nn.Linear(16, 8)
    q = vbdl.DeepEnsemble([network("other names"), wide], output="scores")
    likelihood = vbdl.Categorical()
    vbdl.fit(q, data, likelihood, epochs=1, compile=False)
    assert vbdl.Predictor(q, likelihood, compile=False)(data[0]).probs.shape == (ROWS, CLASSES)


@pytest.mark.parametrize("kind", CHOICES)
def test_an_ambiguous_output_is_an_error_that_lists_what_there_is(kind, data):
    with pytest.raises(TypeError, match="Choose one in the posterior, like MCDropout") as error:
        vbdl.fit(vbdl.MCDropout(network(kind)), data, vbdl.Categorical(), compile=False)
    assert "Tensor (batch, 8)" in str(error.value)
    line = {"tuple": "output=0", "other names": "output='hidden'", "nested": "output='hidden'"}[kind]
    assert line in str(error.value)


def test_errors_of_a_choice_say_what_there_is():
    x = torch.zeros(2, 3)
    assert pick({"a": x}, None) is x
    assert pick({"a": None, "b": (), "c": x}, -1) is x
    assert pick(x, "logits") is x  # e.g. with an auxiliary head in training only
    with pytest.raises(TypeError, match=r"no tensor 'c'.*a: Tensor \(batch, 3\), b: NoneType"):
        pick({"a": x, "b": None}, "c")
    with pytest.raises(TypeError, match="no tensor 5"):
        pick((x, x), 5)
    with pytest.raises(TypeError, match="returned dict instead of one Tensor"):
        pick({"a": x}, lambda outputs: outputs)
    with pytest.raises(TypeError, match=r"output=lambda outputs: \.\.\."):
        pick(Cache(), None)
    with pytest.raises(TypeError, match="name or the index"):
        vbdl.MCDropout(Network(), output=True)


def test_inspection_takes_the_same_choice(data):
    assert vbdl.inspect(network("dict"), data[0]).plan is not None
    assert vbdl.inspect(network("tuple"), data[0], output=1).plan is not None
    assert "Choose one in the posterior" in str(vbdl.inspect(network("tuple"), data[0]))


class Masked(nn.Module):
    """Leaves its mask out where it holds only ones, as Hugging Face's networks do, unless a graph is made."""

    def __init__(self):
        super().__init__()
        self.body, self.drop, self.head = nn.Linear(1, 8), nn.Dropout(0.2), nn.Linear(8, CLASSES)

    def forward(self, tokens, mask):
        hidden = self.drop(self.body(tokens.unsqueeze(-1)).tanh())
        if not torch.compiler.is_compiling() and mask.all():
            return self.head(hidden.mean(1))
        weights = mask.to(hidden.dtype).unsqueeze(-1)
        return self.head((hidden * weights).sum(1) / weights.sum(1))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
@pytest.mark.parametrize("method", ["MC dropout", "mean-field", "ensemble"])
def test_a_mask_that_is_skipped_where_it_is_all_ones_is_followed(method, dtype, data):
    """Traced on ones, called with padding: the numbers of the network itself."""
    x, y = data
    ones = torch.ones(ROWS, 4, dtype=dtype)
    padded = ones.clone()
    padded[::2, 2:] = 0
    torch.manual_seed(1)
    members = [Masked(), Masked()]
    q = {
        "MC dropout": lambda: vbdl.MCDropout(members[0]),
        "mean-field": lambda: vbdl.MeanField(members[0].eval(), ROWS),
        "deterministic": lambda: vbdl.Deterministic(members[0]),
        "ensemble": lambda: vbdl.DeepEnsemble(members),
    }[method]()
    likelihood = vbdl.Categorical()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vbdl.fit(q, ({"tokens": x, "mask": padded}, y), likelihood, epochs=1, batch_size=8, compile=False)
        predictor = vbdl.Predictor(q, likelihood, None if q.n_draws else 3, compile=False, tiles=ROWS, joint=True)
        predictor({"tokens": x, "mask": ones})
        samples = predictor({"tokens": x, "mask": padded}, samples=True).samples
    assert not torch.compiler.is_compiling()
    execution = predictor.executions.drawing(predictor.check({"tokens": x, "mask": padded}))[0]
    assert execution.graph_plan.strategy == "stacked"
    model = execution.traced.model
    for draw in range(len(samples)):
        state = {n: t[0] for n, t in model.entries(torch.tensor([draw]), 0).items()}
        expected = torch.func.functional_call(model, state, (), {"tokens": x, "mask": padded})
        torch.testing.assert_close(samples[draw], expected, rtol=0, atol=1e-6)
