"""`VBDLClassifier`: a Bayesian network as scikit-learn knows classifiers."""

from typing import Any

import numpy as np
import torch
from sklearn.base import ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets

from vbdl.estimators._base import Estimator
from vbdl.likelihoods.categorical import Categorical


class VBDLClassifier(ClassifierMixin, Estimator):
    """A small multilayer perceptron with a posterior over its weights, for rows of numbers.

    method: "deep-ensemble" of n_members, or "mc-dropout", "mean-field" or another of `vbdl.methods` with n_samples
    draws in a prediction.
    hidden: widths of the hidden layers, all the same. validation_fraction: rows held out to stop training by, after
    `patience` epochs without a gain; 0 trains for `epochs`. standardize: inputs by their mean and std, which is what
    the settings are made for. compile: training and prediction; for many rows.

    After fit: classes_, n_features_in_, n_iter_, predictor_ (a `vbdl.Predictor` of standardized rows).
    """

    def _likelihood(self, n_train: int) -> Any:
        return Categorical()

    def fit(self, X: Any, y: Any) -> "VBDLClassifier":
        """X: (rows, features) finite numbers;  y: (rows,) labels of any kind"""
        x, y = self._checked(X, y)
        check_classification_targets(y)
        self.classes_, numbers = np.unique(y, return_inverse=True)
        self.__dict__.pop("_predictor", None)
        # one class is a constant, which two outputs can say too
        self._fit(x, torch.from_numpy(numbers.astype(np.int64)), max(len(self.classes_), 2), {})
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """(rows, classes), in the order of classes_, averaged over the draws"""
        p = self._predict(X).probs.double().numpy()[:, : len(self.classes_)]
        return p / p.sum(axis=1, keepdims=True)

    def predict(self, X: Any) -> np.ndarray:
        """(rows,) the most probable label"""
        probabilities = self.predict_proba(X)  # first: it says where nothing was fitted
        return self.classes_[probabilities.argmax(axis=1)]

    def predict_uncertainty(self, X: Any) -> dict[str, np.ndarray]:
        """total, aleatoric and epistemic, (rows,) each, in nats; total = aleatoric + epistemic"""
        p = self._predict(X)
        parts = {"total": p.total, "aleatoric": p.aleatoric, "epistemic": p.epistemic}
        return {name: part.numpy() for name, part in parts.items()}
