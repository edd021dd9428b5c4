"""BatchEnsemble: members share each weight matrix and differ in a factor on every input and output of a layer.

Wen, Tran and Ba, BatchEnsemble: An Alternative Approach to Efficient Ensemble and Lifelong Learning, ICLR 2020,
https://arxiv.org/abs/2002.06715; with initial="tabm" Gorishniy, Kotelnikov and Babenko, TabM: Advancing Tabular Deep
Learning with Parameter-Efficient Ensembling, ICLR 2025, https://arxiv.org/abs/2410.24210
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vbdl.nn.scaled import choose_layers
from vbdl.nn.scaled_members import ScaledPosterior, fresh_copies, names_inside, normalization_names
from vbdl.types import Output, State

_INITIAL = ("signs", "normal", "tabm")


class BatchEnsemble(ScaledPosterior):
    """A BatchEnsemble: n_members networks with shared weights W, whose layers are y = ((x * r_m) W^T) * s_m + b_m.

    The weight of member m is W * s_m r_m^T. All linear and convolutional layers (also transposed ones) and the
    projections in `nn.MultiheadAttention` have factors; embeddings, recurrent layers and what is frozen have none. Each
    member has its own biases of these layers, and its own normalization layers: scales, shifts and running statistics.
    All members together are one batch for one product with W, in training and in prediction.

        q = vbdl.BatchEnsemble(network, n_members=8)
        q = vbdl.BatchEnsemble(trained_network, n_members=8, initial="normal", initial_std=0.1)
        q = vbdl.BatchEnsemble(mlp, n_members=32, initial="tabm")

    W gets the sum of the members' gradients. With `patience`, `fit` stops by the loss of the members' mixture. Its
    weight decay spares r and s, whose neutral value is 1; a function passed as `optimizer=` gets them with all others.

    module: any network, trained or not: W, b and all else start from its numbers. It is not changed.
    n_members: the number of members.
    initial: how r and s start. "signs": 1 or -1 at random. "normal": from N(1, initial_std^2); with a small std from a
        trained network, whose members then start near it. "tabm": as in TabM, the r of the first layer is 1 or -1 at
        random and all others are 1, and each member has a last layer of its own, initialized anew; first and last in
        the order of `network.modules()`.
    initial_std: the standard deviation of r and s for "normal"; 0 makes all members the given network.
    layers: modules, by name or type, whose layers have factors; by default all that are not frozen.
    own: names of modules, parameters or buffers of which each member has its own, starting as copies, e.g. ["head"].
    seed: of the factors and of dropout in training; member m uses seed + m for dropout.
    output: name or index of the module's output to predict from, or a function that returns it, if it returns several;
        "logits" are found without it.

    Raises ValueError for a network without such a layer, and for a chosen layer with a parametrized weight
    (weight_norm, spectral_norm), which cannot be scaled.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> q = vbdl.BatchEnsemble(net, n_members=5)
    >>> sorted(q.shared())  # held once
    ['inner.0.weight', 'inner.2.weight']
    >>> q.member(0)["0.weight"].shape  # with its factors multiplied out
    torch.Size([8, 4])
    >>> p = vbdl.Predictor(q, vbdl.Categorical(), compile=False)(torch.randn(7, 4))
    >>> p.probs.shape, p.n_samples
    (torch.Size([7, 3]), 5)
    """

    def __init__(
        self,
        module: nn.Module,
        n_members: int = 4,
        *,
        initial: str = "signs",
        initial_std: float = 0.5,
        layers: Sequence[str | type[nn.Module]] | None = None,
        own: Sequence[str] = (),
        seed: int = 0,
        output: Output = None,
    ):
        super().__init__()
        network = self._begin(module, n_members, seed, output)
        if initial not in _INITIAL:
            raise ValueError(f"initial must be one of {', '.join(map(repr, _INITIAL))}, got {initial!r}")
        if not 0 <= initial_std < float("inf"):
            raise ValueError(f"initial_std must be a standard deviation, 0 or more, got {initial_std}")
        if isinstance(own, str):
            raise TypeError(f"own must be a list of names, got {own!r}: write [{own!r}]")
        chosen = choose_layers(network, layers)
        if initial == "tabm" and len({layer.path for layer in chosen.values()}) < 2:
            raise ValueError("initial='tabm' needs at least two layers, a first and a last one: use initial='signs'")
        self._initial, self._initial_std, self._own = initial, initial_std, tuple(own)
        self._layers = tuple(dict.fromkeys(layer.path for layer in chosen.values()))  # before heads are taken out
        others: dict[str, Tensor | None] = dict.fromkeys(normalization_names(network, scales=True))
        others |= dict.fromkeys(name for names in names_inside(network, own).values() for name in names)
        if initial == "tabm":
            others |= fresh_copies(network, self._layers[-1], n_members, seed)
        scaled = {name: layer for name, layer in chosen.items() if name not in others}
        if not scaled:
            raise ValueError("own= names every layer, so members share no weights: use vbdl.DeepEnsemble")
        trainable = {name for name, p in network.named_parameters() if p.requires_grad}
        others |= dict.fromkeys(
            layer.bias for layer in scaled.values() if layer.bias in trainable and layer.bias not in others
        )
        r, s = self._factors(network, scaled)
        self._scale(network, scaled, r, s, others, trained=True)

    def _factors(self, network: nn.Module, layers: dict[str, Any]) -> tuple[State, State]:
        """The initial factors r, (members, inputs), and s, (members, outputs), by the weight's name."""
        generator = torch.Generator().manual_seed(self.seed % 2**63)
        parameters = dict(network.named_parameters())
        first, r, s = next(iter(layers)), {}, {}
        for name, layer in layers.items():
            for factors, width in ((r, layer.inputs), (s, layer.outputs)):
                shape = (self.n_members, width)
                if self._initial == "normal":
                    values = 1 + self._initial_std * torch.randn(shape, generator=generator)
                elif self._initial == "signs" or (name == first and factors is r):
                    values = 1.0 - 2.0 * torch.randint(2, shape, generator=generator)
                else:
                    values = torch.ones(shape)
                factors[name] = values.to(parameters[name])
        return r, s

    def config(self) -> dict[str, Any]:
        """The arguments that make it again, given its network."""
        arguments: dict[str, Any] = {
            "n_members": self.n_members,
            "initial": self._initial,
            "initial_std": self._initial_std,
            "layers": list(self._layers),
            "own": list(self._own),
            "seed": self.seed,
        }
        return arguments if self.output is None else arguments | {"output": self.output}
