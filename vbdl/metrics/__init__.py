"""Metrics of predictions and of uncertainties.

A score of single rows returns (batch,); pass it to `Mean` to average it over a stream, and its result to
`mean_estimate` (mean with standard error) or `compare` (two methods, paired). A metric of a whole set returns a number;
`bootstrap` gives it an interval. A metric that can be computed exactly in bounded memory has a streaming class beside
it; wrap the others in `Rows`.

Right or wrong:           accuracy, accuracy_interval, correct, rmse, squared_error
Likelihood of targets:    categorical_nll, gaussian_nll, mixture_nll
Proper scores:            brier_score, brier_decomposition (BrierParts; streaming BrierDecomposition), crps_gaussian,
                          crps_mixture, crps_samples, energy_score (several outputs jointly)
Calibration of classes:   ece, mce, ece_sweep, debiased_calibration_error (few rows), classwise_ece, joint_ece,
                          skce with median_distance; streaming CalibrationError (with the diagram, Reliability),
                          ClasswiseCalibrationError, JointCalibrationError
Intervals and quantiles:  covered, interval_coverage, interval_width, interval_score, sharpness, gaussian_cdf,
                          mixture_cdf, quantile_calibration_error; streaming QuantileCalibration
Does it find the errors:  risk_coverage (RiskCoverage), aurc, excess_aurc, risk_at_coverage, coverage_at_risk
Does it separate two:     auroc, auroc_interval, aupr, fpr_at_tpr
Do members differ:        diversity (Diversity)
Streams:                  Mean of a score of rows; Rows of any metric; as_torchmetric
Errors of estimates:      mean_estimate (Estimate), bootstrap, block_interval (rows in time) and proportion_interval
                          (Interval), compare (Comparison)
"""

from vbdl.metrics.accuracy import accuracy as accuracy
from vbdl.metrics.accuracy import accuracy_interval as accuracy_interval
from vbdl.metrics.accuracy import correct as correct
from vbdl.metrics.accuracy import rmse as rmse
from vbdl.metrics.accuracy import squared_error as squared_error
from vbdl.metrics.as_torchmetric import as_torchmetric as as_torchmetric
from vbdl.metrics.brier import BrierDecomposition as BrierDecomposition
from vbdl.metrics.brier import BrierParts as BrierParts
from vbdl.metrics.brier import brier_decomposition as brier_decomposition
from vbdl.metrics.brier import brier_score as brier_score
from vbdl.metrics.calibration_error import CalibrationError as CalibrationError
from vbdl.metrics.calibration_error import Reliability as Reliability
from vbdl.metrics.calibration_error import debiased_calibration_error as debiased_calibration_error
from vbdl.metrics.calibration_error import ece as ece
from vbdl.metrics.calibration_error import ece_sweep as ece_sweep
from vbdl.metrics.calibration_error import mce as mce
from vbdl.metrics.classwise_calibration import ClasswiseCalibrationError as ClasswiseCalibrationError
from vbdl.metrics.classwise_calibration import classwise_ece as classwise_ece
from vbdl.metrics.crps import crps_gaussian as crps_gaussian
from vbdl.metrics.crps import crps_mixture as crps_mixture
from vbdl.metrics.crps import crps_samples as crps_samples
from vbdl.metrics.crps import energy_score as energy_score
from vbdl.metrics.diversity import Diversity as Diversity
from vbdl.metrics.diversity import diversity as diversity
from vbdl.metrics.estimate import Comparison as Comparison
from vbdl.metrics.estimate import Estimate as Estimate
from vbdl.metrics.estimate import Interval as Interval
from vbdl.metrics.estimate import block_interval as block_interval
from vbdl.metrics.estimate import bootstrap as bootstrap
from vbdl.metrics.estimate import compare as compare
from vbdl.metrics.estimate import mean_estimate as mean_estimate
from vbdl.metrics.estimate import proportion_interval as proportion_interval
from vbdl.metrics.intervals import QuantileCalibration as QuantileCalibration
from vbdl.metrics.intervals import covered as covered
from vbdl.metrics.intervals import gaussian_cdf as gaussian_cdf
from vbdl.metrics.intervals import interval_coverage as interval_coverage
from vbdl.metrics.intervals import interval_score as interval_score
from vbdl.metrics.intervals import interval_width as interval_width
from vbdl.metrics.intervals import mixture_cdf as mixture_cdf
from vbdl.metrics.intervals import quantile_calibration_error as quantile_calibration_error
from vbdl.metrics.intervals import sharpness as sharpness
from vbdl.metrics.joint_calibration import JointCalibrationError as JointCalibrationError
from vbdl.metrics.joint_calibration import joint_ece as joint_ece
from vbdl.metrics.kernel_calibration import median_distance as median_distance
from vbdl.metrics.kernel_calibration import skce as skce
from vbdl.metrics.nll import categorical_nll as categorical_nll
from vbdl.metrics.nll import gaussian_nll as gaussian_nll
from vbdl.metrics.nll import mixture_nll as mixture_nll
from vbdl.metrics.ranking import aupr as aupr
from vbdl.metrics.ranking import auroc as auroc
from vbdl.metrics.ranking import auroc_interval as auroc_interval
from vbdl.metrics.ranking import fpr_at_tpr as fpr_at_tpr
from vbdl.metrics.selective import RiskCoverage as RiskCoverage
from vbdl.metrics.selective import aurc as aurc
from vbdl.metrics.selective import coverage_at_risk as coverage_at_risk
from vbdl.metrics.selective import excess_aurc as excess_aurc
from vbdl.metrics.selective import risk_at_coverage as risk_at_coverage
from vbdl.metrics.selective import risk_coverage as risk_coverage
from vbdl.metrics.streaming import Mean as Mean
from vbdl.metrics.streaming import Rows as Rows
