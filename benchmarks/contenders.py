"""The contenders of `benchmarks/networks.py`: what a user would write for a network, and vbdl."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import workloads
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.modules.batchnorm import _BatchNorm
from zoo import Network

from vbdl import DeepEnsemble, Gaussian, MCDropout, MeanField, Predictor, Stochastic

REFERENCE_DRAWS = 64  # of the loop, where only statistics can be compared
CHECKED_ROWS = 4  # compared where draws differ
SAME = 1e-4  # largest difference of an ensemble's mean or spread, relative to the largest of the loop's
Z_BOUND = 3.0
MEAN_FIELD_STD = 0.02

Outputs = Callable[[], Tensor]  # -> (samples, batch, outputs), one forward pass a draw


class NotApplicable(Exception):
    """This contender cannot be written for this method."""


@dataclass
class Cell:
    """A network with a method at a batch size."""

    network: Network
    method: str  # "ensemble", "dropout", "mean-field" or "stochastic"
    rows: int

    def __post_init__(self):
        torch.manual_seed(1)
        self.x = self.network.inputs(self.rows)
        self.likelihood = self.network.likelihood().eval()
        self.n_draws = self.network.n_members if self.method == "ensemble" else self.network.n_draws

    def networks(self) -> list[nn.Module]:
        """Networks of random weights, the same at every call: the members of an ensemble, otherwise one."""
        built = []
        for seed in range(self.network.n_members if self.method == "ensemble" else 1):
            torch.manual_seed(seed)
            built.append(self.network.build().eval())
        return built

    def mean_field(self, networks: list[nn.Module]) -> MeanField:
        """The mean-field posterior whose means are the network's weights."""
        return MeanField(networks[0], n_data=1000, initial_std=MEAN_FIELD_STD).eval()

    def each(self, outputs: Tensor) -> Tensor:
        """What a draw says of each row: probabilities, or the mean of a regression."""
        return outputs if isinstance(self.likelihood, Gaussian) else outputs.softmax(-1)


class Contender:
    """A way to predict: `run` is timed, `look` returns mean and std over the draws."""

    def __init__(self, cell: Cell, outputs: Outputs):
        self.cell, self.outputs = cell, outputs

    def run(self) -> Any:
        return self.cell.each(self.outputs()).mean(0)

    def settle(self) -> None:
        """Wait for what is still being compiled."""

    def look(self) -> tuple[Tensor, Tensor]:
        each = self.cell.each(self.outputs())
        return each.mean(0), each.std(0)

    def explain(self) -> str:
        return ""


class Vbdl(Contender):
    """A predictor."""

    def __init__(self, cell: Cell, networks: list[nn.Module], **settings: Any):
        self.cell = cell
        posterior = {
            "ensemble": lambda: DeepEnsemble(networks),
            "dropout": lambda: MCDropout(networks[0]),
            "mean-field": lambda: cell.mean_field(networks),
            "stochastic": lambda: Stochastic(networks[0]),
        }[cell.method]()
        networks.clear()  # as a user's function that returns the predictor
        self.predict = Predictor(posterior, cell.likelihood, cell.n_draws, **settings)

    def run(self) -> Any:
        return self.predict(self.cell.x)

    def settle(self) -> None:
        self.predict.warm_up((self.cell.rows,), example=self.cell.x)

    def look(self) -> tuple[Tensor, Tensor]:
        p = self.run()
        return p.mean, p.standard_error * self.cell.n_draws**0.5

    def explain(self) -> str:
        return self.predict.explain()


def loop(cell: Cell, networks: list[nn.Module]) -> Contender:
    """One eager forward pass a draw, as tutorials write it."""
    x, n = cell.x, cell.n_draws
    if cell.method == "mean-field":
        return Contender(cell, workloads.tutorial_kept_std(cell.mean_field(networks), x, n))
    if cell.method == "ensemble":
        return Contender(cell, lambda: torch.stack([network(x) for network in networks]))
    network = drawing(cell, networks)
    return Contender(cell, lambda: torch.stack([network(x) for _ in range(n)]))


def loop_compiled(cell: Cell, networks: list[nn.Module]) -> Contender:
    """The same loop, the forward pass compiled: one graph for all draws."""
    x, n = cell.x, cell.n_draws
    if cell.method in ("ensemble", "mean-field"):
        network = networks[0]
        one = torch.compile(lambda state, x: functional_call(network, state, (x,)), dynamic=False)
        if cell.method == "ensemble":
            states = [{**dict(m.named_parameters()), **dict(m.named_buffers())} for m in networks]
            return Contender(cell, lambda: torch.stack([one(state, x) for state in states]))
        normals = _normals(cell, networks)
        draw = lambda: {name: torch.addcmul(mean, std, torch.randn_like(mean)) for name, (mean, std) in normals.items()}
        return Contender(cell, lambda: torch.stack([one(draw(), x) for _ in range(n)]))
    called = torch.compile(drawing(cell, networks), dynamic=False)
    return Contender(cell, lambda: torch.stack([called(x) for _ in range(n)]))


