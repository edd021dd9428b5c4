"""Networks for the methods whose members share weights, and the weights of a member by formulas of their own."""

import torch
import torch.nn.functional as F
from torch import nn

import vbdl
from vbdl.types import Posterior

CLASSES = 3


class Twice(nn.Module):
    """One module called twice, and under two names."""

    def __init__(self):
        super().__init__()
        self.first, self.layer, self.head = nn.Linear(5, 7), nn.Linear(7, 7), nn.Linear(7, CLASSES)
        self.again = self.layer

    def forward(self, x):
        h = torch.tanh(self.layer(torch.tanh(self.first(x))))
        return self.head(self.again(h))


class Tied(nn.Module):
    """An embedding whose matrix is also the last layer's, and the middle layer's weight transposed."""

    def __init__(self):
        super().__init__()
        self.embed, self.middle, self.head = nn.Embedding(CLASSES, 6), nn.Linear(6, 5), nn.Linear(6, CLASSES)
        self.head.weight = self.embed.weight

    def forward(self, x):
        h = self.embed(x).mean(1)
        h = torch.tanh(self.middle(h))
        return self.head(torch.tanh(h @ self.middle.weight))


class Attention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)
        self.embed, self.keys = nn.Linear(3, 8), nn.Linear(3, options.get("kdim", 8))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        h, keys = self.embed(x), self.keys(x)
        return self.head(self.attention(h, keys, keys)[0].mean(1))


class Encoder(nn.Module):
    def __init__(self, **options):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 11, dropout=0.0, batch_first=True, **options)
        self.encoder, self.embed = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(3, 8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.head(self.encoder(self.embed(x)).mean(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 5, batch_first=True), nn.Linear(5, CLASSES)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


def statistics(norm: nn.Module) -> nn.Module:
    """With the running statistics of a trained network."""
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    return norm


def convolutions(dims: int, transposed: bool = False, **options) -> nn.Module:
    conv = [nn.Conv1d, nn.Conv2d, nn.Conv3d][dims - 1]
    second = [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d][dims - 1] if transposed else conv
    norm = statistics([nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d][dims - 1](6))
    pool = [nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d][dims - 1](2)
    head = nn.Linear(9 * 2**dims, CLASSES)
    return nn.Sequential(conv(2, 6, 3), norm, nn.Tanh(), second(6, 9, 3, **options), pool, nn.Flatten(), head)


def rows(*shape: int):
    return lambda: torch.randn(8, *shape)


NETWORKS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(5, 17), nn.Tanh(), nn.Linear(17, CLASSES)), rows(5)),
    "without biases": (
        lambda: nn.Sequential(nn.Linear(5, 13, bias=False), nn.ReLU(), nn.Linear(13, CLASSES, bias=False)),
        rows(5),
    ),
    "layer norm": (
        lambda: nn.Sequential(nn.Linear(5, 9), nn.LayerNorm(9), nn.ReLU(), nn.Linear(9, CLASSES)),
        rows(5),
    ),
    "conv1d": (lambda: convolutions(1, groups=3, padding=1, padding_mode="reflect"), rows(2, 9)),
    "conv2d": (lambda: convolutions(2, groups=3, padding="same", padding_mode="circular", bias=False), rows(2, 7, 9)),
    "conv2d, strided": (lambda: convolutions(2, stride=2, dilation=2, padding=2), rows(2, 7, 9)),
    "conv3d": (lambda: convolutions(3, padding=1), rows(2, 5, 6, 5)),
    "transposed": (lambda: convolutions(2, True, stride=2, output_padding=1, groups=3), rows(2, 7, 6)),
    "transposed, one axis": (lambda: convolutions(1, True, dilation=2), rows(2, 7)),
    "used twice": (Twice, rows(5)),
    "tied": (Tied, lambda: torch.randint(CLASSES, (8, 4))),
    "attention": (Attention, rows(4, 3)),
    "attention of other keys": (lambda: Attention(kdim=6, vdim=6), rows(4, 3)),
    "attention without biases": (lambda: Attention(bias=False), rows(4, 3)),
    "transformer": (Encoder, rows(4, 3)),
    "transformer, norm first": (lambda: Encoder(norm_first=True, activation=F.gelu), rows(4, 3)),
    "recurrent": (Recurrent, rows(4, 3)),
}


def weight_of_member(m: nn.Module, leaf: str, weight, r, s):
    """W_m by loops over the outputs of a layer; r, s: factors of inputs and outputs, or None."""
    if leaf != "weight" or isinstance(m, nn.Linear):
        outputs, inputs = weight.shape
        r = torch.ones(inputs) if r is None else r
        s = torch.ones(outputs) if s is None else s
        return torch.stack([weight[o] * s[o] * r for o in range(outputs)])
    groups, transposed = m.groups, isinstance(m, nn.modules.conv._ConvTransposeNd)
    r = torch.ones(m.in_channels) if r is None else r
    s = torch.ones(m.out_channels) if s is None else s
    after = [1] * (weight.ndim - 2)
    wide_in, wide_out = m.in_channels // groups, m.out_channels // groups
    pieces = []
    if transposed:
        for i in range(m.in_channels):
            block = slice(i // wide_in * wide_out, (i // wide_in + 1) * wide_out)
            pieces.append(weight[i] * r[i] * s[block].view(-1, *after))
    else:
        for o in range(m.out_channels):
            block = slice(o // wide_out * wide_in, (o // wide_out + 1) * wide_in)
            pieces.append(weight[o] * s[o] * r[block].view(-1, *after))
    return torch.stack(pieces)


def state_of_member(q, network: nn.Module, entries: dict, index: int) -> dict:
    """The state of the plain network for a member, differentiable; entries: those of the posterior by name."""
    stacked = set(q.stacked())
    own = {name: t[index] if name in stacked else t for name, t in entries.items()}
    state = {name.removeprefix("inner."): t for name, t in own.items() if name.startswith("inner.")}
    for name in q.scaled:
        path, _, leaf = name.rpartition(".")
        key = name.replace(".", "/")
        m = network.get_submodule(path)
        if isinstance(m, nn.Embedding):  # tied to a linear layer
            m = network.head
        state[name] = weight_of_member(m, leaf, state[name], own.get(f"r.{key}"), own.get(f"s.{key}"))
    return state


def made(name: str):
    """A network of this name, and rows for it."""
    torch.manual_seed(4)
    make, rows = NETWORKS[name]
    return make(), rows()


def predictor(q: Posterior, **settings) -> vbdl.Predictor:
    return vbdl.Predictor(q, vbdl.Categorical(), **{"compile": False, "tiles": (64,), **settings})
