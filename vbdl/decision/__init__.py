"""Decisions from predictive distributions: refer to a person, hand over to the driver, size a risk.

Each accepts a prediction of vbdl, or probabilities, uncertainties or samples of any other model as tensors.

Into a predictor:  with_decision; its likelihood is then a DecidingLikelihood

Send uncertain rows to a person (REFER, -1):
    Referral              a threshold for a capacity, a cost, or a guaranteed risk of the rest, with its Certificate
    ReferralBudget        so many a day, row by row
    OutOfDistribution     rows whose features are far from those of the training rows
    AnyOf                 by several of these rules
    refer_most_uncertain  so many of this batch
    uncertainty_of        the number of each row that these compare

Take the cheapest action:
    ExpectedCost, decide  from probabilities and a matrix of costs
    realized_cost         what actions have cost, given the truth

Hand control over:
    HandOver              thresholds with hysteresis: a Mode for each Step, or for a row alone
    Drive                 a stream of frames with a deadline and a fail-safe
    PathBounds, path_risk, PathRisk   the probability that a path leaves its bounds

Size a risk:
    Risk                  position, value at risk and expected shortfall of a predicted return
    gaussian_tail, mixture_tail, sample_tail, TailRisk   the tails alone
    kelly_position, mean_variance_position               the positions alone
    backtest, Backtest    test a value at risk against what happened

Flag anomalies:
    AnomalyFlags          by conformal p-values, with a known rate of false alarms
"""

from vbdl import former
from vbdl.decision.anomaly import AnomalyFlags as AnomalyFlags
from vbdl.decision.any_of import AnyOf as AnyOf
from vbdl.decision.backtest import Backtest as Backtest
from vbdl.decision.backtest import backtest as backtest
from vbdl.decision.cost import REFER as REFER
from vbdl.decision.cost import ExpectedCost as ExpectedCost
from vbdl.decision.cost import decide as decide
from vbdl.decision.cost import realized_cost as realized_cost
from vbdl.decision.deciding import DecidingLikelihood as DecidingLikelihood
from vbdl.decision.deciding import with_decision as with_decision
from vbdl.decision.drive import Drive as Drive
from vbdl.decision.handover import HandOver as HandOver
from vbdl.decision.handover import Mode as Mode
from vbdl.decision.handover import Step as Step
from vbdl.decision.out_of_distribution import OutOfDistribution as OutOfDistribution
from vbdl.decision.path_risk import PathBounds as PathBounds
from vbdl.decision.path_risk import PathRisk as PathRisk
from vbdl.decision.path_risk import path_risk as path_risk
from vbdl.decision.position import kelly_position as kelly_position
from vbdl.decision.position import mean_variance_position as mean_variance_position
from vbdl.decision.referral import Certificate as Certificate
from vbdl.decision.referral import Referral as Referral
from vbdl.decision.referral import ReferralBudget as ReferralBudget
from vbdl.decision.referral import refer_most_uncertain as refer_most_uncertain
from vbdl.decision.referral import uncertainty_of as uncertainty_of
from vbdl.decision.risk import Risk as Risk
from vbdl.decision.risk import TailRisk as TailRisk
from vbdl.decision.risk import gaussian_tail as gaussian_tail
from vbdl.decision.risk import mixture_tail as mixture_tail
from vbdl.decision.risk import sample_tail as sample_tail

__getattr__ = former.names(__name__, {"realised_cost": "realized_cost"})
