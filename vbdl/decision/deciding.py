"""Predictors that decide: `vbdl.with_decision` adds the field `action` to predictions."""

import copy
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vbdl.calibration.calibrated import calibrated_draws, changes_draws
from vbdl.decision.distribution import Distribution, Evidence
from vbdl.decision.referral import KNOWS_NONE
from vbdl.engine.predictor import Predictor
from vbdl.likelihoods.around import Around, layers
from vbdl.likelihoods.centered import Centered
from vbdl.likelihoods.moments import merge_mean
from vbdl.likelihoods.normal_mixture import NormalLikelihood
from vbdl.model import first_network
from vbdl.types import Decision, Likelihood, Prediction, State

_PLAIN = Decision()  # the requests of a decision that is a plain module: only the fields of the prediction


class DecidingLikelihood(Around):
    """A likelihood whose predictions have `action`, computed by a decision module in the same compiled call.

    A decision gets the fields of the prediction and what it requests as a `vbdl.types.Decision`. If it reads the
    calibrated distribution of a regression, all draws of a row are kept until the end.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> predict = vbdl.Predictor(vbdl.DeepEnsemble(net, 4), vbdl.Categorical(), compile=False)
    >>> deciding = vbdl.with_decision(predict, vbdl.decision.Referral("total", threshold=0.5))
    >>> type(deciding.likelihood).__name__, type(deciding.likelihood.decision).__name__
    ('DecidingLikelihood', 'Referral')
    """

    decides = True
    decision: nn.Module

    def __init__(self, likelihood: Likelihood, decision: nn.Module):
        super().__init__(likelihood)
        self.decision = decision
        self._places = 1  # number of draws that running sums have room for; see for_draws

    @property
    def n_members(self) -> int | None:
        return self.likelihood.n_members

    @property
    def _asks(self) -> Decision:
        return self.decision if isinstance(self.decision, Decision) else _PLAIN

    def for_draws(self, n: int) -> None:
        """Set the number of draws that running sums have room for, because a compiled call cannot extend them."""
        self._places = n

    # A distance is the same for every draw. It travels with the parameters of p(y | x), in a further last axis of two.

    @property
    def reads_layer(self) -> str | None:
        return self._asks.reads_layer

    def with_features(self, parameters: Tensor, features: Tensor) -> Tensor:
        distance = self._asks.distance(features).to(parameters.dtype)
        return torch.stack((parameters, distance.reshape(-1, *[1] * (parameters.ndim - 1)).expand_as(parameters)), -1)

    def _of_draws(self, carried: Tensor) -> Tensor:
        return carried if self.reads_layer is None else carried[..., 0]

    def check_targets(self, y: Tensor, parameters_shape: Sequence[int]) -> Tensor:
        return super().check_targets(y, parameters_shape if self.reads_layer is None else parameters_shape[:-1])

    def nll(self, parameters: Tensor, y: Tensor) -> Tensor:
        return super().nll(self._of_draws(parameters), y)

    def training_loss(self, parameters: Tensor, y: Tensor) -> Tensor:
        return super().training_loss(self._of_draws(parameters), y)

    def prediction(self, fields: State, n_samples: int | Tensor, samples: Tensor | None = None) -> Prediction:
        return super().prediction(fields, n_samples, None if samples is None else self._of_draws(samples))

    def summarize(self, parameters: Tensor) -> State:
        if self.reads_layer is None:
            return self._summarized(parameters)
        distance = parameters[(0, slice(None), *[0] * (parameters.ndim - 3), 1)]
        return {**self._summarized(self._of_draws(parameters)), "distance": distance}

    def _summarized(self, parameters: Tensor) -> State:
        summary = self.likelihood.summarize(parameters)
        if self._keeps_draws:
            empty = max(self._places - parameters.shape[0], 0)
            filled = torch.cat((parameters, parameters.new_zeros(empty, *parameters.shape[1:])))
            return {
                **summary,
                "draws": filled.movedim(0, 1).contiguous(),
            }  # the rows' axis first, as in all running sums
        if not self._asks.reads_draws:
            return summary
        return {**summary, "per_draw": self._asks.per_draw(_about(parameters, self._center)).mean(0)}

    def merge(self, a: State, b: State) -> State:
        merged = self.likelihood.merge(a, b)
        if "distance" in b:
            merged["distance"] = b["distance"]  # a may be the sums of no draws
        if "per_draw" in a:
            merged["per_draw"] = merge_mean(a["n"], a["per_draw"], b["n"], b["per_draw"])
        if "draws" in a:
            places = a["draws"].shape[1]
            place = torch.arange(places, device=a["draws"].device) - a["n"].to(torch.int64)
            mine = ((place >= 0) & (place < b["n"])).reshape(1, -1, *[1] * (a["draws"].ndim - 2))
            merged["draws"] = torch.where(mine, b["draws"].index_select(1, place.clamp(0, places - 1)), a["draws"])
        return merged

    def finish(self, summary: State) -> State:
        fields = self.likelihood.finish(summary)
        evidence = Evidence(**fields)
        if "probs" in fields:
            probs = fields["probs"]
            binary = probs.ndim == fields["total"].ndim
            evidence.label = (probs >= 0.5).to(torch.int64) if binary else probs.argmax(-1)
        if "draws" in summary:
            evidence.distribution = self._distribution(summary, fields)
        if "per_draw" in summary:
            evidence.per_draw = summary["per_draw"]
        if "distance" in summary:
            evidence.distance = fields["distance"] = summary["distance"]
        decided = self.decision(evidence)
        return {**fields, **(decided if isinstance(decided, dict) else {"action": decided})}

    @property
    def _center(self) -> float:
        """The center that was subtracted from the targets of the innermost likelihood."""
        return sum(layer.center for layer in layers(self.likelihood) if isinstance(layer, Centered))

    @property
    def _keeps_draws(self) -> bool:
        if not isinstance(self.innermost, NormalLikelihood):
            return False
        if self._asks.reads_draws:
            return changes_draws(self.likelihood)  # if not, the mean over the draws suffices
        return self._asks.reads_distribution

    def _distribution(self, summary: State, fields: State) -> Distribution:
        draws = summary["draws"].movedim(1, 0)
        there = torch.arange(draws.shape[0], device=draws.device) < summary["n"]
        # an unused place has weight 0; it holds the mean, which calibrations keep
        middle = (fields["mean"] - self._center).to(draws.dtype)
        mean = torch.where(there.reshape(-1, *[1] * (draws.ndim - 2)), draws[..., 0], middle)
        draws, recalibration = calibrated_draws(self.likelihood, torch.stack((mean, draws[..., 1]), -1))
        return Distribution(_about(draws, self._center), there.to(torch.float64) / summary["n"], recalibration)


