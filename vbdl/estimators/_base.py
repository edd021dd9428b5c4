"""The base class of the two estimators: parameters, training and the predictor, in scikit-learn's conventions."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted, validate_data

from vbdl.engine.predictor import Predictor
from vbdl.methods import method_of
from vbdl.tabular.network import INITIAL_STD, TabularNetwork
from vbdl.training.fit import fit
from vbdl.types import Keywords, Likelihood, Prediction

_validate: Callable[..., Any] = validate_data  # scikit-learn has no types
_MIN_VALIDATION = 10  # validation rows; with fewer, early stopping would follow noise


class Estimator(BaseEstimator):
    """The base class of `vbdl.VBDLClassifier` and `vbdl.VBDLRegressor`, which document its parameters."""

    def __init__(
        self,
        *,
        method: str = "deep-ensemble",
        n_members: int = 5,
        n_samples: int = 64,
        hidden: tuple[int, ...] | int = (64, 64),
        dropout: float = 0.1,
        epochs: int = 200,
        batch_size: int = 32,
        lr: float = 3e-3,
        weight_decay: float = 1e-4,
        validation_fraction: float = 0.2,
        patience: int = 20,
        standardize: bool = True,
        compile: bool = False,
        random_state: int | np.random.RandomState | None = None,
    ):
        self.method = method
        self.n_members = n_members
        self.n_samples = n_samples
        self.hidden = hidden
        self.dropout = dropout
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr
        self.weight_decay = weight_decay
        self.validation_fraction = validation_fraction
        self.patience = patience
        self.standardize = standardize
        self.compile = compile
        self.random_state = random_state

    # -- for subclasses: targets and likelihood

    def _likelihood(self, n_train: int) -> Likelihood:
        raise NotImplementedError

    def _checked(self, X: ArrayLike, y: ArrayLike, y_numeric: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """The rows and targets as arrays, validated by scikit-learn's rules."""
        x, targets = _validate(self, X, y, dtype=np.float64, y_numeric=y_numeric)
        return x, targets

    def _fit(self, x: np.ndarray, y: torch.Tensor, outputs: int, head: Keywords) -> None:
        """Train on checked rows. head: arguments of the network that concern the target."""
        method = method_of(self.method)
        seed = self._seed()
        self.mean_ = x.mean(axis=0) if self.standardize else np.zeros(x.shape[1])
        scale = x.std(axis=0) if self.standardize else np.ones(x.shape[1])
        # the std of a constant column is rounding error, which dividing by it would scale up to size one
        self.scale_ = np.where(scale > 1e-12 * np.maximum(1.0, np.abs(self.mean_)), scale, 1.0)
        rows = self._tensor(x)
        n = len(y)
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must lie in [0, 1), got {self.validation_fraction}")
        n_validation = round(n * self.validation_fraction)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        validation = None
        if self.validation_fraction > 0 and n_validation >= _MIN_VALIDATION:
            validation = (rows[order[:n_validation]], y[order[:n_validation]])
            rows, y = rows[order[n_validation:]], y[order[n_validation:]]
        widths = (self.hidden,) if isinstance(self.hidden, int) else tuple(self.hidden)
        if len(set(widths)) != 1:
            raise ValueError(f"hidden must be equal widths of the hidden layers, e.g. (64, 64); got {self.hidden}")
        rate = self.dropout if method.dropout else 0.0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = TabularNetwork(x.shape[1], outputs, widths[0], len(widths), rate, **head)
        likelihood = self._likelihood(len(y))
        posterior = method.make(
            network,
            n_members=self.n_members,
            n_data=len(y),
            prior=network.prior(),
            initial_std=INITIAL_STD,
            seed=seed,
        )
        history = fit(
            posterior,
            (rows, y),
            likelihood,
            epochs=self.epochs,
            batch_size=self.batch_size,
            lr=self.lr * method.rate,
            weight_decay=method.training.get("weight_decay", self.weight_decay),
            validation=validation,
            patience=self.patience if validation is not None and method.stops_early else None,
            clip_norm=method.training.get("clip_norm", 5.0),
            seed=seed,
            progress=False,
            compile=self.compile,
        )
        self.n_iter_ = history.epochs
        self.posterior_, self.likelihood_ = posterior, likelihood
        self._predictor = self._new_predictor()  # in fit, because scikit-learn forbids predict to set attributes

    def _new_predictor(self) -> Predictor:
        samples = None if method_of(self.method).has_fixed_draws else self.n_samples
        return Predictor(self.posterior_, self.likelihood_, samples, compile=self.compile)

    def _seed(self) -> int:
        from sklearn.utils import check_random_state

        return int(check_random_state(self.random_state).randint(2**31 - 1))

    def _tensor(self, x: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(((x - self.mean_) / self.scale_).astype(np.float32))

    @property
    def predictor_(self) -> Predictor:
        """The predictor of standardized rows, which `vbdl.calibrate` and `with_decision` take."""
        check_is_fitted(self, "posterior_")
        if "_predictor" not in self.__dict__:  # a copied or unpickled estimator has none
            self._predictor = self._new_predictor()
        return self._predictor

    def _predict(self, X: ArrayLike, samples: bool = False) -> Prediction:
        check_is_fitted(self, "posterior_")
        x = _validate(self, X, reset=False, dtype=np.float64)
        return self.predictor_(self._tensor(x), samples=samples)

    def __getstate__(self) -> dict[str, object]:
        """The state without the predictor, which holds locks and compiled code and is built again when needed."""
        state = super().__getstate__()
        assert isinstance(state, dict)
        return {name: value for name, value in state.items() if name != "_predictor"}
