"""Networks as people write them by hand, one for each way to be unusual."""

import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint
from zoo_case import Case, ids, numbers

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from benchmarks.zoo import drawing, images, series, tables  # noqa: E402

INITIALIZED = ("dropout", "mean-field", "ensemble")  # parameters of its own, and no reset_parameters() for them


def dense(n_in: int, n_out: int, width: int = 8, p: float = 0.2) -> nn.Sequential:
    """Two linear layers with dropout between them."""
    return nn.Sequential(nn.Linear(n_in, width), nn.ReLU(), nn.Dropout(p), nn.Linear(width, n_out))


class PackedLSTM(nn.Module):
    """An LSTM over rows of several lengths, packed."""

    def __init__(self):
        super().__init__()
        self.layers, self.head = nn.LSTM(3, 8, 2, batch_first=True, dropout=0.2), nn.Linear(8, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        out, lengths = pad_packed_sequence(self.layers(packed)[0], batch_first=True, total_length=x.shape[1])
        return self.head(out[torch.arange(len(x)), lengths - 1])


class SparseMoE(nn.Module):
    """A mixture of experts that computes each expert for the rows sent to it."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(6, 3), nn.ModuleList([dense(6, 3) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = self.gate(x).softmax(-1).max(-1)
        out = x.new_zeros(len(x), 3)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero().squeeze(-1)
            if len(rows):
                out = out.index_add(0, rows, expert(x[rows]))
        return out * weight.unsqueeze(-1)


class Graph(nn.Module):
    """Two convolutions of torch_geometric over one known graph; a row is the features of its nodes.

    The graphs of a batch are one graph whose parts are not connected, as torch_geometric batches them.
    """

    edges: Tensor

    def __init__(self, kind: str):
        super().__init__()
        import torch_geometric.nn as layers

        convolution = getattr(layers, kind)
        self.first, self.second, self.drop = convolution(4, 8), convolution(8, 3), nn.Dropout(0.5)
        self.register_buffer("edges", torch.randint(0, 10, (2, 30), generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        batch, nodes, _ = x.shape
        starts = nodes * torch.arange(batch, device=x.device).reshape(-1, 1, 1)
        edges = (self.edges + starts).transpose(0, 1).reshape(2, -1)
        inner = self.first(x.flatten(0, 1), edges).relu().unflatten(0, (batch, nodes))
        return self.second(self.drop(inner).flatten(0, 1), edges).unflatten(0, (batch, nodes))


class PINN(nn.Module):
    """The solution of a differential equation and its residual, by autograd in forward."""

    def __init__(self):
        super().__init__()
        self.u = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            at = x.detach().requires_grad_()
            u = self.u(at)
            (slope,) = torch.autograd.grad(u.sum(), at, create_graph=True)
        return torch.cat([u, slope + u], dim=-1)


class FNO(nn.Module):
    """A Fourier neural operator on a line, with complex weights (Li et al. 2021, https://arxiv.org/abs/2010.08895)."""

    def __init__(self, width: int = 6, modes: int = 4):
        super().__init__()
        self.up, self.around, self.down = nn.Linear(1, width), nn.Conv1d(width, width, 1), nn.Linear(width, 1)
        self.spectral = nn.Parameter(torch.randn(width, width, modes, dtype=torch.cfloat) / width)
        self.drop, self.modes = nn.Dropout(0.1), modes

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.spectral.normal_().div_(len(self.spectral))

    def forward(self, x: Tensor) -> Tensor:  # (batch, places, 1)
        x = self.up(x).transpose(1, 2)
        low = torch.einsum("bim,iom->bom", torch.fft.rfft(x)[..., : self.modes], self.spectral)
        x = F.gelu(torch.fft.irfft(low, n=x.shape[-1]) + self.around(x))
        return self.down(self.drop(x.transpose(1, 2)))


class DeepSets(nn.Module):
    """A function of a set, with a mask of the elements that are there."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = dense(3, 8), dense(8, 3)

    def forward(self, x: Tensor, there: Tensor) -> Tensor:
        return self.outer((self.inner(x) * there.unsqueeze(-1)).sum(1))


class Sine(nn.Module):
    """The activation of SIREN."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(30 * x)


class NeuralODE(nn.Module):
    """A differential equation solved by Runge-Kutta with a fixed step."""

    def __init__(self, steps: int = 4):
        super().__init__()
        self.slope, self.head, self.steps = dense(5, 5), nn.Linear(5, 3), steps

    def forward(self, x: Tensor) -> Tensor:
        h = 1 / self.steps
        for _ in range(self.steps):
            a = self.slope(x)
            b = self.slope(x + h / 2 * a)
            x = x + h * b
        return self.head(x)


class Mixer(nn.Module):
    """One block of MLP-Mixer over patches."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.places, self.channels, self.norm, self.head = dense(16, 16), dense(8, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2)
        x = (x + self.places(x)).transpose(1, 2)
        return self.head(self.norm(x + self.channels(x)).mean(1))


class KAN(nn.Module):
    """Sums of learned functions of each input, by radial basis functions."""

    centers: Tensor

    def __init__(self, n_in: int = 4, n_out: int = 3, n_basis: int = 5):
        super().__init__()
        self.register_buffer("centers", torch.linspace(-2, 2, n_basis))
        self.weight, self.drop = nn.Parameter(torch.randn(n_out, n_in, n_basis) * 0.1), nn.Dropout(0.1)

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.weight.normal_().mul_(0.1)

    def forward(self, x: Tensor) -> Tensor:
        basis = torch.exp(-((x.unsqueeze(-1) - self.centers) ** 2))
        return torch.einsum("bik,oik->bo", self.drop(basis), self.weight)


class Bag(nn.Module):
    """The mean of the embeddings of a row's ids."""

    def __init__(self):
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(20, 8), dense(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bag(x))


class Attention(nn.Module):
    """nn.MultiheadAttention with dropout and a mask of padding."""

    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, key_padding_mask=padding)[0].mean(1))


