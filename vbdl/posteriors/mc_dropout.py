"""Monte Carlo dropout: dropout stays on in prediction, and each sample is the network under one dropout mask.

Gal and Ghahramani, Dropout as a Bayesian Approximation: Representing Model Uncertainty in Deep Learning, ICML 2016,
https://arxiv.org/abs/1506.02142
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from vbdl.calling.checks import check_chosen
from vbdl.calling.copies import copied
from vbdl.calling.traversing import modules_of, parameters_of
from vbdl.nn.dropout import DropoutNetwork
from vbdl.nn.may_drop import may_drop
from vbdl.nn.objective import KeyedPosterior, take_network
from vbdl.types import Inputs, Output


class MCDropout(KeyedPosterior):
    """A Monte Carlo dropout posterior: each sample is the module under one dropout mask, shared by the rows of a batch.

    module: any network with dropout: layers, `F.dropout`, attention, between recurrent layers. It is copied.
    p: overrides the dropout rates, all of them or by module name, {"encoder": 0.1, "head.drop": 0.5}.
    deterministic: modules, by name or type, that stay in evaluation mode with their dropout off.
    seed: of the masks in training, one mask per row; in an ensemble of these, member m uses seed + m.
    output: name or index of the module's output to predict from, or a function that returns it, if it returns several;
        "logits" are found without it.

    Training and prediction draw from counters, never from torch's generator. Raises ValueError if the module has no
    dropout: at once if its code does not mention dropout, else when it first runs.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3))
    >>> predict = vbdl.Predictor(vbdl.MCDropout(net), vbdl.Categorical(), n_samples=50, compile=False)
    >>> predict(torch.randn(7, 4)).probs.shape
    torch.Size([7, 3])
    """

    module: DropoutNetwork

    def __init__(
        self,
        module: nn.Module,
        p: float | Mapping[str, float] | None = None,
        deterministic: Sequence[str | type[nn.Module]] = (),
        seed: int = 0,
        *,
        output: Output = None,
    ):
        super().__init__()
        module = take_network(self, module, output)
        for rate in p.values() if isinstance(p, Mapping) else [] if p is None else [p]:
            if not 0.0 <= rate < 1.0:
                raise ValueError(f"a dropout rate must lie in [0, 1), got {rate}")
        check_chosen("deterministic", deterministic)
        names = {name for name, _ in modules_of(module)}
        for name in [*(p if isinstance(p, Mapping) else ()), *(d for d in deterministic if isinstance(d, str))]:
            if name not in names:
                raise ValueError(f"there is no module {name!r}; there are {sorted(names - {''})}")
        if not may_drop(module):
            raise ValueError(
                "MCDropout needs a module with dropout and this one has none: add nn.Dropout layers before training, "
                "or use vbdl.DeepEnsemble or vbdl.MeanField"
            )
        self.module = DropoutNetwork(copied(module), p, tuple(deterministic))
        self.seed = seed
        device = next((p.device for p in parameters_of(module).values()), None)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=device))

    def config(self) -> dict[str, Any]:
        """The arguments that make it again, given its network."""
        p = self.module.rate
        arguments: dict[str, Any] = {
            "p": dict(p) if isinstance(p, Mapping) else p,
            "deterministic": list(self.module.deterministic),
            "seed": self.seed,
        }
        return arguments if self.output is None else arguments | {"output": self.output}

    def prepare(self, inputs: Inputs) -> None:
        """Run the module to find every dropout call and its batch axis. Raises ValueError if none drops units."""
        was_training = self.module.training
        if was_training:
            self.module.eval()
        try:
            sites = self.module.locate(inputs)
        finally:
            if was_training:
                self.module.train()
        if not any(site.p > 0 for site in sites):
            off = ""
            if self.module.off:
                off = f". Switched off in prediction, because it is not dropout: {'; '.join(self.module.off)}"
            raise ValueError(
                f"no dropout with a rate above 0 was called when the module ran, so every sample would be the same: "
                f"check the rates and deterministic=, or give MCDropout(module, p=...){off}"
            )
