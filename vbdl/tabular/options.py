"""The options of `fit_table`, with defaults that work for tables of hundreds to some hundred thousand rows."""

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from vbdl.likelihoods.categorical import Categorical
from vbdl.likelihoods.centered import Centered
from vbdl.likelihoods.gaussian import Gaussian
from vbdl.likelihoods.heteroscedastic import HeteroscedasticGaussian
from vbdl.posteriors.ensemble import DeepEnsemble
from vbdl.posteriors.mc_dropout import MCDropout
from vbdl.posteriors.mean_field import MeanField
from vbdl.splitting import DEFAULT_SHARES
from vbdl.tabular.network import TabularNetwork
from vbdl.tabular.schema import Schema
from vbdl.types import Likelihood, Posterior

Method = Literal["ensemble", "dropout", "mean-field"]
Noise = Literal["constant", "per-row"]

# learning rate, patience and rate of dropout of each method; see docs/tables.md for what they reach
_TRAINING: dict[str, dict[str, Any]] = {
    "ensemble": {"lr": 1e-3, "patience": 20},
    "dropout": {"lr": 1e-3, "patience": 40},
    "mean-field": {"lr": 5e-3, "patience": 60},
}
_DROPOUT = {"ensemble": 0.1, "dropout": 0.1, "mean-field": 0.0}


_ROWS_WORTH_COMPILING = 50_000


@dataclass(frozen=True)
class TableOptions:
    """How `fit_table` builds, trains and calibrates a model. None: chosen by the method and the size of the table."""

    method: Method = "ensemble"
    members: int = 5  # of the ensemble
    draws: int = 64  # of the others
    width: int = 128
    depth: int = 2
    dropout: float | None = None
    noise: Noise | None = None  # of a regression: one level, or one a row that the network predicts
    epochs: int = 500  # at most: training stops when the validation rows no longer gain
    batch_size: int | None = None
    lr: float | None = None
    weight_decay: float = 1e-4
    patience: int | None = None
    coverage: float = 0.9  # of the prediction sets or intervals; 0 for none
    seed: int = 0
    shares: dict[str, float] = field(default_factory=lambda: dict(DEFAULT_SHARES))

    def __post_init__(self):
        if self.method not in _TRAINING:
            raise ValueError(f"method {self.method!r} is none of {', '.join(_TRAINING)}")
        if not 0.0 <= self.coverage < 1.0:
            raise ValueError(f"coverage lies in [0, 1), got {self.coverage}")
        if set(self.shares) != set(DEFAULT_SHARES):
            raise ValueError(f"shares are of {', '.join(DEFAULT_SHARES)}, got {sorted(self.shares)}")
        if min(self.members, self.draws, self.epochs) < 1:
            raise ValueError("members, draws and epochs are at least 1")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size is at least 1, got {self.batch_size}")
        if self.dropout is not None and not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout lies in [0, 1), got {self.dropout}")

    def network_arguments(self, schema: Schema, n_train: int) -> dict[str, Any]:
        """Arguments of the `TabularNetwork`."""
        target, rate = schema.target, _DROPOUT[self.method] if self.dropout is None else self.dropout
        if self.method == "dropout" and rate == 0:
            raise ValueError("method dropout needs a rate of dropout above 0")
        return {
            "inputs": len(schema.features),
            "outputs": 1 if target.classes is None else len(target.classes),
            "width": self.width,
            "depth": self.depth,
            "dropout": rate,
            "log_variance": target.classes is None and self.noise_of(n_train) == "per-row",
            "target_mean": 0.0 if target.far else target.mean,
            "target_std": target.std,
        }

    def noise_of(self, n_train: int) -> Noise:
        """A noise level a row is a second function to learn, for which there have to be rows."""
        return self.noise or ("per-row" if n_train >= 400 else "constant")

    def likelihood(self, schema: Schema, n_train: int) -> Likelihood:
        if schema.target.classes is not None:
            return Categorical()
        per_row, std = self.noise_of(n_train) == "per-row", schema.target.std
        gaussian = HeteroscedasticGaussian(beta=0.5, unit=std) if per_row else Gaussian(std=std)
        return Centered(gaussian, schema.target.mean) if schema.target.far else gaussian

    def posterior(self, network: TabularNetwork, n_train: int) -> Posterior:
        if self.method == "ensemble":
            return DeepEnsemble(network, self.members, seed=self.seed)
        if self.method == "dropout":
            return MCDropout(network, seed=self.seed)
        # a prior of the size that the layers' own initialisation has in a network of this width
        prior = {f"layers.{i}": m.in_features**-0.5 for i, m in enumerate(network.layers) if isinstance(m, nn.Linear)}
        return MeanField(network, n_train, prior_std=prior, initial_std=0.02, seed=self.seed)

    @property
    def n_samples(self) -> int | None:
        return None if self.method == "ensemble" else self.draws

    def training(self, n_train: int) -> dict[str, Any]:
        """Arguments of `vbdl.fit`."""
        defaults = dict(_TRAINING[self.method])
        defaults["lr"] = defaults["lr"] if self.lr is None else self.lr
        defaults["patience"] = defaults["patience"] if self.patience is None else self.patience
        batch = self.batch_size or (32 if n_train < 2_000 else 64 if n_train < 10_000 else 256)
        # early stopping ends most trainings long before `epochs`: compiling pays where an epoch is long
        large = n_train >= _ROWS_WORTH_COMPILING
        options = {
            "compile": None if large else False,
            "epochs": self.epochs,
            "batch_size": batch,
            "seed": self.seed,
            "clip_norm": 5.0,
            **defaults,
        }
        if self.method == "mean-field":
            return {**options, "kl_warmup": 30}
        return {**options, "weight_decay": self.weight_decay}