class Cells(nn.Module):
    """An LSTMCell called step by step."""

    def __init__(self):
        super().__init__()
        self.cell, self.drop, self.head = nn.LSTMCell(3, 8), nn.Dropout(0.1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(self.drop(state[0]))


class Checkpointed(nn.Module):
    """A block whose activations are computed again in the backward pass."""

    def __init__(self):
        super().__init__()
        self.first, self.second = dense(6, 6), dense(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(checkpoint(self.first, x, use_reentrant=False))


class OnValues(nn.Module):
    """Another branch where the batch says so."""

    def __init__(self):
        super().__init__()
        self.one, self.other = dense(6, 3), dense(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) if bool(x.isfinite().all()) else self.other(x.nan_to_num())


def siren() -> nn.Module:
    first = nn.Linear(2, 16)
    nn.init.uniform_(first.weight, -math.sqrt(6 / 2) / 30, math.sqrt(6 / 2) / 30)
    return nn.Sequential(first, Sine(), nn.Dropout(0.05), nn.Linear(16, 1))


def normalized(momentum: float | None) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8, momentum=momentum),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(288, 3),
    )


def parametrized(function) -> nn.Module:
    return nn.Sequential(function(nn.Linear(6, 8)), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))


def _torchbnn() -> nn.Module:
    import torchbnn

    layer = lambda n_in, n_out: torchbnn.BayesLinear(0, 0.1, n_in, n_out)
    return nn.Sequential(layer(64, 16), nn.ReLU(), layer(16, 10))


_STOCHASTIC = ("stochastic",)
_series = numbers(6, 8)

CASES = {
    "FT-Transformer": Case(lambda: tables.FTTransformer(5, 3, 16, 1), numbers(5), methods=INITIALIZED),
    "TabM": Case(lambda: tables.TabM(5, 3, 8, 4), numbers(5), methods=INITIALIZED),
    "TCN": Case(lambda: series.TCN(8, 8), _series, "numbers"),
    "UNet": Case(lambda: images.UNet(4), numbers(3, 16, 16)),
    "GRU": Case(lambda: series.Recurrent(nn.GRU, 8, 8), _series, "numbers"),
    "LSTM": Case(lambda: series.Recurrent(nn.LSTM, 8, 8), _series, "numbers"),
    "GCN": Case(lambda: series.GCN(10, 30, 4, 8), numbers(10, 4)),
    "LSTM, packed": Case(PackedLSTM, lambda rows: (torch.randn(rows, 5, 3), torch.arange(rows) % 5 + 1)),
    "sparse MoE": Case(SparseMoE, numbers(6)),
    "PyG GCN": Case(lambda: Graph("GCNConv"), numbers(10, 4), needs=("torch_geometric",)),
    "PyG GAT": Case(lambda: Graph("GATConv"), numbers(10, 4), needs=("torch_geometric",)),
    "PINN": Case(PINN, numbers(1), "numbers"),
    "FNO": Case(FNO, numbers(16, 1), "numbers"),
    "DeepSets": Case(DeepSets, lambda rows: (torch.randn(rows, 5, 3), torch.rand(rows, 5) < 0.7)),
    "SIREN": Case(siren, numbers(2), "numbers"),
    "NeuralODE": Case(NeuralODE, numbers(5)),
    "MLP-Mixer": Case(Mixer, numbers(3, 16, 16)),
    "KAN": Case(KAN, numbers(4)),
    "EmbeddingBag": Case(Bag, ids(5, 20)),
    "MultiheadAttention": Case(Attention, lambda rows: (torch.randn(rows, 5, 8), torch.arange(5).expand(rows, 5) >= 4)),
    "LSTMCell": Case(Cells, numbers(5, 3)),
    "checkpoint": Case(Checkpointed, numbers(6)),
    "if on values": Case(OnValues, numbers(6)),
    "BatchNorm(momentum=None)": Case(lambda: normalized(None), numbers(3, 8, 8)),
    "DataParallel": Case(lambda: nn.DataParallel(dense(6, 3)), numbers(6)),
    "weight_norm": Case(lambda: parametrized(parametrizations.weight_norm), numbers(6)),
    "spectral_norm": Case(lambda: parametrized(parametrizations.spectral_norm), numbers(6)),
    "textbook layers": Case(drawing.textbook, numbers(64), methods=_STOCHASTIC),
    "bayesian-torch": Case(drawing.bayesian_torch, numbers(64), needs=("bayesian_torch",), methods=_STOCHASTIC),
    "blitz": Case(drawing.blitz, numbers(64), needs=("blitz",), methods=_STOCHASTIC),
    "torchbnn": Case(_torchbnn, numbers(64), needs=("torchbnn",), methods=_STOCHASTIC),
}
