"""The workloads of `benchmarks/speed.py`: networks, and hand-written predictions of each without vbdl.

Weights are untrained: times do not depend on them, and draws of the same distribution are compared.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from vbdl import Categorical, DeepEnsemble, Gaussian, MCDropout, MeanField

Samples = Callable[[], Tensor]  # -> (samples, batch, outputs) outputs of the network, each draw's
STACK_BYTES = 2**29  # of activations that vmap makes at once: a competent user passes chunk_size


def mlp(*sizes: int, p: float | None = None) -> nn.Sequential:
    """A network of Linear and ReLU in turn, with dropout after each ReLU if p is given."""
    layers: list[nn.Module] = []
    for i, (n_in, n_out) in enumerate(zip(sizes, sizes[1:], strict=False)):
        layers.append(nn.Linear(n_in, n_out))
        if i < len(sizes) - 2:
            layers.append(nn.ReLU())
            if p is not None:
                layers.append(nn.Dropout(p))
    return nn.Sequential(*layers)


class Block(nn.Module):
    """A residual block of two convolutions, with dropout, if any, between the two."""

    def __init__(self, n_in: int, n_out: int, stride: int, p: float):
        super().__init__()
        self.a = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
        self.b = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False)
        self.norm_a, self.norm_b = nn.BatchNorm2d(n_out), nn.BatchNorm2d(n_out)
        self.dropout = nn.Dropout(p) if p > 0 else nn.Identity()
        self.around = nn.Identity() if n_in == n_out else nn.Conv2d(n_in, n_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inside = self.dropout(self.norm_a(self.a(x)).relu())
        return (self.norm_b(self.b(inside)) + self.around(x)).relu()


class SmallResNet(nn.Module):
    """A residual network from 32x32x3 to 10 classes, 0.31 M parameters, with dropout in blocks or before the head."""

    def __init__(self, in_blocks: float = 0.0, at_head: float = 0.0):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.blocks = nn.Sequential(
            Block(32, 32, 1, in_blocks), Block(32, 64, 2, in_blocks), Block(64, 128, 2, in_blocks)
        )
        self.dropout = nn.Dropout(at_head) if at_head > 0 else nn.Identity()
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.blocks(self.stem(x)).mean((2, 3))))


@dataclass(frozen=True)
class Workload:
    """A workload, one row of the table. required: ratio to the tutorial loop by variant of vbdl and batch."""

    name: str
    title: str
    row: tuple[int, ...]  # shape of one input
    n_samples: int
    posterior: Callable[[], Any]
    required: dict[str, dict[int, float]]
    # (rows, variant) -> for each way to compute this distribution, operations and bytes that it cannot do without
    least: Callable[[int, str], list[tuple[float, float]]]
    activations: int  # numbers in the largest activation of one draw and row
    likelihood: Callable[[], Any] = field(default=Categorical)

    @property
    def method(self) -> type:
        return type(self.posterior())


# -- hand-written predictions: the tutorial loop, and vmap


class TutorialLinear(nn.Module):
    """The mean-field layer of most tutorials, which computes std and noise in every forward."""

    def __init__(self, mean: nn.Linear, weight_log_std: Tensor, bias_log_std: Tensor):
        super().__init__()
        self.weight_mean, self.bias_mean = mean.weight, mean.bias
        self.weight_log_std, self.bias_log_std = nn.Parameter(weight_log_std), nn.Parameter(bias_log_std)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight_mean + self.weight_log_std.exp() * torch.randn_like(self.weight_mean)
        bias = self.bias_mean + self.bias_log_std.exp() * torch.randn_like(self.bias_mean)
        return nn.functional.linear(x, weight, bias)


def networks(q: Any) -> list[nn.Module]:
    """The networks that are called in turn: the members of an ensemble, or one that draws in every call."""
    if isinstance(q, DeepEnsemble):
        drawing = []
        for m in range(q.n_members):
            network = q_network(q)
            network.load_state_dict(q.member(m))
            drawing.append(network.eval())
        return drawing
    network = copy.deepcopy(q.module.inner).eval()
    if isinstance(q, MCDropout):
        for m in network.modules():
            if isinstance(m, nn.Dropout):
                m.train()
        return [network]
    log_std = {name: s.detach().clone() for name, _, s in q.module.normals()}
    for name, m in list(network.named_children()):
        if isinstance(m, nn.Linear):
            setattr(network, name, TutorialLinear(m, log_std[f"{name}.weight"], log_std[f"{name}.bias"]))
    return [network]


def plain(q: Any) -> nn.Module:
    """The user's network, with the means as its weights."""
    return copy.deepcopy(q.module.inner).eval()


