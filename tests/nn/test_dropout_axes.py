"""Dropout of tensors whose first axis is not the batch alone: several entries for a row, or no batch at all."""

import pytest
import torch
from torch import nn

import vbdl

COPIES, WIDTH = 4, 12  # entries with the same values, and the numbers of each


class Attends(nn.Module):
    def __init__(self, batch_first=True):
        super().__init__()
        self.layer = nn.MultiheadAttention(4, 2, 0.5, batch_first=batch_first)

    def forward(self, x):
        return self.layer(x, x, x, need_weights=False)[0]


class Recurs(nn.Module):
    def __init__(self, kind=nn.GRU, batch_first=True):
        super().__init__()
        self.layer = kind(4, 4, 2, dropout=0.5, batch_first=batch_first)

    def forward(self, x):
        return self.layer(x)[0]


class Swaps(nn.Module):
    """A layer of which the batch is the second axis."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.transpose(0, 1)).transpose(0, 1)


# a layer, and the shape of one entry
LAYERS = {
    "dropout": (lambda: nn.Dropout(0.5), (12,)),
    "alpha dropout": (lambda: nn.AlphaDropout(0.5), (12,)),
    "dropout1d": (lambda: nn.Dropout1d(0.5), (6, 2)),
    "dropout2d": (lambda: nn.Dropout2d(0.5), (6, 2, 1)),
    "dropout2d of signals": (lambda: nn.Dropout2d(0.5), (6, 2)),
    "dropout3d": (lambda: nn.Dropout3d(0.5), (6, 2, 1, 1)),
    "feature alpha dropout": (lambda: nn.FeatureAlphaDropout(0.5), (6, 2)),
    "attention": (Attends, (3, 4)),
    "attention, batch second": (lambda: Swaps(Attends(False)), (3, 4)),
    "encoder": (lambda: nn.TransformerEncoderLayer(4, 2, 8, 0.5, batch_first=True), (3, 4)),
    "GRU": (Recurs, (3, 4)),
    "LSTM": (lambda: Recurs(nn.LSTM), (3, 4)),
    "RNN, batch second": (lambda: Swaps(Recurs(nn.RNN, False)), (3, 4)),
}


class Folded(nn.Module):
    """Gives a layer several entries for each row, as windows of an image or frames of a video are."""

    def __init__(self, layer, shape):
        super().__init__()
        self.layer, self.shape = layer, shape

    def forward(self, x):
        entries = x.repeat_interleave(COPIES, 0).view(-1, *self.shape)
        return self.layer(entries).reshape(len(x), COPIES, -1).sin().sum(-1)


class Apart(nn.Module):
    """Gives a layer entries of a parameter, whatever the rows are."""

    def __init__(self, layer, shape):
        super().__init__()
        self.layer, self.entry = layer, nn.Parameter(torch.randn(shape))

    def forward(self, x):
        entries = self.entry.expand(COPIES, *self.entry.shape)
        return self.layer(entries).reshape(COPIES, -1).sin().sum(-1) * x[:, :1]


@pytest.mark.parametrize("kind", [Folded, Apart])
@pytest.mark.parametrize("name", LAYERS)
def test_every_entry_has_a_mask_of_its_own_that_rows_share(name, kind):
    make, shape = LAYERS[name]
    x = torch.randn(1, WIDTH).expand(3, -1).contiguous()
    predict = vbdl.Predictor(vbdl.MCDropout(kind(make(), shape).eval()), vbdl.Gaussian(COPIES), 8, compile=False)
    outputs = predict(x, samples=True).samples[..., 0]  # (draws, rows, entries)
    torch.testing.assert_close(outputs, outputs[:, :1].expand_as(outputs))
    for other in range(1, COPIES):
        assert not torch.allclose(outputs[..., other], outputs[..., 0], rtol=1e-3, atol=1e-4)


class Alone(nn.Module):
    """Gives a layer a parameter without a batch axis, or with one of length 1."""

    def __init__(self, layer, shape, batch):
        super().__init__()
        self.layer, self.entry, self.batch = layer, nn.Parameter(torch.randn(shape)), batch

    def forward(self, x):
        entry = self.layer(self.entry.unsqueeze(self.batch)) if self.batch is not None else self.layer(self.entry)
        return entry.reshape(1, -1) * x


UNBATCHED = {  # a layer, the shape of one entry, and the layer's batch axis
    "dropout3d": (lambda: nn.Dropout3d(0.5), (6, 2, 1, 1), 0),
    "attention": (Attends, (3, 4), 0),
    "attention, batch second": (lambda: Attends(False), (3, 4), 1),
    "encoder": (lambda: nn.TransformerEncoderLayer(4, 2, 8, 0.5, batch_first=True), (3, 4), 0),
    "decoder": (lambda: Decodes(), (3, 4), 0),
    "GRU": (Recurs, (3, 4), 0),
    "LSTM": (lambda: Recurs(nn.LSTM, False), (3, 4), 1),
}


class Decodes(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(4, 2, 8, 0.5, batch_first=True)

    def forward(self, x):
        return self.layer(x, x * 2, tgt_mask=torch.ones(3, 3, dtype=torch.bool).triu(1))


@pytest.mark.parametrize("name", UNBATCHED)
def test_a_layer_without_a_batch_axis_draws_as_with_one_of_length_1(name):
    make, shape, batch = UNBATCHED[name]
    alone, other = Alone(make(), shape, None).eval(), Alone(make(), shape, batch).eval()
    other.load_state_dict(alone.state_dict())
    x = torch.randn(3, WIDTH)
    found, expected = (
        vbdl.Predictor(vbdl.MCDropout(net), vbdl.Gaussian(WIDTH), 8, compile=False)(x, samples=True).samples
        for net in (alone, other)
    )
    assert found.std(0).mean() > 1e-3
    torch.testing.assert_close(found, expected)
