"""A predictor whose predictions carry the action."""

import copy
import warnings
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from vbdl.calibration.calibrated import extend
from vbdl.decision.distribution import Distribution, calibrated_draws, changes_draws
from vbdl.engine import Predictor
from vbdl.likelihoods.centered import Centered
from vbdl.likelihoods.moments import merge_mean
from vbdl.likelihoods.normal_mixture import NormalLikelihood
from vbdl.types import Likelihood, State


class _Seen(SimpleNamespace):
    """What a decision sees of a prediction."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"the decision asks for {name!r} of a prediction that has {', '.join(vars(self))}: Referral and "
            "ExpectedCost decide on classes, Risk on a regression"
        )


class DecidingLikelihood(Likelihood):
    """A likelihood whose predictions have `action`, made by a decision module in the same compiled call.

    A decision may return several fields (a dict with action among them), and may have `bounds`, a module of each
    draw's parameters whose mean over the draws it sees as `per_draw`. One with `reads_distribution` sees the
    calibrated predictive of a regression as `distribution`: for it all draws of a row are kept until the end.
    """

    likelihood: Any
    decision: Any

    def __init__(self, likelihood: nn.Module, decision: nn.Module):
        super().__init__()
        self.likelihood, self.decision = likelihood, decision
        self._places = 1  # for draws; the predictor says how many there are

    @property
    def n_members(self) -> int | None:
        return self.likelihood.n_members

    @property
    def wrapped(self) -> Likelihood:
        return self.likelihood

    def forward(self, outputs: Tensor) -> Tensor:
        return self.likelihood(outputs)

    def check_targets(self, y: Tensor, parameters_shape: Sequence[int]) -> Tensor:
        return self.likelihood.check_targets(y, parameters_shape)

    def nll(self, parameters: Tensor, y: Tensor) -> Tensor:
        return self.likelihood.nll(parameters, y)

    def training_loss(self, parameters: Tensor, y: Tensor) -> Tensor:
        return self.likelihood.training_loss(parameters, y)

    def for_draws(self, n: int) -> None:
        """Room for so many draws in running sums, which a compiled call cannot lengthen."""
        self._places = n

    def summarize(self, parameters: Tensor) -> State:
        summary = self.likelihood.summarize(parameters)
        if self._keeps_draws:
            empty = max(self._places - parameters.shape[0], 0)
            filled = torch.cat((parameters, parameters.new_zeros(empty, *parameters.shape[1:])))
            return {**summary, "draws": filled.movedim(0, 1).contiguous()}  # rows first, as all running sums
        bounds = getattr(self.decision, "bounds", None)
        if bounds is None:
            return summary
        return {**summary, "per_draw": bounds(_about(parameters, self._center)).mean(0)}

    def merge(self, a: State, b: State) -> State:
        merged = self.likelihood.merge(a, b)
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
        seen = _Seen(**fields)
        if "probs" in fields:
            probs = fields["probs"]
            binary = probs.ndim == fields["total"].ndim
            seen.label = (probs >= 0.5).to(torch.int64) if binary else probs.argmax(-1)
        if "draws" in summary:
            seen.distribution = self._distribution(summary, fields)
        if "per_draw" in summary:
            seen.per_draw = summary["per_draw"]
        made = self.decision(seen)
        return {**fields, **(made if isinstance(made, dict) else {"action": made})}

    @property
    def _center(self) -> float:
        """What the targets of the innermost likelihood are counted from."""
        base, center = self.wrapped, 0.0
        while base is not None:
            center += base.center if isinstance(base, Centered) else 0.0
            base = base.wrapped
        return center

    @property
    def _keeps_draws(self) -> bool:
        if not isinstance(self.innermost, NormalLikelihood):
            return False
        if getattr(self.decision, "bounds", None) is not None:
            return changes_draws(self.likelihood)  # otherwise each draw's own mean is all that is needed
        return getattr(self.decision, "reads_distribution", False)

    def _distribution(self, summary: State, fields: State) -> Distribution:
        draws = summary["draws"].movedim(1, 0)
        there = torch.arange(draws.shape[0], device=draws.device) < summary["n"]
        # an empty place is at the mean, which calibrations stretch about, and has no weight
        own = (fields["mean"] - self._center).to(draws.dtype)
        mean = torch.where(there.reshape(-1, *[1] * (draws.ndim - 2)), draws[..., 0], own)
        draws, recalibration = calibrated_draws(self.likelihood, torch.stack((mean, draws[..., 1]), -1))
        return Distribution(_about(draws, self._center), there.to(torch.float64) / summary["n"], recalibration)

    def prediction(self, fields: State, n_samples: int, samples: Tensor | None = None) -> Any:
        return extend(self.likelihood.prediction, fields, n_samples, samples, ("action", "risk", "var", "es"))


def _about(parameters: Tensor, center: float) -> Tensor:
    """Parameters of draws, (..., 2) mean and log-variance, of targets that are counted from zero again."""
    if center == 0.0:
        return parameters
    mean, log_variance = parameters.to(torch.float64).unbind(-1)
    return torch.stack((mean + center, log_variance), -1)


def with_decision(predictor: Predictor, decision: nn.Module) -> Predictor:
    """A predictor with the same draws, whose predictions have `action`.

    decision: Referral, ExpectedCost, HandOver, Risk, AnomalyFlags, or any module that takes a prediction (its fields:
    probs, label, mean, total, aleatoric, epistemic, whichever there are) to (batch,) actions in plain torch.
    """
    if isinstance(predictor.likelihood, DecidingLikelihood):
        raise ValueError("this predictor decides already; start from the one it was made of")
    if not isinstance(decision, nn.Module):
        raise TypeError(f"a decision is a module, got {type(decision).__name__}")
    certificate = getattr(decision, "certificate", None)
    if certificate is not None and certificate.n_kept == 0:
        warnings.warn(certificate.refusal(), stacklevel=2)
    likelihood = copy.deepcopy(predictor.likelihood)
    deciding: Any = DecidingLikelihood(likelihood, copy.deepcopy(decision))
    return predictor.replace(likelihood=deciding)
