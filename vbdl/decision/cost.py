"""The action with the lowest expected cost, or a referral to a person if that costs less.

Chow, On optimum recognition error and reject tradeoff, 1970, https://doi.org/10.1109/TIT.1970.1054406
Elkan, The Foundations of Cost-Sensitive Learning, 2001, https://dl.acm.org/doi/10.5555/1642194.1642224
"""

import torch
from torch import Tensor

from vbdl.decision.distribution import Evidence
from vbdl.types import Decision, Prediction

REFER = -1
"""The action that refers a row to a person."""


def refer_or_answer(action: Tensor) -> list[str]:
    """The word "refer" for each row that goes to a person, else "answer"; action: (batch,) int64."""
    return ["refer" if a == REFER else "answer" for a in action.tolist()]


class ExpectedCost(Decision):
    """A decision for the action argmin_a Σ_k p_k cost[k, a], or REFER (-1) if even that costs more than refer_cost.

    cost: (classes, actions), the cost of action a if the true class is k; actions need not be classes (accept,
        decline).
    refer_cost: the cost of a referral, in the same unit; None: never refer.
    Of equal costs the first action is taken, and an action rather than a referral.

    >>> cost = torch.tensor([[0.0, 1.0], [5.0, 0.0]])  # rows: the truth, columns: the action
    >>> vbdl.decision.ExpectedCost(cost)(torch.tensor([[0.9, 0.1], [0.7, 0.3]]))
    tensor([0, 1])
    """

    cost: Tensor
    refer_cost: Tensor | None

    def __init__(self, cost: Tensor, refer_cost: float | None = None):
        super().__init__()
        cost = torch.as_tensor(cost, dtype=torch.float64)
        if cost.ndim != 2 or 0 in cost.shape:
            raise ValueError(f"cost must be (classes, actions), not {tuple(cost.shape)}")
        if not bool(cost.isfinite().all()):
            raise ValueError("cost has a NaN or infinite entry; forbid an action with a large cost")
        self.register_buffer("cost", cost)
        refer = None
        if refer_cost is not None:
            refer = torch.as_tensor(refer_cost, dtype=torch.float64)
            if refer.ndim or bool(refer.isnan()):
                raise ValueError(f"refer_cost must be one number, not {refer_cost}")
        self.register_buffer("refer_cost", refer)

    @property
    def fitted_in_words(self) -> str:
        limit = "" if self.refer_cost is None else f", refer above a cost of {float(self.refer_cost):.6g}"
        return f"least expected cost of {tuple(self.cost.shape)} classes and actions{limit}"

    @property
    def reasons(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("the expected cost of every action is above that of a referral, or not finite",)

    def words(self, action: Tensor) -> list[str]:
        return ["refer" if a == REFER else f"action {a}" for a in action.tolist()]

    def expected(self, probs: Tensor) -> Tensor:
        """The expected costs: probs (batch, classes), or (batch,) of class 1 -> (batch, actions)."""
        p = probs.to(torch.float64)
        if probs.ndim == 1:
            p = torch.stack((1 - p, p), dim=1)
        if p.ndim != 2 or p.shape[1] != self.cost.shape[0]:
            raise ValueError(f"cost is for {self.cost.shape[0]} classes, probs is {tuple(probs.shape)}")
        # a sum, not a matmul, whose order of summation and thus ties would depend on the batch size
        return (p.unsqueeze(2) * self.cost).sum(dim=1)

    def forward(self, prediction: Prediction | Evidence | Tensor) -> Tensor:
        """The action for each row of a prediction with probs, or of probs: (batch,) int64.

        A row whose probabilities are not finite is referred, even without refer_cost.
        """
        expected = self.expected(prediction if isinstance(prediction, Tensor) else _probs_of(prediction))
        least, action = expected.min(dim=1)
        refer = ~expected.isfinite().all(dim=1)
        if self.refer_cost is not None:
            refer = refer | (least > self.refer_cost)
        return torch.where(refer, REFER, action)


def _probs_of(prediction: Prediction | Evidence) -> Tensor:
    """The prediction's probs, (batch, classes) or (batch,) of class 1; ValueError for regressions and multi-label."""
    probs = prediction.probs
    if probs is None:
        raise ValueError("an expected cost needs class probabilities, but this prediction is a regression")
    if probs.ndim > 1 and prediction.total.shape == probs.shape:
        raise ValueError(
            f"a cost needs one class per row, but this prediction has {probs.shape[-1]} binary outputs: decide on each "
            f"probs[:, i] separately"
        )
    return probs


def decide(probs: Tensor, cost: Tensor, refer_cost: float | None = None) -> Tensor:
    """The actions of ExpectedCost: probs (batch, classes), or (batch,) of class 1 -> (batch,) int64.

    >>> cost = torch.tensor([[0.0, 1.0], [5.0, 0.0]])  # rows: the truth, columns: the action
    >>> vbdl.decision.decide(torch.tensor([[0.9, 0.1], [0.7, 0.3]]), cost, refer_cost=0.6)
    tensor([ 0, -1])
    >>> vbdl.decision.decide(torch.tensor([[0.9, 0.1], [0.7, 0.3]]), cost, refer_cost=0.4)  # -1: refer
    tensor([-1, -1])
    """
    return ExpectedCost(cost, refer_cost)(probs)


def realized_cost(actions: Tensor, y: Tensor, cost: Tensor, refer_cost: float | None = None) -> Tensor:
    """The cost of each action, given the true class: actions, y (batch,) -> (batch,).

    >>> cost = torch.tensor([[0.0, 1.0], [5.0, 0.0]])  # rows: the truth, columns: the action
    >>> vbdl.decision.realized_cost(torch.tensor([0, 0]), torch.tensor([0, 1]), cost)
    tensor([0., 5.], dtype=torch.float64)
    """
    cost = torch.as_tensor(cost, dtype=torch.float64, device=actions.device)
    referred = actions == REFER
    if bool(referred.any()) and refer_cost is None:
        raise ValueError("some rows were referred; pass refer_cost")
    paid = cost[y.to(actions.device), actions.clamp(min=0)]
    return torch.where(referred, 0.0 if refer_cost is None else float(refer_cost), paid)
