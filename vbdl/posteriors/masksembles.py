"""Masksembles: members share all weights, and each drops units of its own, the same ones in every forward.

Durasov, Bagautdinov, Baque and Fua, Masksembles for Uncertainty Estimation, CVPR 2021,
https://arxiv.org/abs/2012.08334
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vbdl.nn.scaled import Layer, choose_layers, scalable
from vbdl.nn.scaled_members import ScaledPosterior, normalization_names
from vbdl.types import Output

_TRIES = 5  # sets of masks drawn to find one that needs no repair


class Masksembles(ScaledPosterior):
    """A Masksembles posterior: n_members networks of the same weights, each with its own fixed masks of units.

    A mask of 0 and 1 multiplies the inputs of a layer, y = (x * mask_m) W^T + b: features of linear layers, channels of
    convolutions. `scale` sets how far masks overlap: two members share 1 / scale of the units that one of them keeps,
    and scale=1 keeps all. Of `width` inputs each member keeps exactly

        kept_units(width, n_members, scale) = max(floor(width / (scale * (1 - (1 - 1 / scale)^n_members))),
                                                  ceil(width / n_members))

    and every input is kept by a member at least. Weights and biases are shared and trained by the sum of the members'
    gradients; a member has its own running statistics of batch normalization, those of its activations. With
    `patience`, `fit` stops by the loss of the members' mixture. Predictions leave dropped features of linear layers out
    where that is faster, as `explain()` says.

    module: any network, trained or not; all numbers start from its. It is not changed.
    n_members: the number of members.
    scale: 1 or more; the paper takes 1.5 to 6.
    layers: modules, by name or type, whose layers' inputs are masked; by default all linear and convolutional layers
        that are not frozen but the first one in the order of `network.modules()`, which takes the network's inputs.
    rescale: multiply what is kept by width / kept, so that sums keep their mean, as from a trained network; the paper
        does not.
    seed: of the masks and of dropout in training; member m uses seed + m for dropout.
    output: name or index of the module's output to predict from, or a function that returns it, if it returns several;
        "logits" are found without it.

    Raises ValueError for a network without such a layer.

    >>> net = nn.Sequential(nn.Linear(4, 60), nn.Tanh(), nn.Linear(60, 3))
    >>> q = vbdl.Masksembles(net, n_members=4, scale=2.0)
    >>> q.masks("2").sum(1)  # kept by each member
    tensor([32, 32, 32, 32])
    >>> p = vbdl.Predictor(q, vbdl.Categorical(), compile=False)(torch.randn(7, 4))
    >>> p.probs.shape, p.n_samples
    (torch.Size([7, 3]), 4)
    """

    def __init__(
        self,
        module: nn.Module,
        n_members: int = 4,
        scale: float = 2.0,
        *,
        layers: Sequence[str | type[nn.Module]] | None = None,
        rescale: bool = False,
        seed: int = 0,
        output: Output = None,
    ):
        super().__init__()
        network = self._begin(module, n_members, seed, output)
        if not 1 <= scale < float("inf"):
            raise ValueError(f"scale must be at least 1, got {scale}: two masks share 1 / scale of their units")
        chosen = choose_layers(network, layers)
        if layers is None and len(chosen) > 1:
            chosen.pop(next(iter(scalable(network))), None)
        self._factor, self._rescale = float(scale), rescale
        self._layers = tuple(dict.fromkeys(layer.path for layer in chosen.values()))
        parameters = dict(network.named_parameters())
        r = {name: self._masks(layer, i).to(parameters[name]) for i, (name, layer) in enumerate(chosen.items())}
        self._scale(network, chosen, r, {}, dict.fromkeys(normalization_names(network, scales=False)), trained=False)

    def _masks(self, layer: Layer, number: int) -> Tensor:
        """The factors of the inputs of the layer with this number, (members, inputs)."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + number) % 2**63)
        masks = draw_masks(layer.inputs, self.n_members, self._factor, generator)
        kept = kept_units(layer.inputs, self.n_members, self._factor)
        return masks * (layer.inputs / kept if self._rescale else 1.0)

    def masks(self, layer: str) -> Tensor:
        """The masks of a layer's inputs by the layer's name, (members, inputs), True for what a member keeps."""
        for name, found in self.scaled.items():
            if layer in (name, found.path):
                return self.stacked()[f"r.{name.replace('.', '/')}"] != 0
        raise ValueError(f"no inputs of {layer!r} are masked; those of {list(self._layers)} are")

    def config(self) -> dict[str, Any]:
        """The arguments that make it again, given its network."""
        arguments: dict[str, Any] = {
            "n_members": self.n_members,
            "scale": self._factor,
            "layers": list(self._layers),
            "rescale": self._rescale,
            "seed": self.seed,
        }
        return arguments if self.output is None else arguments | {"output": self.output}


