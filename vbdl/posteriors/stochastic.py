"""Networks that draw by themselves: each sample is the network under the noise of one draw, taken from counters.

The noise is already in the network's forward: textbook variational layers (Blundell et al., Weight Uncertainty in
Neural Networks, ICML 2015, https://arxiv.org/abs/1505.05424) and the layers of libraries of them, noise layers,
stochastic depth. q is whatever the forward draws.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vbdl_kernels import make_key

from vbdl.calling.checks import check_chosen
from vbdl.calling.copies import copied
from vbdl.nn.objective import KeyedPosterior, take_network
from vbdl.nn.stochastic import StochasticNetwork
from vbdl.types import Inputs, Output


class Stochastic(KeyedPosterior):
    """A posterior around a network that draws with torch's random functions in its forward.

        class Variational(nn.Linear):  # a textbook layer
            def forward(self, x):
                weight = self.weight + torch.exp(self.logvar / 2) * torch.randn_like(self.weight)
                return F.linear(x, weight, self.bias)

        predict = vbdl.Predictor(vbdl.Stochastic(network), vbdl.Categorical())

    Noise without a batch axis, like that of weights, is one draw for all rows. A network trained elsewhere predicts
    as it is; `fit` minimizes -log p(y | x, draw) + kl_weight * kl(network) / n_data, the mean over rows.

    module: the network. It is copied.
    kl: function of the network that returns its KL in nats, like `lambda net: sum(m.kl() for m in net.layers)`;
        without it nothing is added to the loss. It is not saved with the posterior.
    n_data: number of rows in the training set, by which the KL is divided.
    noisy: modules, by name or type, that stay in training mode in prediction, to draw the noise that they draw in
        training only (a GaussianNoise, drop_path). By default the network predicts in evaluation mode.
    per_row: draw noise that has a batch axis for each row of a tile, so that a row's noise depends on its place there.
        By default the rows of a draw share it.
    n_samples: draws of the network per training step, averaged.
    seed: of the draws in training; in an ensemble of these, member m uses seed + m.
    output: name or index of the module's output to predict from, or a function that returns it, if it returns several;
        `logits` are found.

    Raises ValueError when it first runs if the network draws nothing.

    >>> class Noisy(nn.Linear):
    ...     def forward(self, x):
    ...         return super().forward(x) + 0.1 * torch.randn(self.out_features)
    >>> q = vbdl.Stochastic(nn.Sequential(Noisy(4, 8), nn.Tanh(), Noisy(8, 3)))
    >>> predict = vbdl.Predictor(q, vbdl.Categorical(), n_samples=50, compile=False)
    >>> predict(torch.randn(7, 4)).probs.shape
    torch.Size([7, 3])
    """

    module: StochasticNetwork

    def __init__(
        self,
        module: nn.Module,
        kl: Callable[[nn.Module], Tensor] | None = None,
        n_data: int | None = None,
        noisy: Sequence[str | type[nn.Module]] = (),
        per_row: bool = False,
        n_samples: int = 1,
        seed: int = 0,
        output: Output = None,
    ):
        super().__init__()
        module = take_network(self, module, output)
        check_chosen("noisy", noisy)
        if n_data is not None and n_data < 1:
            raise ValueError(f"n_data must be the number of training rows, at least 1, got {n_data}")
        if kl is not None and n_data is None:
            raise ValueError("the KL is divided by the number of training rows: give Stochastic(..., n_data=) too")
        if kl is not None and (not callable(kl) or (inspect.ismethod(kl) and isinstance(kl.__self__, nn.Module))):
            raise TypeError(
                f"kl must be a function of the network, because the posterior holds a copy of it: write "
                f"kl=lambda net: net.kl(); got {kl!r:.80}"
            )
        if n_samples < 1:
            raise ValueError(f"n_samples must be at least 1, got {n_samples}")
        self.module = StochasticNetwork(copied(module), kl, n_data, _names(module, noisy), per_row)
        self.n_samples, self.seed = n_samples, seed
        device = next((p.device for p in module.parameters()), None)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=device))

    def config(self) -> dict[str, Any]:
        """The arguments that make it again, given its network; `kl`, a function, is not among them."""
        m = self.module
        arguments = {
            "n_data": m.n_data,
            "noisy": list(m.noisy),
            "per_row": m.per_row,
            "n_samples": self.n_samples,
            "seed": self.seed,
        }
        return arguments if self.output is None else arguments | {"output": self.output}

    @property
    def kl_weight(self) -> float | None:  # type: ignore[override]
        """The weight of the KL term; None without one."""
        return None if self.module.kl is None else float(self.module.kl_weight)

    @kl_weight.setter
    def kl_weight(self, value: float) -> None:
        self.module.kl_weight.fill_(value)

    def prepare(self, inputs: Inputs) -> None:
        """Run the network to find every random call and its batch axis. Raises ValueError if it makes none."""
        was_training = self.module.training
        self.module.eval()
        try:
            if not self.module.locate(inputs) and not any(site.p > 0 for site in self.module.sites or ()):
                raise ValueError(self._nothing_drawn(inputs))
        finally:
            self.module.train(was_training)

    def _nothing_drawn(self, inputs: Inputs) -> str:
        """The error for a network that draws nothing in prediction, with the modules that draw in training."""
        others = "vbdl.MCDropout, vbdl.MeanField or vbdl.DeepEnsemble"
        message = f"the network draws nothing in evaluation mode, so every sample would be the same: use {others}"
        probe = StochasticNetwork(copied(self.module.inner), None, None, ("",), False).eval()
        try:
            names = sorted({call.path for call in probe.locate(inputs)} | {site.path for site in probe.sites or ()})
        except (RuntimeError, ValueError, NotImplementedError):  # in training mode it may do what a prediction cannot
            names = []
        if not names:
            return message
        return f"{message}, or draw what it draws in training: Stochastic(module, noisy={names})"

    @contextlib.contextmanager
    def draw(self, number: int, seed: int = 0) -> Iterator[nn.Module]:
        """A context in which the network draws what sample `number` of a predictor with this seed draws.

            with predict.posterior.draw(3, predict.seed) as network:
                outputs = network(x)

        Raises RuntimeError before `prepare`, or a prediction, has found the random calls.
        """
        if self.module.calls is None:
            raise RuntimeError("the random calls are not known yet: call prepare(x) with a batch of rows first")
        key = make_key(seed, [number], device=self.module.key.device)[0]
        was_training = self.module.training
        self.module.eval()
        try:
            with self.module.noise(key, known=self.module.calls_of(key)):
                yield self.module.inner
        finally:
            self.module.train(was_training)


def _names(module: nn.Module, chosen: Sequence[str | type[nn.Module]]) -> tuple[str, ...]:
    """The names of the chosen modules. Raises ValueError for a choice that fits none."""
    modules = dict(module.named_modules())
    names: list[str] = []
    for one in chosen:
        fitting = [n for n, m in modules.items() if (n == one if isinstance(one, str) else isinstance(m, one))]
        if not fitting:
            raise ValueError(f"noisy names {one!r}, and no module is one; there are {sorted(modules.keys() - {''})}")
        names += fitting
    return tuple(dict.fromkeys(names))
