"""Networks of table rows: a dense network, FT-Transformer and TabM."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from workloads import mlp

from vbdl import Categorical

from . import Network, numbers


class FTBlock(nn.Module):
    """The block of FT-Transformer: attention of the features to each other, then a ReGLU network."""

    def __init__(self, width: int, n_heads: int, hidden: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, n_heads, dropout=0.2, batch_first=True)
        self.up, self.down = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        normal = self.norm1(x)
        x = x + self.attention(normal, normal, normal, need_weights=False)[0]
        a, b = self.up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.down(self.drop(a * F.relu(b)))


class FTTransformer(nn.Module):
    """FT-Transformer for numbers, its default size (Gorishniy et al. 2021, https://arxiv.org/abs/2106.11959)."""

    def __init__(self, n_features: int = 30, n_classes: int = 2, width: int = 192, depth: int = 3):
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.randn(n_features, width) * 0.1) for _ in range(2))
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.1)
        self.blocks = nn.Sequential(*(FTBlock(width, 8, 256) for _ in range(depth)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, n_classes))

    def forward(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(-1) * self.weight + self.bias
        x = self.blocks(torch.cat([self.token.expand(len(x), -1, -1), x], dim=1))
        return self.head(x[:, 0])


class BatchEnsembleLinear(nn.Module):
    """A linear layer that k networks share, each with its own scales of inputs and outputs and its own bias."""

    def __init__(self, k: int, n_in: int, n_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_out, n_in) / n_in**0.5)
        self.r, self.s = nn.Parameter(torch.randn(k, n_in).sign()), nn.Parameter(torch.randn(k, n_out).sign())
        self.bias = nn.Parameter(torch.zeros(k, n_out))

    def forward(self, x: Tensor) -> Tensor:  # (batch, k, features)
        return F.linear(x * self.r, self.weight) * self.s + self.bias


class TabM(nn.Module):
    """TabM: 32 dense networks with shared weights (Gorishniy et al. 2024, https://arxiv.org/abs/2410.24210)."""

    def __init__(self, n_features: int = 30, n_classes: int = 2, width: int = 256, k: int = 32, p: float = 0.1):
        super().__init__()
        self.k = k
        sizes = ((n_features, width), (width, width), (width, width))
        self.layers = nn.ModuleList([BatchEnsembleLinear(k, *size) for size in sizes])
        self.drop = nn.Dropout(p)
        self.head = nn.Parameter(torch.randn(k, width, n_classes) / width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(1).expand(-1, self.k, -1)
        for layer in self.layers:
            x = self.drop(F.relu(layer(x)))
        return torch.einsum("bki,kio->bko", x, self.head).mean(1)


NETWORKS = [
    Network(
        "mlp",
        "dense 64-256-256-10",
        lambda: mlp(64, 256, 256, 10, p=0.1),
        numbers(64),
        Categorical,
        ("ensemble", "dropout", "mean-field"),
    ),
    Network(
        "ft-transformer",
        "FT-Transformer, 30 features",
        FTTransformer,
        numbers(30),
        Categorical,
        ("ensemble", "dropout", "mean-field"),
    ),
    Network("tabm", "TabM, 30 features, k 32", TabM, numbers(30), Categorical, ("ensemble", "dropout")),
]
