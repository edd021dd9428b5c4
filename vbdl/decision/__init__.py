"""Decisions from predictive distributions: refer to a person, hand over to the driver, size a risk.

Each accepts a prediction of vbdl, or probabilities, uncertainties or samples of any other model as tensors.
"""

from vbdl import former
from vbdl.decision.anomaly import AnomalyFlags as AnomalyFlags
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