def kept_units(width: int, n_members: int, scale: float) -> int:
    """The number of `width` units that each mask keeps.

    Masks of k units drawn from k * scale positions use k * scale * (1 - (1 - 1 / scale)^n) positions on average: k is
    the largest number for which these are at most `width`, and at least as large as it takes to use all units.
    """
    return max(math.floor(width / (scale * (1 - (1 - 1 / scale) ** n_members)) + 1e-9), -(-width // n_members))


def draw_masks(width: int, n_members: int, scale: float, generator: torch.Generator) -> Tensor:
    """Draw masks of 0 and 1, (members, width), of `kept_units` ones each, every unit kept by a member at least.

    As in the paper, each mask draws its units from more positions than there are, and positions that no mask uses are
    left out. Their number is such that `width` are used on average. If the masks use a few more or fewer, units move.
    """
    kept = kept_units(width, n_members, scale)
    if kept == width:
        return torch.ones(n_members, width)
    if kept * n_members == width:  # no two masks overlap
        parts = torch.arange(n_members).repeat_interleave(kept)[torch.randperm(width, generator=generator)]
        return F.one_hot(parts, n_members).mT.float()
    positions = _positions(width, n_members, kept)
    nearest = torch.zeros(n_members, 0)
    for _ in range(_TRIES):
        masks = torch.zeros(n_members, positions)
        order = torch.rand(n_members, positions, generator=generator).argsort(1)
        masks.scatter_(1, order[:, :kept], 1.0)
        used = masks[:, masks.any(0)]
        if abs(used.shape[1] - width) < abs(nearest.shape[1] - width):
            nearest = used
        if used.shape[1] == width:
            break
    masks = _with_width(nearest, width, generator)
    return masks[:, torch.randperm(width, generator=generator)]


def _positions(width: int, n_members: int, kept: int) -> int:
    """The number of positions of which masks of `kept` random ones use `width` on average."""
    used = lambda count: count * (1 - (1 - kept / count) ** n_members)
    few, many = width, width
    while used(many) < width and many < 16 * width:
        many *= 2
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (middle, many) if used(middle) < width else (few, middle)
    return min((few, many), key=lambda count: abs(used(count) - width))


def _with_width(masks: Tensor, width: int, generator: torch.Generator) -> Tensor:
    """The masks with units added or left out until there are `width`, each mask with as many ones as before."""
    masks = masks.clone()
    choose = lambda t: int(t[torch.randint(len(t), (), generator=generator)])
    if (missing := width - masks.shape[1]) > 0:  # ones move from units that another member keeps to new units
        order = torch.rand(masks.shape, generator=generator).masked_fill(masks == 0, -1.0)
        order.scatter_(0, order.argmax(0, keepdim=True), -1.0)  # each unit stays with one of its members
        moved = order.flatten().topk(missing).indices
        members = moved // masks.shape[1]
        masks.flatten()[moved] = 0.0
        new = torch.zeros(len(masks), missing)
        new[members, torch.arange(missing)] = 1.0
        masks = torch.cat([masks, new], 1)
    while masks.shape[1] > width:  # the only one of a unit moves to another unit
        unit = choose((masks.sum(0) == masks.sum(0).min()).nonzero().squeeze(1))
        for member in masks[:, unit].nonzero().squeeze(1).tolist():
            free = masks[member] == 0
            free[unit] = False
            masks[member, choose(free.nonzero().squeeze(1))] = 1.0
        masks = torch.cat([masks[:, :unit], masks[:, unit + 1 :]], 1)
    return masks
