"""Inputs nested in any way: the module sees the structure that was given, and numbers are those of flat inputs."""

import collections
import copy
import functools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import vbdl
from vbdl.calling.inputs import flatten, map_inputs, rebuild, tensors
from vbdl.engine.adaptive import LabelDecided
from vbdl.engine.predictor import Predictor

Pair = collections.namedtuple("Pair", "left, right")
ROUNDING = {"rtol": 0.0, "atol": 1e-6}


class Encoding(collections.UserDict):
    """A Mapping that is no dict, like the `BatchEncoding` of a tokenizer."""


class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 20), nn.ReLU(), nn.Dropout(0.3), nn.Linear(20, 4))

    def forward(self, image, age, left, right):
        return self.net(image - 2 * age + left * right)


class Nested(Flat):
    def forward(self, batch, pair, site=None, doubled=False, mode="plain"):
        assert type(batch) is Encoding and type(batch["meta"]) is dict and batch["meta"]["site"] is None
        assert type(pair) is Pair and type(pair.right) is list
        out = super().forward(batch["image"], batch["meta"]["age"], pair.left, pair.right[0])
        if site is not None:
            out = out + site
        return (2 * out if doubled else out) * {"plain": 1, "negative": -1}[mode]


def flat_rows(rows):
    generator = torch.Generator().manual_seed(1)
    return tuple(2 * torch.randn(rows, 3, generator=generator) for _ in range(4))


def nested_rows(parts, **more):
    image, age, left, right = parts
    batch = Encoding({"image": image, "meta": {"age": age, "site": None}})
    return {"batch": batch, "pair": Pair(left, [right]), **more}


def predictors(method, **settings):
    """The same draws of the same network, called with nested and with flat inputs."""
    torch.manual_seed(0)
    flat = Flat()
    nested = Nested()
    nested.load_state_dict(flat.state_dict())
    wrap = {
        "mc-dropout": vbdl.MCDropout,
        "mean-field": lambda net: vbdl.MeanField(net, 100, initial_std=0.3),
        "ensemble": lambda net: vbdl.DeepEnsemble([_moved(net, seed) for seed in range(5)]),
    }[method]
    settings = {"compile": False, "n_samples": 5 if method == "ensemble" else 40, **settings}
    return [Predictor(wrap(net), vbdl.Categorical(), **settings) for net in (nested, flat)]


def _moved(net, seed):
    generator = torch.Generator().manual_seed(seed)
    net = copy.deepcopy(net)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return net


shared = functools.cache(predictors)  # for tests that only call them: each tile is traced once
METHODS = pytest.mark.parametrize("method", ["mc-dropout", "mean-field", "ensemble"])


@METHODS
@pytest.mark.parametrize("rows", [0, 1, 5, 70])
def test_batches_are_cut_and_padded(method, rows):
    nested, flat = shared(method)
    x = flat_rows(rows)
    found, expected = nested(nested_rows(x), samples=True), flat(x, samples=True)
    for name in ("probs", "total", "epistemic", "standard_error", "samples"):
        assert torch.equal(getattr(found, name), getattr(expected, name))


@METHODS
def test_log_prob(method):
    nested, flat = shared(method)
    x, y = flat_rows(70), torch.arange(70) % 4
    assert torch.equal(nested.log_prob(nested_rows(x), y), flat.log_prob(x, y))


@pytest.mark.parametrize("rule", [0.04, LabelDecided(0.9)])
@pytest.mark.parametrize("method", ["mc-dropout", "mean-field"])
def test_tolerances_and_deadlines(method, rule):
    nested, flat = shared(method, n_samples=150)
    x = flat_rows(70)
    found, expected = nested(nested_rows(x), tolerance=rule), flat(x, tolerance=rule)
    assert len(expected.n_samples.unique()) > 1  # rows are packed anew, or the test says nothing
    assert torch.equal(found.n_samples, expected.n_samples) and torch.equal(found.probs, expected.probs)
    assert torch.equal(nested(nested_rows(x), deadline=1e6).probs, flat(x, deadline=1e6).probs)


def test_moments():
    nested, flat = predictors("mc-dropout", estimator="moments")
    x = flat_rows(9)
    torch.testing.assert_close(nested(nested_rows(x)).probs, flat(x).probs, **ROUNDING)


def test_warm_up_explain_and_what_was_not_warmed_up():
    nested, _ = predictors("mc-dropout", tiles=(4,))
    x = nested_rows(flat_rows(4))
    nested.warm_up((4,), example=x, samples=True, adaptive=True)
    nested(x, samples=True), nested(x, tolerance=0.05)
    assert nested.explain(x).count("[4, 3] float32") == 4  # the shapes of all four tensors
    with pytest.raises(RuntimeError, match="not warmed up"):
        nested(nested_rows(flat_rows(4), doubled=True))


@pytest.mark.slow
def test_compiled():
    nested, flat = predictors("mc-dropout", compile=True, tiles=(4,))
    x = flat_rows(9)
    for _ in range(2):
        torch.testing.assert_close(nested(nested_rows(x)).probs, flat(x).probs, **ROUNDING)


def test_as_module_takes_nested_inputs_by_name_and_position():
    nested, _ = predictors("mc-dropout")
    x = nested_rows(flat_rows(5))
    model, expected = nested.as_module(), nested(x).probs
    assert torch.equal(model(**x), expected) and torch.equal(model(x["batch"], x["pair"]), expected)
    with pytest.raises(TypeError, match="all by position or all by name"):
        model(x["batch"], pair=x["pair"])


