"""Yes or no: one logit a question."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vbdl.likelihoods.moments import merge_moments, moments, per_row, standard_error
from vbdl.likelihoods.targets import check_labeled
from vbdl.types import Likelihood, Prediction, State


@dataclass(frozen=True, kw_only=True)
class BernoulliPrediction(Prediction):
    """p(y = 1 | x), averaged over the samples; one question (batch,) or several (batch, outputs). Nats.

    total is the entropy of the mean probability, aleatoric the mean entropy of the samples' probabilities, epistemic
    their difference, the mutual information of y and the parameters. samples are logits.
    """

    probs: Tensor  # (batch, ...) probability of 1

    @property
    def mean(self) -> Tensor:
        """The probability of 1, under the name every prediction has."""
        return self.probs

    @property
    def label(self) -> Tensor:
        """(batch, ...) bool, whether 1 is at least as probable as 0."""
        return self.probs >= 0.5

    @property
    def confidence(self) -> Tensor:
        """(batch, ...) probability of the label."""
        return torch.maximum(self.probs, 1 - self.probs)

    def log_prob(self, y: Tensor) -> Tensor:
        """(batch, ...) log p(y | x) in nats of the mean probability. ValueError for targets that do not fit it."""
        y = check_yes_or_no(torch.as_tensor(y, device=self.probs.device), self.probs.shape)
        picked = torch.where(y.to(torch.bool), self.probs, 1 - self.probs)
        return picked.clamp_min(torch.finfo(picked.dtype).tiny).log()


def check_yes_or_no(y: Tensor, parameters_shape: Sequence[int]) -> Tensor:
    """y as 0.0 and 1.0 in the shape of the logits, or ValueError."""
    shape = list(parameters_shape)
    if y.ndim == len(shape) + 1 and y.shape[-1] == 1:
        y = y.squeeze(-1)
    if list(y.shape) != shape:
        raise ValueError(f"targets {tuple(y.shape)} do not fit {tuple(shape)} logits")
    check_labeled(y)
    if y.numel() and not bool(((y == 0) | (y == 1)).all()):
        raise ValueError("Bernoulli targets are 0 or 1; for more classes use vbdl.Categorical()")
    return y.to(torch.float32)


class Bernoulli(Likelihood):
    """Outputs are logits of y = 1: (batch,) or (batch, 1) for one question, (batch, outputs) for several."""

    def forward(self, outputs: Tensor) -> Tensor:
        """(batch, ...) logits; a last axis of one is dropped."""
        if outputs.ndim == 0:
            raise ValueError("Bernoulli needs one logit a row, the module returned a scalar")
        return outputs.squeeze(-1) if outputs.ndim == 2 and outputs.shape[-1] == 1 else outputs

    def check_targets(self, y: Tensor, parameters_shape: Sequence[int]) -> Tensor:
        return check_yes_or_no(y, parameters_shape)

    def nll(self, parameters: Tensor, y: Tensor) -> Tensor:
        """(batch, ...) logits, (batch, ...) -> (batch,) nats, summed over the questions."""
        logits = parameters.to(torch.promote_types(parameters.dtype, torch.float32))
        return per_row(F.binary_cross_entropy_with_logits(logits, y.to(logits.dtype), reduction="none"))

    def summarize(self, parameters: Tensor) -> State:
        """(samples, batch, ...) logits -> running sums"""
        logits = parameters.to(torch.promote_types(parameters.dtype, torch.float32))
        n, mean, deviation = moments(logits.sigmoid())
        # the probability of 0 has a mean of its own: 1 - probs would have lost it where it is small
        against = (-logits).sigmoid().mean(0)
        return {"n": n, "probs": mean, "against": against, "deviation": deviation, "entropy": _entropy(logits).mean(0)}

    def merge(self, a: State, b: State) -> State:
        return merge_moments(a, b, "probs", "against", "entropy")

    def finish(self, summary: State) -> State:
        probs, aleatoric = summary["probs"], summary["entropy"]
        total = 0.0 - torch.xlogy(probs, probs) - torch.xlogy(summary["against"], summary["against"])
        return {
            "probs": probs,
            "total": total,
            "aleatoric": aleatoric,
            "epistemic": (total - aleatoric).clamp_min(0),
            "standard_error": standard_error(summary["n"], summary["deviation"]),
        }

    def prediction(self, fields: State, n_samples: int, samples: Tensor | None = None) -> BernoulliPrediction:
        return BernoulliPrediction(**fields, n_samples=n_samples, samples=samples)


def _entropy(logits: Tensor) -> Tensor:
    """Entropy of a Bernoulli of this logit, in nats: H = softplus(l) - l sigmoid(l), right at both ends."""
    size = logits.abs()
    return F.softplus(-size) + size * torch.sigmoid(-size)
