"""Streams: parts of a sequence, one after the other, are the whole sequence."""

import pytest
import torch
from torch import nn

import vbdl
from vbdl.engine.predictor import Predictor

# as in tests/test_recurrent.py
ROUNDING: dict = {"rtol": 1e-5, "atol": 1e-5}
KINDS = {"GRU": nn.GRU, "LSTM": nn.LSTM, "RNN": nn.RNN}


class Network(nn.Module):
    """Dropout on the inputs of each step, between two layers, on outputs of each step, and before the head."""

    def __init__(self, kind="GRU", every=False, **options):
        super().__init__()
        self.every, self.drop = every, nn.Dropout(0.2)
        self.first = KINDS[kind](4, 5, 2, batch_first=True, dropout=0.3, **options)
        self.second = nn.GRU(5 * (2 if options.get("bidirectional") else 1), 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        x = self.drop(self.first(self.drop(x))[0]).transpose(0, 1)
        x = self.second(x)[0].transpose(0, 1)
        return self.head(self.drop(x if self.every else x[:, -1]))


METHODS = {
    "ensemble": lambda make: vbdl.DeepEnsemble([make().eval() for _ in range(3)]),
    "dropout": lambda make: vbdl.MCDropout(make()),
    "mean-field": lambda make: vbdl.MeanField(make(), n_data=10, initial_std=0.1),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_the_whole_sequence(kind, method):
    q, x = METHODS[method](lambda: Network(kind)), torch.randn(3, 11, 4)
    predict = Predictor(q, vbdl.Categorical(), 3, compile=False, joint=True)
    stream = predict.stream_state()
    for sizes in ([1, 1, 4, 5], [11], [6, 5]):
        stream.reset()
        for part in x.split(sizes, dim=1):
            p = stream(part, samples=True)
        whole = predict(x, samples=True)
        assert stream.steps == 11
        for field in ("samples", "probs", "total", "epistemic", "standard_error"):
            torch.testing.assert_close(getattr(p, field), getattr(whole, field), **ROUNDING)


@pytest.mark.parametrize("method", METHODS)
def test_an_output_for_each_step(method):
    q, x = METHODS[method](lambda: Network(every=True)), torch.randn(2, 7, 4)
    predict = Predictor(q, vbdl.Categorical(), 3, compile=False, joint=True)
    stream = predict.stream_state()
    parts = [stream(part).probs for part in x.split([2, 4, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), predict(x).probs, **ROUNDING)


def test_members_of_several_architectures():
    q = vbdl.DeepEnsemble([Network("GRU").eval(), Network("LSTM").eval(), Network("LSTM").eval()])
    predict, x = Predictor(q, vbdl.Categorical(), compile=False), torch.randn(2, 6, 4)
    stream = predict.stream_state()
    for part in x.split(2, dim=1):
        p = stream(part)
    torch.testing.assert_close(p.probs, predict(x).probs, **ROUNDING)


def test_many_draws_in_several_calls(monkeypatch):
    monkeypatch.setattr("vbdl.engine.plain._ROWS", 6)
    predict, x = Predictor(vbdl.MCDropout(Network()), vbdl.Categorical(), 7, compile=False), torch.randn(2, 6, 4)
    stream = predict.stream_state()
    for part in x.split(2, dim=1):
        p = stream(part)
    torch.testing.assert_close(p.probs, predict(x).probs, **ROUNDING)


@pytest.mark.parametrize("method", METHODS)
def test_a_stream_goes_on_in_another_process(method, tmp_path):
    q, x = METHODS[method](lambda: Network("LSTM")), torch.randn(2, 9, 4)
    predict = Predictor(q, vbdl.Categorical(), 3, compile=False, joint=True)
    stream, loaded = predict.stream_state(), predict.stream_state()
    for part in x[:, :6].split(2, dim=1):
        stream(part)
    torch.save(stream.state_dict(), tmp_path / "stream.pt")
    loaded.load_state_dict(torch.load(tmp_path / "stream.pt"))
    torch.testing.assert_close(loaded(x[:, 6:]).probs, stream(x[:, 6:]).probs, rtol=0, atol=0)
    torch.testing.assert_close(loaded.state_dict(), stream.state_dict(), rtol=0, atol=0)


class Mean(Network):
    def forward(self, x):
        return self.head(self.first(x)[0].mean(1))


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head, self.drop = nn.GRUCell(4, 5), nn.Linear(5, 3), nn.Dropout(0.2)

    def forward(self, x):
        state = None
        for t in x.unbind(1):
            state = self.cell(t, state)
        return self.head(self.drop(state))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Network(bidirectional=True), "bidirectional layer reads a sequence from its end"),
        (Cell, "no state to keep from one part to the next"),
        (Mean, "as one sequence give another prediction"),
    ],
)
def test_what_has_no_stream_is_refused(make, message):
    stream = Predictor(vbdl.MCDropout(make()), vbdl.Categorical(), 3, compile=False).stream_state()
    with pytest.raises(ValueError, match=message):
        for _ in range(2):
            stream(torch.randn(2, 3, 4))


def test_wrong_parts_are_refused():
    predict = Predictor(vbdl.MCDropout(Network()), vbdl.Categorical(), 3, compile=False)
    stream = predict.stream_state()
    stream(torch.randn(2, 3, 4))
    with pytest.raises(ValueError, match="states of 2 rows, got 3.*reset"):
        stream(torch.randn(3, 3, 4))
    with pytest.raises(ValueError, match="at least one of each"):
        stream(torch.randn(2, 0, 4))
    stream.reset()
    stream(torch.randn(3, 3, 4))
    other = predict.replace(n_samples=5).stream_state()
    other.load_state_dict(stream.state_dict())
    with pytest.raises(ValueError, match="load it with the posterior, n_samples"):
        other(torch.randn(3, 3, 4))
    with pytest.raises(ValueError, match="no state of a stream"):
        other.load_state_dict({})


def test_a_part_that_fails_leaves_the_stream_as_it_was():
    predict, x = Predictor(vbdl.MCDropout(Network()), vbdl.Categorical(), 3, compile=False), torch.randn(2, 6, 4)
    stream = predict.stream_state()
    stream(x[:, :4])
    with pytest.raises(RuntimeError):
        stream(torch.randn(2, 2, 7))
    torch.testing.assert_close(stream(x[:, 4:]).probs, predict(x).probs, **ROUNDING)


def test_masks_go_on_where_those_of_a_longer_sequence_would():
    from vbdl_kernels import keep_mask, make_key

    key = make_key(3, [0, 5])
    whole = keep_mask(key, 2, 40, 70, 0.4)
    torch.testing.assert_close(keep_mask(key, 2, 17, 70, 0.4, first=23), whole[:, 23:], rtol=0, atol=0)
