"""Networks with one layer each: every layer of torch.nn, and modules as people write them.

    python tests/differential/zoo.py        lists them

A layer of torch.nn that is in neither `LAYERS` nor `NOT_LAYERS` turns a test red: the next one is not forgotten.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

ROWS = 6


@dataclass(frozen=True)
class Entry:
    """make: the layer. like: what it takes, by the name of an input.

    refused: why no predictor takes a network with it. trained: whether plain torch trains it, by gradients, here.
    """

    make: Callable[[], nn.Module]
    like: str = "vector"
    refused: str = ""
    trained: bool = True


INPUTS: dict[str, Callable[[], Tensor]] = {
    "vector": lambda: torch.randn(ROWS, 6),
    "sequence": lambda: torch.randn(ROWS, 4, 6),
    "line": lambda: torch.randn(ROWS, 4, 8),
    "image": lambda: torch.randn(ROWS, 4, 8, 8),
    "volume": lambda: torch.randn(ROWS, 2, 4, 4, 4),
    "ids": lambda: torch.randint(0, 9, (ROWS, 5)),
}


class Network(nn.Module):
    """The layer between a linear layer over the last axis and a head: what comes in and what goes out is learned."""

    def __init__(self, layer: nn.Module, x: Tensor, dropout: float = 0.0):
        super().__init__()
        self.before = nn.Linear(x.shape[-1], x.shape[-1]) if x.is_floating_point() else None
        self.layer, self.drop = layer, nn.Dropout(dropout) if dropout else None
        with torch.no_grad():
            features = self.features(x).shape[1]
        self.head = nn.Linear(features, 3)

    def features(self, x: Tensor) -> Tensor:
        if self.before is not None:
            x = self.before(x)
        out = self.layer(x)
        if out.is_complex():
            out = torch.view_as_real(out)
        return out.reshape(len(out), -1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.features(x)
        return self.head(out if self.drop is None else self.drop(out))


class Call(nn.Module):
    """A module whose forward is this function of it and its input."""

    def __init__(self, function: Callable, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def first(layer: nn.Module) -> nn.Module:
    """Of several outputs the first, as from recurrent layers."""
    return Call(lambda m, x: m.inner(x)[0], inner=layer)


def twice(layer: nn.Module) -> nn.Module:
    return Call(lambda m, x: m.inner(x, x), inner=layer)


def steps(cell: nn.Module) -> nn.Module:
    """A cell over the time axis."""

    def run(m, x):
        state = None
        for t in x.unbind(1):
            state = m.cell(t, state)
        return state[0] if isinstance(state, tuple) else state

    return Call(run, cell=cell)


def E(make, like="vector", refused="", trained=True):  # noqa: N802
    return Entry(make, like, refused, trained)


LAYERS: dict[str, Entry] = {
    # linear
    "Identity": E(nn.Identity),
    "Linear": E(lambda: nn.Linear(6, 5)),
    "Linear without bias": E(lambda: nn.Linear(6, 5, bias=False)),
    "Bilinear": E(lambda: twice(nn.Bilinear(6, 6, 5))),
    "Flatten": E(nn.Flatten, "line"),
    "Unflatten": E(lambda: nn.Unflatten(1, (2, 3))),
    # convolutions
    "Conv1d": E(lambda: nn.Conv1d(4, 6, 3), "line"),
    "Conv1d grouped dilated": E(lambda: nn.Conv1d(4, 6, 3, groups=2, dilation=2, padding=1), "line"),
    "Conv2d": E(lambda: nn.Conv2d(4, 5, 3, padding=1), "image"),
    "Conv2d strided": E(lambda: nn.Conv2d(4, 5, 3, stride=2, bias=False), "image"),
    "Conv2d depthwise": E(lambda: nn.Conv2d(4, 8, 3, groups=4), "image"),
    "Conv2d reflect": E(lambda: nn.Conv2d(4, 5, 3, padding=1, padding_mode="reflect"), "image"),
    "Conv2d circular": E(lambda: nn.Conv2d(4, 5, 3, padding=1, padding_mode="circular"), "image"),
    "Conv2d same": E(lambda: nn.Conv2d(4, 5, 3, padding="same"), "image"),
    "Conv3d": E(lambda: nn.Conv3d(2, 3, 2), "volume"),
    "ConvTranspose1d": E(lambda: nn.ConvTranspose1d(4, 3, 3, stride=2), "line"),
    "ConvTranspose2d": E(lambda: nn.ConvTranspose2d(4, 3, 3, stride=2, output_padding=1), "image"),
    "ConvTranspose2d grouped": E(lambda: nn.ConvTranspose2d(4, 4, 3, groups=2), "image"),
    "ConvTranspose3d": E(lambda: nn.ConvTranspose3d(2, 3, 2), "volume"),
    "Unfold": E(lambda: nn.Unfold(3), "image"),
    "Fold": E(lambda: nn.Sequential(nn.Unfold(2, stride=2), nn.Fold((8, 8), 2, stride=2)), "image"),
    # pooling
    "MaxPool1d": E(lambda: nn.MaxPool1d(2), "line"),
    "MaxPool2d": E(lambda: nn.MaxPool2d(2), "image"),
    "MaxPool3d": E(lambda: nn.MaxPool3d(2), "volume"),
    "MaxUnpool1d": E(lambda: Call(lambda m, x: F.max_unpool1d(*F.max_pool1d(x, 2, return_indices=True), 2)), "line"),
    "MaxUnpool2d": E(lambda: Call(lambda m, x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2)), "image"),
    "MaxUnpool3d": E(lambda: Call(lambda m, x: F.max_unpool3d(*F.max_pool3d(x, 2, return_indices=True), 2)), "volume"),
    "AvgPool1d": E(lambda: nn.AvgPool1d(2), "line"),
    "AvgPool2d": E(lambda: nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False, padding=1), "image"),
    "AvgPool3d": E(lambda: nn.AvgPool3d(2), "volume"),
    "LPPool1d": E(lambda: nn.Sequential(nn.Softplus(), nn.LPPool1d(2, 2)), "line"),
    "LPPool2d": E(lambda: nn.Sequential(nn.Softplus(), nn.LPPool2d(2, 2)), "image"),
    "LPPool3d": E(lambda: nn.Sequential(nn.Softplus(), nn.LPPool3d(2, 2)), "volume"),
    "AdaptiveMaxPool1d": E(lambda: nn.AdaptiveMaxPool1d(3), "line"),
    "AdaptiveMaxPool2d": E(lambda: nn.AdaptiveMaxPool2d(3), "image"),
    "AdaptiveMaxPool3d": E(lambda: nn.AdaptiveMaxPool3d(3), "volume"),
    "AdaptiveAvgPool1d": E(lambda: nn.AdaptiveAvgPool1d(3), "line"),
    "AdaptiveAvgPool2d": E(lambda: nn.AdaptiveAvgPool2d(3), "image"),
    "AdaptiveAvgPool3d": E(lambda: nn.AdaptiveAvgPool3d(3), "volume"),
    "FractionalMaxPool2d": E(
        lambda: nn.FractionalMaxPool2d(2, output_size=3), "image", "only dropout can be drawn", False
    ),
    "FractionalMaxPool3d": E(
        lambda: nn.FractionalMaxPool3d(2, output_size=2), "volume", "only dropout can be drawn", False
    ),
    # padding
    **{
        f"{name}{d}d": E(lambda name=name, d=d: getattr(nn, f"{name}{d}d")(1), like)
        for name in ("ReflectionPad", "ReplicationPad", "ZeroPad", "CircularPad")
        for d, like in ((1, "line"), (2, "image"), (3, "volume"))
    },
    **{
        f"ConstantPad{d}d": E(lambda d=d: getattr(nn, f"ConstantPad{d}d")(1, 0.5), like)
        for d, like in ((1, "line"), (2, "image"), (3, "volume"))
    },
    # activations
    **{
        name: E(lambda name=name: getattr(nn, name)())
        for name in (
            "ELU Hardshrink Hardsigmoid Hardtanh Hardswish LeakyReLU LogSigmoid PReLU ReLU ReLU6 SELU CELU GELU "
            "Sigmoid SiLU Mish Softplus Softshrink Softsign Tanh Tanhshrink GLU"
        ).split()
    },
    "ReLU inplace": E(lambda: nn.ReLU(inplace=True)),
    "PReLU by channel": E(lambda: nn.PReLU(4), "image"),
    "RReLU": E(nn.RReLU, trained=False),
    "Threshold": E(lambda: nn.Threshold(0.1, -0.3)),
    "Softmin": E(lambda: nn.Softmin(-1)),
    "Softmax": E(lambda: nn.Softmax(-1)),
    "Softmax2d": E(nn.Softmax2d, "image"),
    "LogSoftmax": E(lambda: nn.LogSoftmax(-1)),
    "AdaptiveLogSoftmaxWithLoss": E(
        lambda: Call(lambda m, x: m.inner.log_prob(x), inner=nn.AdaptiveLogSoftmaxWithLoss(6, 9, [3, 6], div_value=2.0))
    ),
    # normalization
    "BatchNorm1d": E(lambda: nn.BatchNorm1d(6)),
    "BatchNorm1d of lines": E(lambda: nn.BatchNorm1d(4), "line"),
    "BatchNorm1d plain": E(lambda: nn.BatchNorm1d(6, affine=False)),
    "BatchNorm1d averaging": E(lambda: nn.BatchNorm1d(6, momentum=None)),
    "BatchNorm1d without statistics": E(
        lambda: nn.BatchNorm1d(6, track_running_stats=False), refused="track_running_stats"
    ),
    "BatchNorm2d": E(lambda: nn.BatchNorm2d(4), "image"),
    "BatchNorm3d": E(lambda: nn.BatchNorm3d(2), "volume"),
    "SyncBatchNorm": E(lambda: nn.SyncBatchNorm(4), "image", trained=False),  # on several GPUs only
    "GroupNorm": E(lambda: nn.GroupNorm(2, 6)),
    "GroupNorm of images": E(lambda: nn.GroupNorm(2, 4), "image"),
    "InstanceNorm1d": E(lambda: nn.InstanceNorm1d(4, affine=True), "line"),
    "InstanceNorm2d": E(lambda: nn.InstanceNorm2d(4), "image"),
    "InstanceNorm2d with statistics": E(lambda: nn.InstanceNorm2d(4, track_running_stats=True), "image"),
    "InstanceNorm3d": E(lambda: nn.InstanceNorm3d(2), "volume"),
    "LayerNorm": E(lambda: nn.LayerNorm(6)),
    "LayerNorm without bias": E(lambda: nn.LayerNorm((4, 6), bias=False), "sequence"),
    "LocalResponseNorm": E(lambda: nn.LocalResponseNorm(2), "image"),
    "CrossMapLRN2d": E(lambda: nn.CrossMapLRN2d(2), "image"),
    "RMSNorm": E(lambda: nn.RMSNorm(6), "sequence"),
    # recurrent
    "RNN": E(lambda: first(nn.RNN(6, 5, batch_first=True)), "sequence"),
    "RNN relu": E(lambda: first(nn.RNN(6, 5, nonlinearity="relu", batch_first=True)), "sequence"),
    "LSTM": E(lambda: first(nn.LSTM(6, 5, 2, batch_first=True)), "sequence"),
    "LSTM both ways": E(lambda: first(nn.LSTM(6, 5, batch_first=True, bidirectional=True)), "sequence"),
    "LSTM projected": E(lambda: first(nn.LSTM(6, 5, proj_size=2, batch_first=True)), "sequence"),
    "GRU": E(lambda: first(nn.GRU(6, 5, batch_first=True, bias=False)), "sequence"),
    "RNNCell": E(lambda: steps(nn.RNNCell(6, 5)), "sequence"),
    "LSTMCell": E(lambda: steps(nn.LSTMCell(6, 5)), "sequence"),
    "GRUCell": E(lambda: steps(nn.GRUCell(6, 5)), "sequence"),
    # attention
    "MultiheadAttention": E(
        lambda: Call(lambda m, x: m.inner(x, x, x)[0], inner=nn.MultiheadAttention(6, 2, batch_first=True)), "sequence"
    ),
    "MultiheadAttention with options": E(
        lambda: Call(
            lambda m, x: m.inner(x, x, x, need_weights=False)[0],
            inner=nn.MultiheadAttention(6, 3, add_bias_kv=True, add_zero_attn=True, batch_first=True),
        ),
        "sequence",
    ),
    "MultiheadAttention of other widths": E(
        lambda: Call(
            lambda m, x: m.inner(x, x[..., :3], x[..., :2])[0],
            inner=nn.MultiheadAttention(6, 2, kdim=3, vdim=2, batch_first=True),
        ),
        "sequence",
    ),
    "TransformerEncoderLayer": E(lambda: nn.TransformerEncoderLayer(6, 2, 8, 0.0, batch_first=True), "sequence"),
    "TransformerEncoderLayer norm first": E(
        lambda: nn.TransformerEncoderLayer(6, 2, 8, 0.0, activation="gelu", batch_first=True, norm_first=True),
        "sequence",
    ),
    "TransformerEncoder": E(
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(6, 2, 8, 0.0, batch_first=True), 2, enable_nested_tensor=False
        ),
        "sequence",
    ),
    "TransformerDecoderLayer": E(lambda: twice(nn.TransformerDecoderLayer(6, 2, 8, 0.0, batch_first=True)), "sequence"),
    "TransformerDecoder": E(
        lambda: twice(nn.TransformerDecoder(nn.TransformerDecoderLayer(6, 2, 8, 0.0, batch_first=True), 1)), "sequence"
    ),
    "Transformer": E(lambda: twice(nn.Transformer(6, 2, 1, 1, 8, 0.0, batch_first=True)), "sequence"),
    # embeddings
    "Embedding": E(lambda: nn.Embedding(9, 4), "ids"),
    "Embedding padded": E(lambda: nn.Embedding(9, 4, padding_idx=0), "ids"),
    "Embedding padded at the end": E(lambda: nn.Embedding(9, 4, padding_idx=-1), "ids"),
    "Embedding max_norm": E(lambda: nn.Embedding(9, 4, max_norm=0.7), "ids"),
    "Embedding max_norm padded": E(lambda: nn.Embedding(9, 4, padding_idx=2, max_norm=0.7, norm_type=1.0), "ids"),
    "Embedding by frequency": E(lambda: nn.Embedding(9, 4, scale_grad_by_freq=True), "ids"),
    "EmbeddingBag": E(lambda: nn.EmbeddingBag(9, 4), "ids"),
    "EmbeddingBag sum": E(lambda: nn.EmbeddingBag(9, 4, mode="sum", padding_idx=0), "ids"),
    "EmbeddingBag mean padded": E(lambda: nn.EmbeddingBag(9, 4, mode="mean", padding_idx=3), "ids"),
    "EmbeddingBag max": E(lambda: nn.EmbeddingBag(9, 4, mode="max"), "ids"),
    # distances and images
    "CosineSimilarity": E(lambda: Call(lambda m, x: m.inner(x[:, :2], x[:, 2:]), inner=nn.CosineSimilarity()), "line"),
    "PairwiseDistance": E(lambda: Call(lambda m, x: m.inner(x[:, 0], x[:, 1]), inner=nn.PairwiseDistance()), "line"),
    "PixelShuffle": E(lambda: nn.PixelShuffle(2), "image"),
    "PixelUnshuffle": E(lambda: nn.PixelUnshuffle(2), "image"),
    "ChannelShuffle": E(lambda: nn.ChannelShuffle(2), "image"),
    "Upsample": E(lambda: nn.Upsample(scale_factor=2), "line"),
    "Upsample bicubic": E(lambda: nn.Upsample(scale_factor=2, mode="bicubic", align_corners=True), "image"),
    "Upsample trilinear": E(lambda: nn.Upsample(scale_factor=2, mode="trilinear"), "volume"),
    "UpsamplingNearest2d": E(lambda: nn.UpsamplingNearest2d(scale_factor=2), "image"),
    "UpsamplingBilinear2d": E(lambda: nn.UpsamplingBilinear2d(scale_factor=2), "image"),
    # containers
    "Sequential": E(lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU())),
    "ModuleList": E(lambda: Call(lambda m, x: sum(f(x) for f in m.inner), inner=nn.ModuleList([nn.Linear(6, 5)] * 2))),
    "ModuleDict": E(lambda: Call(lambda m, x: m.inner["a"](x), inner=nn.ModuleDict({"a": nn.Linear(6, 5)}))),
    "ParameterList": E(
        lambda: Call(lambda m, x: x * m.inner[0] + m.inner[1], inner=nn.ParameterList([torch.ones(6), torch.zeros(6)]))
    ),
    "ParameterDict": E(lambda: Call(lambda m, x: x * m.inner["a"], inner=nn.ParameterDict({"a": torch.ones(6)}))),
}

DROPOUT = {
    "Dropout": E(lambda: nn.Dropout(0.3)),
    "Dropout1d": E(lambda: nn.Dropout1d(0.3), "line"),
    "Dropout2d": E(lambda: nn.Dropout2d(0.3), "image"),
    "Dropout3d": E(lambda: nn.Dropout3d(0.3), "volume"),
    "AlphaDropout": E(lambda: nn.AlphaDropout(0.3)),
    "FeatureAlphaDropout": E(lambda: nn.FeatureAlphaDropout(0.3), "image"),
}

# losses have no place in a network; lazy layers become those above when they are first called
NOT_LAYERS = {"Module", "Container", "DataParallel", "NLLLoss2d", "RNNBase", "RNNCellBase"} | {
    n for n in dir(nn) if n.endswith("Loss") or n[:4] == "Lazy"
}


class OwnState(nn.Module):
    """Statistics of its own in a buffer that it writes to, or assigns."""

    def __init__(self, assigned: bool):
        super().__init__()
        self.assigned = assigned
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        if not self.training:
            return x - self.mean
        now = x.detach().mean(0)
        if self.assigned:
            self.mean = 0.9 * self.mean + 0.1 * now
            self.calls = self.calls + 1
        else:
            self.mean.mul_(0.9).add_(0.1 * now)
            self.calls += 1
        return x - now


class Straight(torch.autograd.Function):
    """Rounds, and passes the gradient through: a gradient that no rule of torch knows."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return (x * 4).round() / 4

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 0.5


