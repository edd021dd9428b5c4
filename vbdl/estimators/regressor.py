"""`VBDLRegressor`: a Bayesian neural network as a scikit-learn regressor."""

from typing import Literal, Self, overload

import numpy as np
import torch
from numpy.typing import ArrayLike
from sklearn.base import RegressorMixin

from vbdl.estimators._base import Estimator
from vbdl.likelihoods.centered import Centered, is_far
from vbdl.likelihoods.gaussian import Gaussian
from vbdl.likelihoods.heteroscedastic import HeteroscedasticGaussian
from vbdl.likelihoods.normal_mixture import check_spread
from vbdl.types import Likelihood


class VBDLRegressor(RegressorMixin, Estimator):
    """A regressor: a small multilayer perceptron with a posterior over its weights and a learned noise level.

    noise: "constant" or "per-row"; None for "constant" with fewer than 400 rows, else "per-row".
    The other parameters are those of `VBDLClassifier`. Training standardizes the target; predictions are in its unit.

    >>> from sklearn.datasets import load_diabetes
    >>> x, y = load_diabetes(return_X_y=True)
    >>> model = vbdl.VBDLRegressor(method="mc-dropout", epochs=5).fit(x, y)
    >>> mean, std = model.predict(x[:2], return_std=True)
    >>> mean.shape, std.shape
    ((2,), (2,))
    """

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
        noise: str | None = None,
    ):
        super().__init__(
            method=method,
            n_members=n_members,
            n_samples=n_samples,
            hidden=hidden,
            dropout=dropout,
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            weight_decay=weight_decay,
            validation_fraction=validation_fraction,
            patience=patience,
            standardize=standardize,
            compile=compile,
            random_state=random_state,
        )
        self.noise = noise

    def _likelihood(self, n_train: int) -> Likelihood:
        likelihood = HeteroscedasticGaussian(beta=0.5, unit=self._std) if self._per_row else Gaussian(std=self._std)
        return Centered(likelihood, self._center) if self._center else likelihood

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Train the network. X: (rows, features) finite numbers; y: (rows,) finite numbers."""
        x, y = self._checked(X, y, y_numeric=True)
        y = y.astype(np.float64)
        if self.noise not in (None, "constant", "per-row"):
            raise ValueError(f"noise must be 'constant', 'per-row' or None, got {self.noise!r}")
        self._per_row = self.noise == "per-row" or (self.noise is None and len(y) >= 400)
        if y.min() < y.max():
            check_spread(float(y.std()), "the target y")
        self._std = float(y.std()) or 1.0
        self.__dict__.pop("_predictor", None)
        mean = float(y.mean())
        self._center = mean if is_far(mean, self._std) else 0.0  # float32 would be too coarse without it
        head = {"log_variance": self._per_row, "target_mean": mean - self._center, "target_std": self._std}
        self._fit(x, torch.from_numpy(y if self._center else y.astype(np.float32)).unsqueeze(1), 1, head)
        return self

    @overload
    def predict(self, X: ArrayLike, return_std: Literal[False] = False) -> np.ndarray: ...

    @overload
    def predict(self, X: ArrayLike, return_std: Literal[True]) -> tuple[np.ndarray, np.ndarray]: ...

    def predict(self, X: ArrayLike, return_std: bool = False) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """The predictive mean, (rows,); with return_std also the total predictive std, (rows,)."""
        p = self._predict(X)
        mean = p.mean.flatten().double().numpy()
        if not return_std:
            return mean
        assert p.std is not None
        return mean, p.std.flatten().double().numpy()

    def predict_interval(self, X: ArrayLike, level: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
        """The bounds, (rows,) each, of the mixture's central interval that holds y with probability `level`."""
        low, high = self._predict(X, samples=True).interval(level)
        return low.flatten().double().numpy(), high.flatten().double().numpy()

    def predict_uncertainty(self, X: ArrayLike) -> dict[str, np.ndarray]:
        """The total, aleatoric and epistemic variance, (rows,) each, in squared units of y."""
        p = self._predict(X)
        parts = {"total": p.total, "aleatoric": p.aleatoric, "epistemic": p.epistemic}
        return {name: part.flatten().numpy() for name, part in parts.items()}
