"""Networks of time series and graphs: GRU, LSTM, TCN and GCN."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vbdl import Categorical, Gaussian

from . import Network, numbers


class Recurrent(nn.Module):
    """Two recurrent layers of width 64 with dropout between them, and a forecast from the last state."""

    def __init__(self, kind: type[nn.GRU] | type[nn.LSTM], n_features: int = 8, width: int = 64, p: float = 0.2):
        super().__init__()
        self.layers = kind(n_features, width, 2, batch_first=True, dropout=p)
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x)[0][:, -1])


class TCNBlock(nn.Module):
    """Two dilated causal convolutions with dropout, and a way around them."""

    def __init__(self, n_in: int, n_out: int, dilation: int, p: float):
        super().__init__()
        self.past = 2 * dilation
        self.conv1 = nn.Conv1d(n_in, n_out, 3, dilation=dilation)
        self.conv2 = nn.Conv1d(n_out, n_out, 3, dilation=dilation)
        self.drop1, self.drop2 = nn.Dropout(p), nn.Dropout(p)
        self.around = nn.Identity() if n_in == n_out else nn.Conv1d(n_in, n_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        inside = self.drop1(F.relu(self.conv1(F.pad(x, (self.past, 0)))))
        inside = self.drop2(F.relu(self.conv2(F.pad(inside, (self.past, 0)))))
        return F.relu(inside + self.around(x))


class TCN(nn.Module):
    """A temporal convolutional network of four scales (Bai et al. 2018, https://arxiv.org/abs/1803.01271)."""

    def __init__(self, n_features: int = 8, width: int = 64, p: float = 0.2):
        super().__init__()
        self.blocks = nn.Sequential(*(TCNBlock(n_features if i == 0 else width, width, 2**i, p) for i in range(4)))
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:  # (batch, time, features)
        return self.head(self.blocks(x.transpose(1, 2))[..., -1])


class GCN(nn.Module):
    """Two graph convolutions of one known graph (Kipf and Welling 2017, https://arxiv.org/abs/1609.02907).

    A row is the features of all nodes at one time, as in forecasts of traffic; messages are gathered and added along
    the edges, as torch_geometric does.
    """

    source: Tensor
    target: Tensor
    norm: Tensor

    def __init__(self, n_nodes: int = 200, n_edges: int = 1200, n_features: int = 16, width: int = 64, p: float = 0.5):
        super().__init__()
        random = torch.Generator().manual_seed(0)
        edges = torch.randint(0, n_nodes, (2, n_edges), generator=random)
        source, target = torch.cat([edges, torch.arange(n_nodes).expand(2, -1)], dim=1)  # a loop at each node
        degree = torch.bincount(target, minlength=n_nodes).float()
        self.register_buffer("source", source)
        self.register_buffer("target", target)
        self.register_buffer("norm", (degree[source] * degree[target]).rsqrt())
        self.first, self.second = nn.Linear(n_features, width), nn.Linear(width, 7)
        self.drop = nn.Dropout(p)

    def spread(self, x: Tensor) -> Tensor:
        """The normalized sum over the neighbours of each node, (batch, nodes, features)."""
        messages = x[:, self.source] * self.norm.unsqueeze(-1)
        return torch.zeros_like(x).index_add(1, self.target, messages)

    def forward(self, x: Tensor) -> Tensor:
        return self.spread(self.second(self.drop(F.relu(self.spread(self.first(x))))))


_BOTH = ("ensemble", "dropout")

NETWORKS = [
    Network("gru", "GRU 2 x 64, 48 steps", lambda: Recurrent(nn.GRU), numbers(48, 8), Gaussian, _BOTH),
    Network("lstm", "LSTM 2 x 64, 48 steps", lambda: Recurrent(nn.LSTM), numbers(48, 8), Gaussian, _BOTH),
    Network("tcn", "TCN 4 x 64, 48 steps", TCN, numbers(48, 8), Gaussian, _BOTH),
    Network("gcn", "GCN, 200 nodes, 1200 edges", GCN, numbers(200, 16), Categorical, _BOTH),
]