def q_network(q: DeepEnsemble) -> nn.Module:
    """A network of the members' architecture with separate tensors."""
    return copy.deepcopy(q.module).to_empty(device="cpu")


def tutorial(q: Any, x: Tensor, n_samples: int) -> Samples:
    """Predict by the tutorial loop: one eager forward pass per draw."""
    called = networks(q)
    return lambda: torch.stack([called[s % len(called)](x) for s in range(n_samples)])


def tutorial_kept_std(q: MeanField, x: Tensor, n_samples: int) -> Samples:
    """Predict by a loop that keeps the std and writes each draw in one operation."""
    network = copy.deepcopy(q.module.inner).eval()
    weights = dict(network.named_parameters())
    normals = {n: (mean.detach(), log_std.detach().exp()) for n, mean, log_std in q.module.normals()}

    def run() -> Tensor:
        outputs = []
        for _ in range(n_samples):
            for name, (mean, std) in normals.items():
                weights[name].copy_(torch.addcmul(mean, std, torch.randn_like(mean)))
            outputs.append(network(x))
        return torch.stack(outputs)

    return run


def tutorial_compiled(q: Any, x: Tensor, n_samples: int) -> Samples:
    """Predict by the tutorial loop with a compiled forward pass."""
    if isinstance(q, DeepEnsemble):
        # one graph for all members, which differ only in their tensors
        network, states = q_network(q).eval(), [q.member(m) for m in range(q.n_members)]
        one = torch.compile(lambda state, x: functional_call(network, state, (x,)), fullgraph=True, dynamic=False)
        return lambda: torch.stack([one(states[s], x) for s in range(n_samples)])
    called = torch.compile(networks(q)[0], fullgraph=True, dynamic=False)
    return lambda: torch.stack([called(x) for _ in range(n_samples)])


