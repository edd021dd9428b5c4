"""The base classes of vbdl: posterior, likelihood, prediction, calibrator and decision. Imports nothing of vbdl.

Axes are always in this order: (samples, batch, classes | outputs). Samples are draws of the parameters, members are
the networks of an ensemble. Classification uncertainty is in nats, regression uncertainty is a variance in squared
target units.
"""

from vbdl.types.calibrator import Calibrator
from vbdl.types.decision import Decision
from vbdl.types.hessian import DenseHessian, DiagonalHessian, OutputHessian, SoftmaxHessian
from vbdl.types.likelihood import Likelihood, check_likelihood
from vbdl.types.posterior import Course, Posterior, TrainingRows, before_training, check_ready, is_posterior
from vbdl.types.prediction import OUTCOMES, Prediction, Recalibration
from vbdl.types.values import Arguments, Inputs, Json, Keywords, Nested, Output, State

__all__ = [
    "Arguments",
    "Calibrator",
    "Course",
    "Decision",
    "DenseHessian",
    "DiagonalHessian",
    "Inputs",
    "Json",
    "Keywords",
    "Likelihood",
    "Nested",
    "OUTCOMES",
    "Output",
    "OutputHessian",
    "Posterior",
    "Prediction",
    "Recalibration",
    "SoftmaxHessian",
    "State",
    "TrainingRows",
    "before_training",
    "check_likelihood",
    "check_ready",
    "is_posterior",
]
