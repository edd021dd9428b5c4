"""Several rules in one decision: a row is referred if any of them refers it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vbdl.decision.cost import REFER, refer_or_answer
from vbdl.decision.distribution import Evidence
from vbdl.types import Decision, Prediction


class AnyOf(Decision):
    """A decision by several rules: the action of the first, but REFER (-1) for a row that any of them refers.

    Predictions have the field `reason`, (batch,) int64: the first rule that referred the row, counted from 1, or 0.
    `reasons` has them in words.

    rules: decisions that refer by the action -1: `Referral`, `OutOfDistribution` (at most one), `ExpectedCost`, or
        modules of yours.

    A second rule leaves fewer rows, among which the risk that `Referral.for_risk` guarantees is another. Choose its
    threshold on the rows that the other rules keep, and the promise is about exactly those rows:

        guard = OutOfDistribution(vbdl.ood.KNN()).fit(predict, x_train, x_calibration)
        known = ~guard.refers(predict, x)
        p = predict(x[known])
        rules = AnyOf([Referral().for_risk(p, p.label != y[known], risk=0.02), guard])

    >>> rules = vbdl.decision.AnyOf([vbdl.decision.Referral("total", 0.9), vbdl.decision.Referral("epistemic", 0.2)])
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> predict = vbdl.Predictor(vbdl.DeepEnsemble(net, 4), vbdl.Categorical(), compile=False)
    >>> p = vbdl.with_decision(predict, rules)(torch.randn(5, 4))
    >>> torch.equal(p.action == -1, (p.total >= 0.9) | (p.epistemic >= 0.2)), rules.reasons[1]
    (True, 'epistemic uncertainty is 0.2 or more')
    """

    def __init__(self, rules: Sequence[nn.Module]):
        super().__init__()
        if isinstance(rules, nn.Module) and not isinstance(rules, nn.ModuleList):
            raise TypeError("AnyOf takes a list of rules: AnyOf([rule, ...])")
        self.rules = nn.ModuleList(rules)
        if not len(self.rules):
            raise ValueError("AnyOf needs at least one rule")
        if any(rule.reads_draws or rule.reads_distribution for rule in self._decisions):
            raise ValueError(
                "AnyOf takes rules that refer by the action -1, like Referral, OutOfDistribution, ExpectedCost"
            )
        if sum(_reads_a_layer(rule) for rule in self._decisions) > 1:
            raise ValueError("AnyOf takes one OutOfDistribution: a prediction has one distance")

    @property
    def _decisions(self) -> list[Decision]:
        return [rule for rule in self.rules if isinstance(rule, Decision)]

    @property
    def reads_epistemic(self) -> bool:  # type: ignore[override]
        return any(rule.reads_epistemic for rule in self._decisions)

    @property
    def reads_layer(self) -> str | None:  # type: ignore[override]
        return next((rule.reads_layer for rule in self._decisions if _reads_a_layer(rule)), None)

    def distance(self, features: Tensor) -> Tensor:
        return next(rule for rule in self._decisions if _reads_a_layer(rule)).distance(features)

    @property
    def caution(self) -> str | None:
        return next((rule.caution for rule in self._decisions if rule.caution is not None), None)

    def forward(self, prediction: Prediction | Evidence) -> dict[str, Tensor]:
        """The `action` and `reason` of each row, (batch,) int64."""
        actions = [rule(prediction) for rule in self.rules]
        if wrong := [rule for rule, a in zip(self.rules, actions, strict=True) if not isinstance(a, Tensor)]:
            raise ValueError(
                f"{type(wrong[0]).__name__} does not refer by the action -1, so it cannot be part of AnyOf"
            )
        refer = torch.stack([action == REFER for action in actions])  # (rules, batch)
        any_refers = refer.any(0)
        reason = torch.where(any_refers, refer.to(torch.int64).argmax(0) + 1, 0)
        return {"action": torch.where(any_refers, REFER, actions[0]), "reason": reason}

    @property
    def fitted_in_words(self) -> str:
        return "; ".join(rule.fitted_in_words for rule in self._decisions if rule.fitted_in_words)

    @property
    def reasons(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(
            rule.reasons[0] if isinstance(rule, Decision) and rule.reasons else type(rule).__name__
            for rule in self.rules
        )

    def words(self, action: Tensor) -> list[str]:
        return refer_or_answer(action)


def _reads_a_layer(rule: Decision) -> bool:
    """Whether a rule reads features; one that is not fitted yet does not know of which layer."""
    return type(rule).reads_layer is not Decision.reads_layer