def mapped(q: Any, x: Tensor, n_samples: int, activations: int) -> Samples:
    """Predict by vmap of functional_call over draws."""
    chunk = max(1, min(n_samples, STACK_BYTES // (4 * activations * len(x))))
    if isinstance(q, MCDropout):
        network = networks(q)[0]
        state = {**dict(network.named_parameters()), **dict(network.named_buffers())}
        one = lambda draw, x: functional_call(network, state, (x,))
        draws = torch.arange(n_samples)
        return lambda: vmap(one, in_dims=(0, None), randomness="different", chunk_size=chunk)(draws, x)
    if isinstance(q, DeepEnsemble):
        network = q.module
        stacked = q.stacked()
        one = lambda state, x: functional_call(network, state, (x,))
        return lambda: vmap(one, in_dims=(0, None), chunk_size=chunk)(stacked, x)
    network = q.module.inner
    normals = {n: (mean.detach(), log_std.detach().exp()) for n, mean, log_std in q.module.normals()}
    one = lambda state, x: functional_call(network, state, (x,))

    def run() -> Tensor:
        state = {n: mean + std * torch.randn(n_samples, *mean.shape) for n, (mean, std) in normals.items()}
        return vmap(one, in_dims=(0, None), chunk_size=chunk)(state, x)

    return run


# -- the table of workloads


def _ensemble(n_members: int, *sizes: int) -> Callable[[], DeepEnsemble]:
    return lambda: DeepEnsemble(mlp(*sizes), n_members=n_members)


def _parameters(*sizes: int) -> int:
    return sum((n_in + 1) * n_out for n_in, n_out in zip(sizes, sizes[1:], strict=False))


def _width(variant: str) -> int:
    return 2 if "bfloat16" in variant else 4


def _least_dropout(width: int, hidden: int) -> Callable[[int, str], list[tuple[float, float]]]:
    """`hidden` layers of a width, half of each kept: only the kept weights, or all of them masked, read once."""

    def least(rows: int, variant: str) -> list[tuple[float, float]]:
        first, kept = 784 * width, width // 2
        draw = (hidden - 1) * kept**2 + kept * 10
        whole = (hidden - 1) * width**2 + width * 10
        thinned = 2.0 * rows * (first + 100 * draw), _width(variant) * (first + 100 * draw + rows * 784)
        masked = 2.0 * rows * (first + 100 * whole), _width(variant) * (first + whole + rows * 784)
        return [thinned, masked]

    return least


def _least_w3(rows: int, variant: str) -> list[tuple[float, float]]:
    drawn = 2.0 * rows * 100 * _parameters(784, 512, 512, 10), _width(variant) * 100 * _parameters(784, 512, 512, 10)
    if "joint" in variant:
        return [drawn]
    # two products a layer, the first one's shared by the draws; normals for each draw and output
    local = (
        4.0 * rows * (784 * 512 + 100 * (512 * 512 + 512 * 10)),
        _width(variant) * (2 * _parameters(784, 512, 512, 10) + 100 * 1034),
    )
    return [drawn, local]


def _least_ensemble(n_members: int, *sizes: int) -> Callable[[int, str], list[tuple[float, float]]]:
    count = n_members * _parameters(*sizes)
    return lambda rows, variant: [(2.0 * rows * count, _width(variant) * (count + rows * sizes[0]))]


def _least_w5(in_blocks: bool) -> Callable[[int, str], list[tuple[float, float]]]:
    stem, first, second = 32 * 27 * 1024, 32 * 32 * 9 * 1024, 32 * 32 * 9 * 1024
    rest = (32 * 64 * 9 + 64 * 64 * 9 + 32 * 64) * 256 + (64 * 128 * 9 + 128 * 128 * 9 + 64 * 128) * 64
    once, drawn = (stem + first, second + rest) if in_blocks else (stem + first + second + rest, 0)

    def least(rows: int, variant: str) -> list[tuple[float, float]]:
        # a draw of every block reads and writes its activations; of the head alone, nothing to speak of
        moved = rows * (3 * 1024 + (32 * 2 * (3 * 32768 + 3 * 16384 + 3 * 8192) if in_blocks else 3 * 32768))
        return [(2.0 * rows * (once + 32 * drawn + 32 * 1280), _width(variant) * (313_000 + moved))]

    return least


WORKLOADS = [
    Workload(
        "W1",
        "MC dropout 784-512-10, p 0.5, 100 draws",
        (784,),
        100,
        lambda: MCDropout(mlp(784, 512, 10, p=0.5)),
        {"float32": {1: 80, 32: 50, 256: 40}},
        _least_dropout(512, 1),
        512,
    ),
    Workload(
        "W2",
        "MC dropout 784-1024x3-10, p 0.5, 100 draws",
        (784,),
        100,
        lambda: MCDropout(mlp(784, 1024, 1024, 1024, 10, p=0.5)),
        {"float32": {1: 15, 32: 8, 256: 6}},
        _least_dropout(1024, 3),
        1024,
    ),
    Workload(
        "W3",
        "mean-field 784-512-512-10, 100 draws",
        (784,),
        100,
        lambda: MeanField(mlp(784, 512, 512, 10), n_data=60_000),
        {
            "float32": {1: 150, 32: 9, 256: 2.5},
            "bfloat16": {1: 150, 32: 15, 256: 4},
            "float32 joint": {1: 15, 32: 6, 256: 2},
            "bfloat16 joint": {1: 15, 32: 9, 256: 3.5},
        },
        _least_w3,
        784,
    ),
    Workload(
        "W4-tiny",
        "ensemble of 32, 8-50-1",
        (8,),
        32,
        _ensemble(32, 8, 50, 1),
        {"float32": {1: 40, 32: 15, 256: 1.5}},
        _least_ensemble(32, 8, 50, 1),
        50,
        Gaussian,
    ),
    *(
        Workload(
            f"W4-{n}",
            f"ensemble of {n}, 784-512-512-10",
            (784,),
            n,
            _ensemble(n, 784, 512, 512, 10),
            {"float32": {1: 1.6, 32: 1.1, 256: 1.1}, "bfloat16": {1: 1.8, 32: 1.7, 256: 1.8}},
            _least_ensemble(n, 784, 512, 512, 10),
            784,
        )
        for n in (5, 32)
    ),
    Workload(
        "W5-head",
        "CNN 32x32x3, 0.3 M parameters, dropout at the head, 32 draws",
        (3, 32, 32),
        32,
        lambda: MCDropout(SmallResNet(at_head=0.5)),
        {"float32": {1: 35, 32: 35, 256: 30}, "bfloat16": {1: 35, 32: 55, 256: 50}},
        _least_w5(in_blocks=False),
        128,
    ),
    Workload(
        "W5-blocks",
        "CNN 32x32x3, 0.3 M parameters, dropout in every block, 32 draws",
        (3, 32, 32),
        32,
        lambda: MCDropout(SmallResNet(in_blocks=0.2)),
        {"float32": {1: 4, 32: 1.6, 256: 1.6}, "bfloat16": {1: 6, 32: 3, 256: 3}},
        _least_w5(in_blocks=True),
        32768,
    ),
]
