"""The options of `fit_table`, with defaults that work for tables of hundreds to some hundred thousand rows."""

from dataclasses import dataclass, field
from typing import Literal

from vbdl import former
from vbdl.data.splitting import DEFAULT_SHARES
from vbdl.likelihoods.categorical import Categorical
from vbdl.likelihoods.centered import Centered
from vbdl.likelihoods.gaussian import Gaussian
from vbdl.likelihoods.heteroscedastic import HeteroscedasticGaussian
from vbdl.methods import Method, method_of
from vbdl.tabular.network import INITIAL_STD, NetworkArguments, TabularNetwork
from vbdl.tabular.schema import Schema
from vbdl.types import Keywords, Likelihood, Posterior

Noise = Literal["constant", "per-row"]

_ROWS_WORTH_COMPILING = 50_000


@former.arguments(members="n_members", draws="n_samples")
@dataclass(frozen=True)
class TableOptions:
    """Options of the construction, training and calibration in `fit_table`; None is chosen by method and table size."""

    method: str = "deep-ensemble"  # a name in `vbdl.methods`
    n_members: int = 5  # of the ensemble
    n_samples: int = 64  # of the others
    width: int = 128
    depth: int = 2
    dropout: float | None = None
    noise: Noise | None = None  # noise of a regression: one level, or one per row from the network
    epochs: int = 500  # largest number; training stops when the validation likelihood no longer improves
    batch_size: int | None = None
    lr: float | None = None
    weight_decay: float = 1e-4
    patience: int | None = None
    coverage: float = 0.9  # coverage of the prediction sets or intervals; 0 for none
    seed: int = 0
    shares: dict[str, float] = field(default_factory=lambda: dict(DEFAULT_SHARES))

    members = former.attribute("members", "n_members")
    draws = former.attribute("draws", "n_samples")

    def __post_init__(self):
        object.__setattr__(self, "method", method_of(self.method).name)
        if not 0.0 <= self.coverage < 1.0:
            raise ValueError(f"coverage lies in [0, 1), got {self.coverage}")
        if set(self.shares) != set(DEFAULT_SHARES):
            raise ValueError(f"shares are of {', '.join(DEFAULT_SHARES)}, got {sorted(self.shares)}")
        if min(self.n_members, self.n_samples, self.epochs) < 1:
            raise ValueError("n_members, n_samples and epochs are at least 1")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size is at least 1, got {self.batch_size}")
        if self.dropout is not None and not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout lies in [0, 1), got {self.dropout}")

    @property
    def _method(self) -> Method:
        return method_of(self.method)

    def network_arguments(self, schema: Schema, n_train: int) -> NetworkArguments:
        """Return the arguments of the `TabularNetwork`."""
        target, rate = schema.target, self._method.dropout if self.dropout is None else self.dropout
        if self._method.needs_dropout and rate == 0:
            raise ValueError(f"method {self.method} needs a rate of dropout above 0")
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
        """Return the kind of noise; one level per row is a second function to learn and needs more rows."""
        return self.noise or ("per-row" if n_train >= 400 else "constant")

    def likelihood(self, schema: Schema, n_train: int) -> Likelihood:
        if schema.target.classes is not None:
            return Categorical()
        per_row, std = self.noise_of(n_train) == "per-row", schema.target.std
        gaussian = HeteroscedasticGaussian(beta=0.5, unit=std) if per_row else Gaussian(std=std)
        return Centered(gaussian, schema.target.mean) if schema.target.far else gaussian

    def posterior(self, network: TabularNetwork, n_train: int) -> Posterior:
        return self._method.make(
            network,
            n_members=self.n_members,
            n_data=n_train,
            prior=network.prior(),
            initial_std=INITIAL_STD,
            seed=self.seed,
        )

    @property
    def predictor_samples(self) -> int | None:
        """The `n_samples` of the predictor: None if all draws are used: members, or one network."""
        return None if self._method.has_fixed_draws else self.n_samples

    def training(self, n_train: int) -> Keywords:
        """Return the arguments of `vbdl.fit`."""
        of_the_user = {"lr": self.lr, "patience": self.patience}
        chosen = {name: value for name, value in of_the_user.items() if value is not None}
        batch = self.batch_size or (32 if n_train < 2_000 else 64 if n_train < 10_000 else 256)
        # early stopping ends most trainings long before `epochs`, so compiling pays only if an epoch is long
        large = n_train >= _ROWS_WORTH_COMPILING
        return {
            "compile": None if large else False,
            "epochs": self.epochs,
            "batch_size": batch,
            "seed": self.seed,
            "clip_norm": 5.0,
            "weight_decay": self.weight_decay,
            **self._method.training,
            **chosen,
        }


__getattr__ = former.names(__name__, {"Settings": "TableOptions"})
