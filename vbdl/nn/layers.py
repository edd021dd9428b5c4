"""Bayesian layers for networks built by hand: nn.Linear and nn.Conv*d with sampled weights.

    net = nn.Sequential(vbdl.BayesianLinear(8, 50), nn.ReLU(), nn.Linear(50, 1))
    q = vbdl.MeanField(net, n_data=1000)      # samples the weights of the Bayesian layers only

Mean-field inference does not need these layers: `vbdl.MeanField` takes any module.
"""

import math

import torch
from torch import Tensor, nn
from vbdl_kernels import make_key

from vbdl import former
from vbdl.calling.stacking import call
from vbdl.nn.keyed import KeyedNetwork
from vbdl.nn.priors import Normal, Prior
from vbdl.nn.sampled import SampledNetwork


class _BayesianLayer(SampledNetwork):
    """One layer with an independent normal for every weight; the means are the parameters of `inner`."""

    def __init__(self, layer: nn.Module, prior: float | Prior, initial_std: float):
        if not (initial_std > 0 and math.isfinite(initial_std)):
            raise ValueError(f"initial_std must be positive and finite, got {initial_std}")
        prior = Normal(float(prior)) if isinstance(prior, int | float) else prior
        names = [name for name, _ in layer.named_parameters()]
        super().__init__(layer, dict.fromkeys(names, prior), initial_std, n_data=1)

    def draw(self, number: int, seed: int = 0) -> None:
        """Select the draw whose weights calls outside a posterior use."""
        self.key.copy_(make_key(seed, [number])[0])

    def extra_repr(self) -> str:
        return self.inner.extra_repr()


class BayesianLinear(_BayesianLayer):
    """nn.Linear with weights w ~ N(mean, std^2), prior N(0, prior^2).

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), vbdl.BayesianLinear(8, 3, prior=0.5))
    >>> q = vbdl.MeanField(net, n_data=100)  # samples the weights of the last layer only
    >>> vbdl.Predictor(q, vbdl.Categorical(), compile=False)(torch.randn(7, 4)).probs.shape
    torch.Size([7, 3])
    """

    @former.arguments(prior_std="prior")
    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        prior: float | Prior = 1.0,
        initial_std: float = 0.05,
    ):
        super().__init__(nn.Linear(in_features, out_features, bias), prior, initial_std)


class BayesianConv1d(_BayesianLayer):
    """nn.Conv1d with weights w ~ N(mean, std^2), prior N(0, prior^2); options are nn.Conv1d's.

    >>> net = nn.Sequential(vbdl.BayesianConv1d(2, 4, 3, prior=0.5), nn.Flatten(), nn.LazyLinear(3))
    >>> net(torch.randn(5, 2, 6)).shape  # at the means of the weights
    torch.Size([5, 3])
    """

    @former.arguments(prior_std="prior")
    def __init__(self, *args, prior: float | Prior = 1.0, initial_std: float = 0.05, **options):
        super().__init__(nn.Conv1d(*args, **options), prior, initial_std)


class BayesianConv2d(_BayesianLayer):
    """nn.Conv2d with weights w ~ N(mean, std^2), prior N(0, prior^2); options are nn.Conv2d's.

    >>> net = nn.Sequential(vbdl.BayesianConv2d(2, 4, 3, prior=0.5), nn.Flatten(), nn.LazyLinear(3))
    >>> net(torch.randn(5, 2, 6, 6)).shape  # at the means of the weights
    torch.Size([5, 3])
    """

    @former.arguments(prior_std="prior")
    def __init__(self, *args, prior: float | Prior = 1.0, initial_std: float = 0.05, **options):
        super().__init__(nn.Conv2d(*args, **options), prior, initial_std)


class BayesianConv3d(_BayesianLayer):
    """nn.Conv3d with weights w ~ N(mean, std^2), prior N(0, prior^2); options are nn.Conv3d's.

    >>> net = nn.Sequential(vbdl.BayesianConv3d(2, 4, 3, prior=0.5), nn.Flatten(), nn.LazyLinear(3))
    >>> net(torch.randn(5, 2, 6, 6, 6)).shape  # at the means of the weights
    torch.Size([5, 3])
    """

    @former.arguments(prior_std="prior")
    def __init__(self, *args, prior: float | Prior = 1.0, initial_std: float = 0.05, **options):
        super().__init__(nn.Conv3d(*args, **options), prior, initial_std)


class LayeredNetwork(KeyedNetwork):
    """A network with Bayesian layers, with the interface of a SampledNetwork: one key draws all layers."""

    kl_weight: Tensor

    draws_weights = True
    numbers_places = False

    def __init__(self, inner: nn.Module, n_data: int):
        super().__init__()
        self.inner, self.n_data = inner, n_data
        self.paths: list[str] = []
        count = 0
        for path, layer in inner.named_modules():
            if isinstance(layer, _BayesianLayer):
                layer.first_layer = count
                count += len(layer.chosen)
                self.paths.append(path)
        device = next(inner.parameters()).device
        self.register_buffer("kl_weight", torch.ones((), device=device))
        self.register_buffer("key", torch.zeros(2, dtype=torch.int64, device=device), persistent=False)

    def adopt(self, other: KeyedNetwork) -> None:
        assert isinstance(other, LayeredNetwork)
        for path in self.paths:
            layer = self.inner.get_submodule(path)
            layer.adopt(other.inner.get_submodule(path))  # type: ignore[operator]

    def forward(self, *args, **kwargs):
        draw = {f"{path}.key" if path else "key": self.key for path in self.paths}
        return call(self.inner, draw, kwargs if kwargs else args)

    def kl(self, key: Tensor | None = None) -> Tensor:
        """KL(q || prior) in nats, summed over the layers."""
        key = self.key if key is None else key
        layers = [self.inner.get_submodule(path) for path in self.paths]
        return torch.stack([layer.kl(key) for layer in layers]).sum()  # type: ignore[operator]

    def regularization(self, key: Tensor) -> Tensor:
        """The KL term in the loss of a row, in nats."""
        return self.kl_weight * self.kl(key) / self.n_data


def has_bayesian_layers(module: nn.Module) -> bool:
    """Whether a network was built by hand from Bayesian layers."""
    return any(isinstance(m, _BayesianLayer) for m in module.modules())
