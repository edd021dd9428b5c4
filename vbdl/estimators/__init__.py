"""Estimators for scikit-learn: `VBDLClassifier` and `VBDLRegressor`."""

from vbdl.estimators.classifier import VBDLClassifier as VBDLClassifier
from vbdl.estimators.regressor import VBDLRegressor as VBDLRegressor
