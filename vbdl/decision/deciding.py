"""A predictor whose predictions carry the action."""

import copy
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from vbdl.calibration.calibrated import extend
from vbdl.engine import Predictor
from vbdl.likelihoods.moments import merge_mean
from vbdl.types import State


class _Seen(SimpleNamespace):
    """What a decision sees of a prediction."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"the decision asks for {name!r} of a prediction that has {', '.join(vars(self))}: Referral and "
            "ExpectedCost decide on classes, Risk on a regression"
        )


class DecidingLikelihood(nn.Module):
    """A likelihood whose predictions have `action`, made by a decision module in the same compiled call.

    A decision may return several fields (a dict with action among them), and may have `bounds`, a module of each
    draw's parameters whose mean over the draws it sees as `per_draw`.
    """

    likelihood: Any
    decision: Any

    def __init__(self, likelihood: nn.Module, decision: nn.Module):
        super().__init__()
        self.likelihood, self.decision = likelihood, decision

    @property
    def n_members(self) -> int:
        """Where each member has parameters of its own; AttributeError where not, as for any likelihood."""
        return self.likelihood.n_members

    def forward(self, outputs: Tensor) -> Tensor:
        return self.likelihood(outputs)

    def check_targets(self, y: Tensor, parameters_shape: Sequence[int]) -> Tensor:
        return self.likelihood.check_targets(y, parameters_shape)

    def nll(self, parameters: Tensor, y: Tensor) -> Tensor:
        return self.likelihood.nll(parameters, y)

    def training_loss(self, parameters: Tensor, y: Tensor) -> Tensor:
        return self.likelihood.training_loss(parameters, y)

    def summarize(self, parameters: Tensor) -> State:
        summary = self.likelihood.summarize(parameters)
        bounds = getattr(self.decision, "bounds", None)
        return summary if bounds is None else {**summary, "per_draw": bounds(parameters).mean(0)}

    def merge(self, a: State, b: State) -> State:
        merged = self.likelihood.merge(a, b)
        if "per_draw" in a:
            merged["per_draw"] = merge_mean(a["n"], a["per_draw"], b["n"], b["per_draw"])
        return merged

    def finish(self, summary: State) -> State:
        fields = self.likelihood.finish(summary)
        seen = _Seen(**fields)
        if "probs" in fields:
            probs = fields["probs"]
            binary = probs.ndim == fields["total"].ndim
            seen.label = (probs >= 0.5).to(torch.int64) if binary else probs.argmax(-1)
        if "per_draw" in summary:
            seen.per_draw = summary["per_draw"]
        made = self.decision(seen)
        return {**fields, **(made if isinstance(made, dict) else {"action": made})}

    def prediction(self, fields: State, n_samples: int, samples: Tensor | None = None) -> Any:
        return extend(self.likelihood.prediction, fields, n_samples, samples, ("action", "risk", "var", "es"))


def with_decision(predictor: Predictor, decision: nn.Module) -> Predictor:
    """A predictor with the same draws, whose predictions have `action`.

    decision: Referral, ExpectedCost, HandOver, Risk, AnomalyFlags, or any module that takes a prediction (its fields:
    probs, label, mean, total, aleatoric, epistemic, whichever there are) to (batch,) actions in plain torch.
    """
    if isinstance(predictor.likelihood, DecidingLikelihood):
        raise ValueError("this predictor decides already; start from the one it was made of")
    if not isinstance(decision, nn.Module):
        raise TypeError(f"a decision is a module, got {type(decision).__name__}")
    method = getattr(predictor.likelihood, "method", None)
    if getattr(decision, "bounds", None) is not None and method is not None and not hasattr(method, "inputs"):
        raise ValueError(
            f"a path risk is read from each draw, which {type(method).__name__} does not calibrate: decide on the "
            "predictor before calibration, or on an uncertainty (kind=) after it"
        )
    likelihood = copy.deepcopy(predictor.likelihood)
    deciding: Any = DecidingLikelihood(likelihood, copy.deepcopy(decision))
    return predictor.replace(likelihood=deciding)
