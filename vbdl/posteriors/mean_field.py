"""Mean-field variational inference: an independent normal for every weight, fitted by maximizing the ELBO.

Graves, Practical Variational Inference for Neural Networks, NeurIPS 2011; Blundell et al., Weight Uncertainty in
Neural Networks, ICML 2015, https://arxiv.org/abs/1505.05424
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vbdl import former
from vbdl.calling.checks import check_chosen
from vbdl.calling.copies import copied
from vbdl.calling.inputs import flatten, map_inputs
from vbdl.calling.stacking import call
from vbdl.data.rows import take
from vbdl.nn.interception import CounterDropout
from vbdl.nn.layers import LayeredNetwork, has_bayesian_layers
from vbdl.nn.masks import Masks
from vbdl.nn.objective import KeyedPosterior, take_network
from vbdl.nn.priors import Prior
from vbdl.nn.row_estimators import ESTIMATORS, Estimator, row_layers
from vbdl.nn.sampled import SampledNetwork, choose
from vbdl.types import Inputs, Likelihood, Output


class MeanField(KeyedPosterior):
    """A mean-field posterior q(w) = prod_i N(mean_i, std_i^2).

    The loss of a row is E_q[-log p(y | x, w)] + kl_weight * KL(q || prior) / n_data.

    module: any network, trained or not; it is copied, and its weights are the initial means. In a network with
        `BayesianLinear` or `BayesianConv*d` layers only the weights of those layers are sampled.
    n_data: number of rows in the training set, by which the KL is divided.
    prior: std of the normal prior, a `Normal` or `ScaleMixture`, or by module name or pattern {"": 1.0, "head": 0.1}.
    parameters: the parameters to sample, by name, by a pattern such as "*.lora_A.*", or by module type; a module's name
        stands for all inside it. By default all trainable ones: of a network with adapters, the adapters.
    initial_std: std of every weight before training.
    n_samples: draws of the weights per training step, averaged.
    seed: of the draws in training; in an ensemble of these, member m uses seed + m.
    estimator: how a training step draws. "shared": the weights once, for all rows. "flipout": the weights once, with
        random signs for every row (Wen et al. 2018, https://arxiv.org/abs/1803.04386). "local": the outputs of layers,
        for every row (Kingma et al. 2015, https://arxiv.org/abs/1506.02557); exact for linear layers that act once on
        one vector of a row, approximate for convolutions and linear layers over further axes, since outputs of a row
        then share no weights. The latter two have a lower variance of the gradient, and take two products a layer
        in place of one. They apply to `F.linear` and `F.conv1d` to `F.conv3d`; everything else (recurrent layers,
        attention's projections, embeddings, normalization, own parameters) is drawn once: see `estimators`. Predictions
        are the same with each.
    output: name or index of the module's output to predict from, or a function that returns it, if it returns several;
        "logits" are found without it.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> q = vbdl.MeanField(net, n_data=100, prior=0.5)
    >>> predict = vbdl.Predictor(q, vbdl.Categorical(), n_samples=50, compile=False)
    >>> predict(torch.randn(7, 4)).probs.shape
    torch.Size([7, 3])
    """

    module: Any

    @former.arguments(prior_std="prior")
    def __init__(
        self,
        module: nn.Module,
        n_data: int,
        prior: float | Prior | Mapping[str, float | Prior] = 1.0,
        parameters: Sequence[str | type[nn.Module]] | None = None,
        initial_std: float = 0.05,
        n_samples: int = 1,
        seed: int = 0,
        *,
        estimator: Estimator = "shared",
        output: Output = None,
    ):
        super().__init__()
        module = take_network(self, module, output)
        check_chosen("parameters", parameters)
        if estimator not in ESTIMATORS:
            raise ValueError(f"estimator must be one of {', '.join(map(repr, ESTIMATORS))}, got {estimator!r}")
        if n_data < 1:
            raise ValueError(f"n_data must be the number of training rows, at least 1, got {n_data}")
        if not (initial_std > 0 and math.isfinite(initial_std)):
            raise ValueError(f"initial_std must be positive and finite, got {initial_std}")
        if n_samples < 1:
            raise ValueError(f"n_samples must be at least 1, got {n_samples}")
        self._priors: dict[str, Prior] | None = None  # of the parameters sampled; None where the layers have them
        if has_bayesian_layers(module):
            if parameters is not None or prior != 1.0 or initial_std != 0.05:
                raise ValueError(
                    "a network with Bayesian layers has its priors and initial_std in those layers: set them there"
                )
            self.module = LayeredNetwork(copied(module), n_data)
        else:
            chosen = choose(module, None if parameters is None else tuple(parameters), prior)
            self._priors = dict(chosen)
            self.module = SampledNetwork(copied(module), chosen, initial_std, n_data)
        self.estimator: Estimator = estimator
        for network in self._sampled(self.module):
            network.row_estimator = estimator
        self.n_samples, self.seed = n_samples, seed
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def config(self) -> dict[str, Any]:
        """The arguments that make it again, given its network."""
        arguments: dict[str, Any] = {"n_data": self.module.n_data, "n_samples": self.n_samples, "seed": self.seed}
        if self.estimator != "shared":
            arguments["estimator"] = self.estimator
        if self.output is not None:
            arguments["output"] = self.output
        if self._priors is None:
            return arguments
        initial_std = math.exp(self.module.log_std.initial)
        return arguments | {
            "prior": dict(self._priors), "parameters": list(self._priors), "initial_std": initial_std,
        }  # fmt: skip

    # -- drawing for every row in training

    @staticmethod
    def _sampled(module: nn.Module) -> dict[SampledNetwork, str]:
        """The networks inside that draw weights, with the prefix of their parameters in the user's network."""
        of = {m: name for name, m in module.named_modules() if isinstance(m, SampledNetwork)}
        return {m: f"{name.removeprefix('inner').removeprefix('.')}." if name else "" for m, name in of.items()}

    @property
    def estimators(self) -> dict[str, str]:
        """How each sampled parameter is drawn in training, by name: "shared", "flipout", "local", "local, approximate".

        Known after training has begun: which layers can draw for every row is found on the first batch.
        """
        found = {}
        for network, prefix in self._sampled(self.module).items():
            for name in network.chosen:
                found[f"{prefix}{name}"] = "shared"
            for name, layer in network.row_layers.items():
                how = self.estimator if layer.exact else f"{self.estimator}, approximate"
                found |= {f"{prefix}{n}": how for n in (name, layer.bias) if n is not None}
        return found

    def _find_row_layers(self, inputs: Inputs) -> None:
        """Find the layers that can draw for every row, by running the network on 2 and on 3 rows."""
        networks = self._sampled(self.module)
        count = flatten(inputs).tensors[0].shape[0]
        for network in networks:
            network.recorded = []
        state = {name: b.detach().clone() for name, b in self.module.named_buffers()}  # statistics must not move
        try:
            for rows in (2, 3):
                with torch.no_grad(), CounterDropout(Masks(self.module.key, self.module.inner, per_row=True)):
                    call(self.module, dict(state), take(inputs, torch.arange(rows) % count))
            for network in networks:
                assert network.recorded is not None
                two, three = network.recorded
                network.row_layers = row_layers(two, three, self.estimator)
        finally:
            for network in networks:
                network.recorded = None

    def before_training(self, x: Inputs, y: Tensor, likelihood: Likelihood, own_rows: bool = False) -> None:
        if self.estimator != "shared":
            self._find_row_layers(map_inputs(lambda t: t[0], x) if own_rows else x)

    def kl(self) -> Tensor:
        """KL(q || prior) in nats, summed over every weight."""
        return self.module.kl()
