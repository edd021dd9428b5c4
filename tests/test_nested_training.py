"""`fit`, validation, calibration and log_prob take inputs nested in any way, as predictions do."""

from collections import UserDict

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import vbdl
from vbdl.calibration import StdScaling

ROWS, OUTPUTS = 60, 2


class Nested(nn.Module):
    """Takes a dict in a dict, a tuple, a mask that may be missing and a text."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.drop = nn.Linear(2, OUTPUTS), nn.Linear(3, OUTPUTS), nn.Dropout(0.2)

    def forward(self, features, pair, mask=None, form="sum"):
        left, right = pair
        out = self.a(features["inner"]["x"]) + self.b(self.drop(left + right if form == "sum" else left - right))
        return out if mask is None else out * mask


def nested(x, mask=None, kind=dict, form="sum"):
    inner = kind({"inner": {"x": x[..., :2]}})
    return kind({"features": inner, "pair": (x[..., 2:], x[..., 2:] ** 2), "mask": mask, "form": form})


class NestedRows(Dataset):
    def __init__(self, x, y, kind=dict, forms=("sum",)):
        self.x, self.y, self.kind, self.forms = x, y, kind, forms

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return nested(self.x[index], None, self.kind, self.forms[index % len(self.forms)]), self.y[index]


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, 5, generator=generator)
    return x, torch.stack((x[:, 0].sin(), x[:, 1] * x[:, 2]), 1) + 0.1 * torch.randn(ROWS, 2, generator=generator)


METHODS = {
    "MC dropout": vbdl.MCDropout,
    "mean-field": lambda network: vbdl.MeanField(network, ROWS),
    "ensemble": lambda network: vbdl.DeepEnsemble(network, 2),
}


@pytest.mark.parametrize("name", METHODS)
def test_nested_inputs_train_as_the_same_from_tensors_arrays_a_mapping_and_a_dataset(name, data):
    x, y = data
    network, ends, histories = Nested(), [], []
    forms = (
        (nested(x), y),
        (nested(x.numpy()), y.numpy()),
        (nested(x, kind=UserDict), y),
        NestedRows(x, y),
        NestedRows(x, y, UserDict),
    )
    for given in forms:
        q, likelihood = METHODS[name](network), vbdl.Gaussian(OUTPUTS)
        options = {"epochs": 2, "batch_size": 17, "validation": 0.25, "compile": False, "progress": False}
        histories.append(vbdl.fit(q, given, likelihood, **options))
        ends.append(vbdl.Predictor(q, likelihood, None if name == "ensemble" else 2, compile=False)(nested(x)).mean)
    for history, mean in zip(histories, ends, strict=True):
        assert torch.equal(ends[0], mean)
        assert np.array_equal(histories[0].train_loss, history.train_loss)


def test_nested_training_is_training_on_the_same_numbers_flat(data):
    class Flat(Nested):
        def forward(self, x):
            return super().forward(**nested(x))

    x, y = data
    means = []
    torch.manual_seed(0)
    flat, deep = Flat(), Nested()
    deep.load_state_dict(flat.state_dict())
    for network, rows in ((flat, x), (deep, nested(x))):
        q, likelihood = vbdl.MCDropout(network), vbdl.Gaussian(OUTPUTS)
        vbdl.fit(q, (rows, y), likelihood, epochs=3, batch_size=20, compile=False, progress=False)
        means.append(vbdl.Predictor(q, likelihood, 4, compile=False)(rows).mean)
    torch.testing.assert_close(means[0], means[1])


@pytest.mark.parametrize("compile", [False, True])
def test_batches_of_a_loader_may_differ_in_what_they_leave_out(compile, data):
    x, y = data
    batches = [(nested(x[:20]), y[:20]), (nested(x[20:40], form="difference"), y[20:40])]  # of the same shapes
    likelihood, q = vbdl.Gaussian(OUTPUTS), vbdl.MCDropout(Nested())
    before = {n: p.detach().clone() for n, p in q.named_parameters()}
    history = vbdl.fit(q, DataLoader(batches, batch_size=None), likelihood, epochs=2, compile=compile, progress=False)
    assert np.isfinite(history.train_loss).all()
    assert all(not torch.equal(before[n], p) for n, p in q.named_parameters())


def test_a_compiled_step_goes_by_the_structure_and_not_by_the_shapes_alone(data):
    x, y = data
    batches = [(nested(x[:20]), y[:20]), (nested(x[:20], form="difference"), y[:20])]
    losses = []
    torch.manual_seed(0)
    network = Nested()
    for compile in (False, True):
        q, likelihood = vbdl.MCDropout(network), vbdl.Gaussian(OUTPUTS)
        loader = DataLoader(batches, batch_size=None)
        losses.append(vbdl.fit(q, loader, likelihood, epochs=2, compile=compile, progress=False).train_loss)
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


def test_a_loader_of_nested_rows_trains(data):
    q, likelihood = vbdl.MCDropout(NestedWithoutForm()), vbdl.Gaussian(OUTPUTS)
    loader = DataLoader(RowsWithoutForm(*data), batch_size=20)
    history = vbdl.fit(q, loader, likelihood, epochs=2, compile=False, progress=False)
    assert np.isfinite(history.train_loss).all()


class NestedWithoutForm(Nested):
    def forward(self, features, pair):
        return super().forward(features, pair)


class RowsWithoutForm(NestedRows):
    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return {name: x[name] for name in ("features", "pair")}, y  # torch joins no None


def test_nested_rows_calibrate_and_have_a_likelihood(data):
    x, y = data
    q, likelihood = vbdl.MCDropout(Nested()), vbdl.Gaussian(OUTPUTS)
    vbdl.fit(q, (nested(x[:40]), y[:40]), likelihood, epochs=2, compile=False, progress=False)
    predict = vbdl.Predictor(q, likelihood, 4, compile=False)
    calibrated = vbdl.calibrate(predict, (nested(x[40:].numpy()), y[40:].numpy()), StdScaling())
    rows = nested(x[40:])
    assert not torch.equal(calibrated(rows).total, predict(rows).total)
    with pytest.raises(ValueError, match="1 of 21 calibration rows were trained on"):
        vbdl.calibrate(predict, (nested(x[39:]), y[39:]), StdScaling())
    parts = torch.cat([predict.log_prob(nested(x[i : i + 1]), y[i : i + 1]) for i in range(40, 45)])
    torch.testing.assert_close(predict.log_prob(rows, y[40:])[:5], parts)


def test_nested_rows_that_cannot_be_trained_on_are_named(data):
    x, y = data
    q, likelihood = vbdl.MCDropout(Nested()), vbdl.Gaussian(OUTPUTS)
    for given, error, said in (
        ((nested(x), y[:-1]), ValueError, "disagree on the number of rows"),
        (({"features": None}, y), TypeError, "inputs must be tensors or arrays.*got none"),
        (({"features": {"x": 3.0}}, y), TypeError, "inputs are tensors or arrays.*got float"),
        ((nested(torch.where(x > 2, torch.inf, x)), y), ValueError, "input rows are not finite"),
        ((nested(x.double()), y), ValueError, "inputs are torch.float64"),
        (NestedRows(x, y, forms=("sum", "difference")), ValueError, "has 'sum', another has something else"),
    ):
        with pytest.raises(error, match=said):
            vbdl.fit(q, given, likelihood, epochs=1, compile=False, progress=False)
