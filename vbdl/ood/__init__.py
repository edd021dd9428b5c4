"""Detect rows unlike the training data: scores, thresholds with guaranteed rates, and a drift monitor.

Every score is high for unfamiliar rows and returns (batch,).

From probabilities:          msp, entropy
From logits:                 energy, max_logit
From the draws of classes:   mutual_information (they disagree), expected_entropy (each is unsure), variance,
                             variation_ratio
From those of a regression:  epistemic_variance
From features of a layer:    KNN, which assumes no density, or Mahalanobis, for classes; `features` collects them
A flag with a bounded rate:  threshold_at_fpr from familiar rows, threshold_at_tpr from unfamiliar ones (Threshold)
A stream:                    DriftMonitor, an alarm that may be checked at any time
"""

from vbdl.ood.drift import DriftMonitor as DriftMonitor
from vbdl.ood.features import features as features
from vbdl.ood.knn import KNN as KNN
from vbdl.ood.mahalanobis import Mahalanobis as Mahalanobis
from vbdl.ood.scores import energy as energy
from vbdl.ood.scores import entropy as entropy
from vbdl.ood.scores import epistemic_variance as epistemic_variance
from vbdl.ood.scores import expected_entropy as expected_entropy
from vbdl.ood.scores import max_logit as max_logit
from vbdl.ood.scores import msp as msp
from vbdl.ood.scores import mutual_information as mutual_information
from vbdl.ood.scores import variance as variance
from vbdl.ood.scores import variation_ratio as variation_ratio
from vbdl.ood.threshold import Threshold as Threshold
from vbdl.ood.threshold import threshold_at_fpr as threshold_at_fpr
from vbdl.ood.threshold import threshold_at_tpr as threshold_at_tpr