class Opaque(torch.autograd.Function):
    """The same in the older style, which torch.func does not take."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * 2 * x


class Tied(nn.Module):
    """One tensor in two layers."""

    def __init__(self):
        super().__init__()
        self.table, self.out = nn.Embedding(9, 4, padding_idx=0), nn.Linear(4, 9, bias=False)
        self.out.weight = self.table.weight

    def forward(self, i):
        return self.out(self.table(i))


class UsedTwice(nn.Module):
    """One layer under two names, with a batch normalization."""

    def __init__(self):
        super().__init__()
        block = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh())
        self.a = self.b = block

    def forward(self, x):
        return self.b(self.a(x))


class Normed(nn.Conv2d):
    """Weight standardization: a convolution that computes its kernel."""

    def forward(self, x):
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, self.bias, padding=1)


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.where = nn.Parameter(torch.randn(1, 4, 6))
        self.register_buffer("scale", torch.full((6,), 1.5), persistent=False)
        self.heat = nn.Parameter(torch.tensor(0.7))  # a scalar

    def forward(self, x):
        return (x + self.where) * self.scale / self.heat


class HandAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(6, 18)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        scores = torch.einsum("bic,bjc->bij", q, k) / math.sqrt(6)
        return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v


class Training(nn.Module):
    """Does in training what it does not do in evaluation."""

    def forward(self, x):
        return x * x.sigmoid() if self.training else x * (x > 0).to(x.dtype)


def with_hooks():
    layer = nn.Linear(6, 5)
    layer.register_forward_pre_hook(lambda m, i: (i[0] * 2,))
    layer.register_forward_hook(lambda m, i, o: o + m.bias)
    return layer


def keeping():
    """Keeps what it computes in an attribute."""

    def run(m, x):
        m.kept = m.inner(x).tanh()
        return m.kept * 2

    return Call(run, inner=nn.Linear(6, 5))


def in_place(m, x):
    y = m.inner(x).mul_(2.0).add_(1.0)
    y[:, 0] = 0.5
    y[:, 1:3] *= 2
    return y


def no_gradient(m, x):
    with torch.no_grad():
        scale = m.inner.weight.norm()
    return m.inner(x) / scale + m.inner(x).detach()


def indexed(m, x):
    out = x.new_zeros(len(x), 9)
    return out.index_put((torch.arange(len(x)).unsqueeze(1), torch.tensor([0, 2, 4, 6, 8, 0])), x, accumulate=True)


def square(m, x):
    return torch.eye(4).to(x) * 5 + m.inner(x)[:, :, :4]


L = lambda: nn.Linear(6, 6)  # noqa: E731

MODULES: dict[str, Entry] = {
    "own statistics written to": E(lambda: OwnState(False)),
    "own statistics assigned": E(lambda: OwnState(True)),
    "gradient by hand": E(lambda: Call(lambda m, x: Straight.apply(m.inner(x)), inner=L())),
    "gradient by hand, older style": E(lambda: Call(lambda m, x: Opaque.apply(m.inner(x)), inner=L())),
    "checkpointed": E(lambda: Call(lambda m, x: checkpoint(m.inner, x, use_reentrant=False), inner=L())),
    "checkpointed, reentrant": E(lambda: Call(lambda m, x: checkpoint(m.inner, x, use_reentrant=True), inner=L())),
    "tied tensors": E(Tied, "ids"),
    "one module, two names": E(UsedTwice),
    "one module in a list twice": E(lambda: nn.Sequential(*[nn.Sequential(L(), nn.LayerNorm(6))] * 2)),
    "one weight used twice": E(lambda: Call(lambda m, x: F.linear(m.inner(x), m.inner.weight.mT), inner=L())),
    "computed kernel": E(lambda: Normed(4, 5, 3), "image"),
    "positions and a scalar": E(Positions, "sequence"),
    "attention by hand": E(HandAttention, "sequence"),
    "fused attention": E(
        lambda: Call(lambda m, x: F.scaled_dot_product_attention(m.q(x), m.k(x), x, is_causal=True), q=L(), k=L()),
        "sequence",
    ),
    "other in training": E(Training),
    "hooks": E(with_hooks),
    "keeping activations": E(keeping),
    "in place": E(lambda: Call(in_place, inner=L())),
    "no gradient, detached": E(lambda: Call(no_gradient, inner=L())),
    "weight norm": E(lambda: parametrizations.weight_norm(L())),
    "spectral norm": E(lambda: parametrizations.spectral_norm(L())),
    "orthogonal": E(lambda: parametrizations.orthogonal(L())),
    "residual": E(lambda: Call(lambda m, x: x + m.inner(x).relu(), inner=L())),
    "dense": E(
        lambda: Call(lambda m, x: torch.cat([x, m.inner(x).relu()], 1), inner=nn.Conv2d(4, 3, 3, padding=1)), "image"
    ),
    "squeeze and excite": E(
        lambda: Call(lambda m, x: x * m.inner(x.mean((2, 3))).sigmoid()[..., None, None], inner=nn.Linear(4, 4)),
        "image",
    ),
    "fourier": E(lambda: Call(lambda m, x: torch.fft.rfft(m.inner(x)).abs(), inner=L())),
    "complex": E(lambda: Call(lambda m, x: torch.view_as_complex(m.inner(x).unflatten(-1, (3, 2))) * 1j, inner=L())),
    "group norm after a linear layer": E(lambda: nn.Sequential(L(), nn.GroupNorm(3, 6))),
    "sorted": E(lambda: Call(lambda m, x: m.inner(x).sort(-1).values, inner=L())),
    "largest": E(lambda: Call(lambda m, x: m.inner(x).topk(3, -1).values, inner=L())),
    "summed up": E(lambda: Call(lambda m, x: m.inner(x).cumsum(-1), inner=L())),
    "scattered": E(lambda: Call(lambda m, x: indexed(m, m.inner(x)), inner=L())),
    "einsum": E(lambda: Call(lambda m, x: torch.einsum("bi,oi,bi->bo", x, m.inner.weight, x), inner=L())),
    "where": E(lambda: Call(lambda m, x: torch.where(x > 0, m.inner(x), x.square()), inner=L())),
    "gathered": E(lambda: Call(lambda m, x: m.inner(x).gather(1, x.argsort(1)), inner=L())),
    "loop over time": E(
        lambda: Call(lambda m, x: torch.stack([m.inner(t) for t in x.unbind(1)], 1), inner=L()), "sequence"
    ),
    "flipped and rolled": E(lambda: Call(lambda m, x: m.inner(x).flip(-1).roll(2, -1), inner=L())),
    "windows": E(lambda: Call(lambda m, x: m.inner(x).unfold(-1, 3, 1), inner=nn.Linear(8, 8)), "line"),
    "strided": E(lambda: Call(lambda m, x: m.inner(x).as_strided((len(x), 3), (6, 2)), inner=L())),
    "logsumexp": E(lambda: Call(lambda m, x: torch.logsumexp(m.inner(x), -1, keepdim=True), inner=L())),
    "determinant": E(lambda: Call(lambda m, x: torch.linalg.slogdet(square(m, x))[1][:, None], inner=L()), "sequence"),
    "inverse": E(lambda: Call(lambda m, x: torch.linalg.inv(square(m, x)), inner=L()), "sequence"),
    "grid sample": E(
        lambda: Call(
            lambda m, x: F.grid_sample(x, (m.inner(x.mean((2, 3))).tanh()).view(-1, 2, 2, 2), align_corners=False),
            inner=nn.Linear(4, 8),
        ),
        "image",
    ),
    "script function": E(lambda: Call(lambda m, x: scripted(m.inner(x)), inner=L())),
    "hypernetwork": E(
        lambda: Call(
            lambda m, x: torch.bmm(m.inner(x).view(-1, 4, 6), x.unsqueeze(-1)).squeeze(-1), inner=nn.Linear(6, 24)
        )
    ),
    "embedding sum with mask": E(
        lambda: Call(
            lambda m, i: (m.inner(i) * (i != 0).unsqueeze(-1)).sum(1) / (i != 0).sum(1, keepdim=True).clamp_min(1),
            inner=nn.Embedding(9, 4, padding_idx=0),
        ),
        "ids",
    ),
    "embedding by F.embedding": E(
        lambda: Call(lambda m, i: F.embedding(i, m.w, padding_idx=1), w=nn.Parameter(torch.randn(9, 4))), "ids"
    ),
    "one-hot": E(
        lambda: Call(lambda m, i: m.inner(F.one_hot(i, 9).to(m.inner.weight.dtype)), inner=nn.Linear(9, 4)), "ids"
    ),
    "frozen half": E(lambda: nn.Sequential(nn.Linear(6, 6).requires_grad_(False), nn.BatchNorm1d(6), L())),
    "frozen batch normalization": E(lambda: nn.Sequential(L(), nn.BatchNorm1d(6).requires_grad_(False))),
}


def scripted(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


ZOO = {**LAYERS, **MODULES}


def network(name: str, seed: int = 0, dropout: float = 0.0, dtype: torch.dtype = torch.float64):
    """The network with this layer, its weights by the seed, and inputs for it, the same for every seed.

    In float64, so that what is compared agrees to ten digits or is wrong.
    """
    with torch.random.fork_rng(devices=[]):
        entry = {**ZOO, **DROPOUT}[name]
        torch.manual_seed(1)
        x = INPUTS[entry.like]()
        torch.manual_seed(100 + seed)
        net = Network(entry.make(), x, dropout).to(dtype)
        return net, x.to(dtype) if x.is_floating_point() else x


if __name__ == "__main__":
    for number, (name, entry) in enumerate({**ZOO, **DROPOUT}.items(), start=1):
        print(f"{number:4}  {name}" + (f"  (refused: {entry.refused})" if entry.refused else ""))
