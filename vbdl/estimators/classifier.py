"""`VBDLClassifier`: a Bayesian neural network as a scikit-learn classifier."""

from typing import Self

import numpy as np
import torch
from numpy.typing import ArrayLike
from sklearn.base import ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets

from vbdl.estimators._base import Estimator
from vbdl.likelihoods.categorical import Categorical
from vbdl.types import Likelihood


class VBDLClassifier(ClassifierMixin, Estimator):
    """A classifier: a small multilayer perceptron with a posterior over its weights, for rows of numbers.

    method: "deep-ensemble" with n_members members, or "mc-dropout", "mean-field" or another method of `vbdl.methods`
        with n_samples draws per prediction.
    hidden: widths of the hidden layers, all equal.
    validation_fraction: share of the rows held out for early stopping, after `patience` epochs without improvement; 0
        trains for `epochs` epochs.
    standardize: whether to standardize inputs by their mean and std, which the defaults assume.
    compile: whether to compile training and prediction, which pays for many rows.

    After fit: classes_, n_features_in_, n_iter_, predictor_ (a `vbdl.Predictor` of standardized rows).

    >>> from sklearn.datasets import load_iris
    >>> x, y = load_iris(return_X_y=True)
    >>> model = vbdl.VBDLClassifier(method="mc-dropout", epochs=5).fit(x, y)
    >>> model.predict_proba(x[:2]).shape
    (2, 3)
    """

    def _likelihood(self, n_train: int) -> Likelihood:
        return Categorical()

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Train the network. X: (rows, features) finite numbers; y: (rows,) labels of any type."""
        x, y = self._checked(X, y)
        check_classification_targets(y)
        self.classes_, numbers = np.unique(y, return_inverse=True)
        self.__dict__.pop("_predictor", None)
        # two outputs for a single class too
        self._fit(x, torch.from_numpy(numbers.astype(np.int64)), max(len(self.classes_), 2), {})
        return self

    def predict_proba(self, X: ArrayLike) -> np.ndarray:
        """The class probabilities, (rows, classes), in the order of classes_, averaged over the draws."""
        probs = self._predict(X).probs
        assert probs is not None
        p = probs.double().numpy()[:, : len(self.classes_)]
        return p / p.sum(axis=1, keepdims=True)

    def predict(self, X: ArrayLike) -> np.ndarray:
        """The most probable label of each row, (rows,)."""
        probabilities = self.predict_proba(X)  # first, because it raises an error before fit
        return self.classes_[probabilities.argmax(axis=1)]

    def predict_uncertainty(self, X: ArrayLike) -> dict[str, np.ndarray]:
        """The total, aleatoric and epistemic uncertainty, (rows,) each, in nats; total = aleatoric + epistemic."""
        p = self._predict(X)
        parts = {"total": p.total, "aleatoric": p.aleatoric, "epistemic": p.epistemic}
        return {name: part.numpy() for name, part in parts.items()}