@METHODS
def test_gradients_by_the_inputs(method):
    nested, flat = predictors(method)
    gradients = []
    for predict, form in ((nested, nested_rows), (flat, tuple)):
        x = [t.requires_grad_() for t in flat_rows(5)]
        gradients.append(torch.autograd.grad(predict(form(x)).total.sum(), x))
    for found, expected in zip(*gradients, strict=True):
        assert bool(expected.abs().amax() > 0)
        assert torch.equal(found, expected)


def test_flags_texts_and_absent_inputs_are_part_of_the_structure():
    nested, _ = predictors("mc-dropout")
    x = flat_rows(5)
    logits = nested(nested_rows(x), samples=True).samples
    assert torch.equal(nested(nested_rows(x, doubled=False, mode="plain"), samples=True).samples, logits)
    assert torch.equal(nested(nested_rows(x, doubled=True), samples=True).samples, 2 * logits)
    assert torch.equal(nested(nested_rows(x, mode="negative"), samples=True).samples, -logits)
    site = torch.ones(5, 4)
    assert torch.equal(nested(nested_rows(x, site=site), samples=True).samples, logits + 1)
    assert torch.equal(nested(nested_rows(x, site=None), samples=True).samples, logits)


def test_arrays_are_taken_at_any_depth():
    nested, _ = predictors("mc-dropout")
    x = flat_rows(5)
    assert torch.equal(nested(nested_rows([t.numpy() for t in x])).probs, nested(nested_rows(x)).probs)


def test_inspect_runs_a_network_on_nested_inputs():
    report = vbdl.inspect(Nested(), nested_rows(flat_rows(3)))
    assert len(report.stochastic) == 1 and report.flops == 2 * (3 * 20 + 20 * 4) and report.plan is not None


# -- the structure


A, B = torch.zeros(2, 3), torch.ones(2)


@pytest.mark.parametrize(
    "inputs",
    [
        A,
        (A, B),
        [A, B],
        {"a": A, "b": B},
        Encoding(a=A, b=Encoding(c=B)),
        collections.OrderedDict(b=B, a={"c": (A, None)}),
        Pair(A, {"x": [A, True, "mode", None], "y": ()}),
    ],
)
def test_a_structure_comes_back_as_it_was(inputs):
    flat = flatten(inputs)
    again = flatten(flat.nested)
    assert again.structure == flat.structure and hash(again.structure) == hash(flat.structure)
    assert all(a is b for a, b in zip(again.tensors, flat.tensors, strict=True))
    assert type(flat.nested) is type(inputs)
    assert [t is s for t, s in zip(tensors(inputs), flat.tensors, strict=True)]
    doubled = map_inputs(lambda t: 2 * t, inputs)
    assert flatten(doubled).structure == flat.structure
    assert all(torch.equal(a, 2 * b) for a, b in zip(tensors(doubled), tensors(inputs), strict=True))
    assert flatten(rebuild(inputs, list(flat.tensors))).structure == flat.structure


def test_a_mapping_that_is_not_made_of_a_dict_becomes_one():
    inputs = collections.defaultdict(list, a=A)
    assert flatten(inputs).nested == {"a": A}


@pytest.mark.parametrize(
    "one, other",
    [
        ({"a": A, "b": B}, {"b": B, "a": A}),
        ({"a": A}, (A,)),
        ((A, None), (A, False)),
        ((A, B), (A, (B,))),
        ({"a": A}, Encoding(a=A)),
        (A, (A,)),
    ],
)
def test_inputs_nested_in_another_way_have_another_structure(one, other):
    assert flatten(one).structure != flatten(other).structure


@pytest.mark.parametrize(
    "x, message",
    [
        ((A, 3), "tensors or arrays.*got int"),
        ({"a": A, "b": [1.0, 2.0]}, "tensors or arrays.*got float"),
        ((A, object()), "got object"),
        ({}, "got none"),
        ((None, "text"), "got none"),
        (pack_padded_sequence(torch.zeros(3, 2, 4), torch.tensor([3, 2])), "pass the padded rows and their lengths"),
    ],
)
def test_what_is_no_input_is_refused(x, message):
    with pytest.raises(TypeError, match=message):
        predictors("mc-dropout")[1](x)


def test_numbers_of_rows_are_compared_at_any_depth():
    nested, _ = predictors("mc-dropout")
    x = list(flat_rows(5))
    x[3] = x[3][:4]
    with pytest.raises(ValueError, match="disagree on the number of rows"):
        nested(nested_rows(x))
    x = list(flat_rows(5))
    x[1][2, 0] = np.nan
    with pytest.raises(ValueError, match="the first is row 2"):
        nested(nested_rows(x))


@pytest.mark.parametrize(
    "channels, shape, advice",
    [
        (1, (5, 8, 8), r"the axis of the channels is missing: use x.unsqueeze\(1\)"),
        (3, (5, 8, 8, 3), r"use x.movedim\(-1, 1\)"),
        (3, (5, 1, 8, 8), "its first convolution takes rows of 3 channels and 2 more axes"),
    ],
)
def test_misplaced_channels_come_with_what_to_do(channels, shape, advice):
    net = nn.Sequential(nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    predict = vbdl.Predictor(vbdl.Deterministic(net), vbdl.Categorical(), compile=False)
    with pytest.raises(ValueError, match=f"cannot take rows of .*{advice}"):
        predict(torch.zeros(shape))