def _about(parameters: Tensor, center: float) -> Tensor:
    """The draws' parameters, (..., 2) mean and log-variance, with the center added back to the means."""
    if center == 0.0:
        return parameters
    mean, log_variance = parameters.to(torch.float64).unbind(-1)
    return torch.stack((mean + center, log_variance), -1)


def with_decision(predictor: Predictor, decision: nn.Module) -> Predictor:
    """Return a predictor with the same draws whose predictions have the field `action`.

    decision: Referral, OutOfDistribution, AnyOf (several rules), ExpectedCost, HandOver, Risk, AnomalyFlags, or any
        module in plain torch that maps a prediction to (batch,) actions. It can read the fields that the prediction has
        of probs, label, mean, total, aleatoric and epistemic; to read more, inherit from `vbdl.types.Decision`.

    Raises ValueError for a decision by epistemic uncertainty on a predictor of a single network, which knows none.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> predict = vbdl.Predictor(vbdl.DeepEnsemble(net, 4), vbdl.Categorical(), compile=False)
    >>> careful = vbdl.with_decision(predict, vbdl.decision.Referral("total", threshold=0.0))
    >>> careful(torch.randn(3, 4)).action  # nothing is sure enough
    tensor([-1, -1, -1])
    """
    if isinstance(predictor.likelihood, DecidingLikelihood):
        raise ValueError("this predictor already has a decision; call with_decision on the predictor without it")
    if not isinstance(decision, nn.Module):
        raise TypeError(f"decision must be an nn.Module, got {type(decision).__name__}")
    if isinstance(decision, Decision) and decision.reads_epistemic and predictor.n_samples == 1:
        raise ValueError(f"this decision is by kind='epistemic', which {KNOWS_NONE}")
    if isinstance(decision, Decision) and decision.reads_layer is not None:
        first_network(predictor.posterior)  # raises for a posterior without one
    if isinstance(decision, Decision) and decision.caution is not None:
        warnings.warn(decision.caution, stacklevel=2)
    likelihood = copy.deepcopy(predictor.likelihood)
    return predictor.replace(likelihood=DecidingLikelihood(likelihood, copy.deepcopy(decision)))