def along_the_batch(cell: Cell, networks: list[nn.Module]) -> Contender:
    """Every row repeated for each draw, one forward pass: dropout draws a mask a row."""
    if cell.method != "dropout":
        raise NotApplicable("only dropout draws for each row")
    network, x, n = drawing(cell, networks), cell.x, cell.n_draws
    return Contender(cell, lambda: network(x.repeat(n, *[1] * (x.ndim - 1))).unflatten(0, (n, len(x))))


def mapped(cell: Cell, networks: list[nn.Module]) -> Contender:
    """vmap of functional_call, over stacked members or over draws."""
    x, n = cell.x, cell.n_draws
    if cell.method == "ensemble":
        network = copy.deepcopy(networks[0]).to("meta")
        parameters, buffers = stack_module_state(networks)
        networks.clear()
        state = {**{name: t.detach() for name, t in parameters.items()}, **buffers}
        one = lambda state, x: functional_call(network, state, (x,))
        return Contender(cell, lambda: vmap(one, in_dims=(0, None))(state, x))
    if cell.method == "mean-field":
        network, normals = networks[0], _normals(cell, networks)
        one = lambda state, x: functional_call(network, state, (x,))
        draw = lambda: {name: mean + std * torch.randn(n, *mean.shape) for name, (mean, std) in normals.items()}
        return Contender(cell, lambda: vmap(one, in_dims=(0, None))(draw(), x))
    network = drawing(cell, networks)
    one = lambda draw, x: network(x)
    return Contender(cell, lambda: vmap(one, in_dims=(0, None), randomness="different")(torch.arange(n), x))


CONTENDERS: dict[str, Callable[[Cell, list[nn.Module]], Contender]] = {
    "loop": loop,
    "loop-compiled": loop_compiled,
    "batch": along_the_batch,
    "vmap": mapped,
    "vbdl": Vbdl,
    "vbdl-tuned": lambda cell, networks: Vbdl(cell, networks, tiles=(cell.rows,)),
    "vbdl-uncompiled": lambda cell, networks: Vbdl(cell, networks, compile=False),
}
COMPILED = ("loop-compiled", "vbdl", "vbdl-tuned")


def drawing(cell: Cell, networks: list[nn.Module]) -> nn.Module:
    """The network with dropout on and normalization off, as tutorials on MC dropout set it."""
    if cell.method == "dropout":
        for m in networks[0].modules():
            m.training = not isinstance(m, _BatchNorm)
    return networks[0]


def _normals(cell: Cell, networks: list[nn.Module]) -> dict[str, tuple[Tensor, Tensor]]:
    """The mean and std of each weight."""
    normals = cell.mean_field(networks).module.normals()
    return {name: (mean.detach(), log_std.detach().exp()) for name, mean, log_std in normals}


def agreement(cell: Cell, contender: Contender, reference: tuple[Tensor, Tensor]) -> str:
    """How the contender was compared and how near it came. Raises RuntimeError where it says something else.

    reference: mean and std over the members of an ensemble, or over REFERENCE_DRAWS of the loop for CHECKED_ROWS.
    """
    mean, spread = (t.reshape(-1, *t.shape[1:])[: len(reference[0])] for t in contender.look())
    expected, expected_spread = reference
    if mean.shape != expected.shape:
        raise RuntimeError(f"its answer has shape {tuple(mean.shape)}, the loop's {tuple(expected.shape)}")
    if not bool(mean.isfinite().all()):
        raise RuntimeError("its answer is not finite")
    if cell.method == "ensemble":
        far = max(float((a - b).abs().max() / b.abs().max()) for a, b in ((mean, expected), (spread, expected_spread)))
        if far > SAME:
            raise RuntimeError(f"mean and spread of the members differ by {far:.1e}, allowed {SAME:.0e}")
        return f"same members, {far:.0e}"
    shares = 1 / cell.n_draws + 1 / REFERENCE_DRAWS
    error = expected_spread.clamp_min(1e-6) * shares**0.5
    z = float(((mean - expected) / error).square().mean().sqrt())
    off = float((spread / expected_spread.clamp_min(1e-9)).log().median().exp()) - 1
    if z > Z_BOUND or abs(off) > 3 * (shares / 2) ** 0.5:
        raise RuntimeError(f"statistics differ: z {z:.1f}, spread of the draws off by {off:.0%}")
    return f"statistics, z {z:.1f}, spread {off:+.0%}"


def reference(cell: Cell) -> tuple[Tensor, Tensor]:
    """Mean and std over draws of the loop, with which all contenders are compared."""
    if cell.method == "ensemble":
        return loop(cell, cell.networks()).look()
    few = Cell(cell.network, cell.method, cell.rows)
    few.x, few.n_draws = cell.x[:CHECKED_ROWS], REFERENCE_DRAWS
    return loop(few, few.networks()).look()
