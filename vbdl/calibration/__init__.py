"""Calibrators correct a predictor's predictions; they are fitted on rows that were not used for training.

Each is a `vbdl.types.Calibrator`. `calibrate(predictor, (x, y), method)` puts one inside a predictor; alone, its `fit`
(float64) and its `forward` accept logits, probabilities, means or levels of any model.

Into a predictor:  calibrate; its likelihood is then a CalibratedLikelihood

Logits, when probabilities are too high or too low:
    Temperature           one number: the first choice, needs few rows
    VectorScaling         a factor and a shift for each class
    MatrixScaling         a matrix between classes; needs thousands of rows

Averaged probabilities:
    EnsembleTemperature   a temperature mixed with the probabilities and a constant; keeps the most probable class
    Dirichlet             a matrix between log probabilities, with a penalty; needs thousands of rows
    Beta, Platt           two classes, or one-versus-rest: smooth curves with three and two numbers
    Isotonic              any increasing curve; needs a thousand rows
    Histogram, BBQ        a table of bins; an average of such tables

Regressions:
    StdScaling            one factor for all standard deviations: the first choice
    CDFRecalibration      quantiles that are off in a way that depends on the level

Sets and intervals with a guaranteed coverage (conformal prediction):
    ConformalSets         sets of classes, by the score LAC (smallest), APS (grows with difficulty) or RAPS
    AbsoluteIntervals     one width for all rows
    NormalizedIntervals   widths that follow the predicted uncertainty
    CQR                   predicted quantiles, moved
    AdaptiveConformal     a threshold for streams that drift, updated by every outcome
    conformal_quantile, conformal_rank, set_coverage   the parts they are made of, and their check
"""

from vbdl import former
from vbdl.calibration.adaptive_conformal import AdaptiveConformal as AdaptiveConformal
from vbdl.calibration.bbq import BBQ as BBQ
from vbdl.calibration.beta import Beta as Beta
from vbdl.calibration.calibrate import calibrate as calibrate
from vbdl.calibration.calibrated import CalibratedLikelihood as CalibratedLikelihood
from vbdl.calibration.cdf import CDFRecalibration as CDFRecalibration
from vbdl.calibration.conformal import APS as APS
from vbdl.calibration.conformal import LAC as LAC
from vbdl.calibration.conformal import RAPS as RAPS
from vbdl.calibration.conformal import ConformalSets as ConformalSets
from vbdl.calibration.conformal import set_coverage as set_coverage
from vbdl.calibration.conformal_intervals import CQR as CQR
from vbdl.calibration.conformal_intervals import AbsoluteIntervals as AbsoluteIntervals
from vbdl.calibration.conformal_intervals import NormalizedIntervals as NormalizedIntervals
from vbdl.calibration.conformal_quantile import conformal_quantile as conformal_quantile
from vbdl.calibration.conformal_quantile import conformal_rank as conformal_rank
from vbdl.calibration.dirichlet import Dirichlet as Dirichlet
from vbdl.calibration.ensemble_temperature import EnsembleTemperature as EnsembleTemperature
from vbdl.calibration.histogram import Histogram as Histogram
from vbdl.calibration.isotonic import Isotonic as Isotonic
from vbdl.calibration.matrix import MatrixScaling as MatrixScaling
from vbdl.calibration.platt import Platt as Platt
from vbdl.calibration.std_scaling import StdScaling as StdScaling
from vbdl.calibration.temperature import Temperature as Temperature
from vbdl.calibration.vector import VectorScaling as VectorScaling

__getattr__ = former.names(__name__, {"NormalisedIntervals": "NormalizedIntervals"})
