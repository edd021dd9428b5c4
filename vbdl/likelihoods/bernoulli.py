"""Binary targets: one logit per target."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vbdl.likelihoods.moments import merge_moments, moments, per_row, standard_error, wide
from vbdl.likelihoods.targets import check_labeled
from vbdl.types import DiagonalHessian, Likelihood, Prediction, State


@dataclass(frozen=True, kw_only=True)
class BernoulliPrediction(Prediction):
    """The probability p(y = 1 | x), averaged over the samples, of one target (batch,) or several (batch, outputs).

    total is the entropy of the mean probability in nats, aleatoric the mean entropy of the samples' probabilities,
    epistemic their difference, the mutual information of y and the parameters. samples are logits.
    """

    probs: Tensor  # (batch, ...) probability of 1

    @property
    def mean(self) -> Tensor:
        """The probability of 1, under the name every prediction has."""
        return self.probs

    @property
    def label(self) -> Tensor:
        """Whether 1 is at least as probable as 0, (batch, ...) bool."""
        return self.probs >= 0.5

    @property
    def confidence(self) -> Tensor:
        """The probability of the label, (batch, ...)."""
        return torch.maximum(self.probs, 1 - self.probs)

    def log_prob(self, y: Tensor) -> Tensor:
        """The log of the mean probability of y, (batch, ...), in nats. Raises ValueError for invalid targets."""
        y = check_yes_or_no(torch.as_tensor(y, device=self.probs.device), self.probs.shape)
        picked = torch.where(y.to(torch.bool), self.probs, 1 - self.probs)
        return picked.clamp_min(torch.finfo(picked.dtype).tiny).log()


def check_yes_or_no(y: Tensor, parameters_shape: Sequence[int]) -> Tensor:
    """The targets as 0.0 and 1.0 in the shape of the logits. Raises ValueError for any other values or shape."""
    shape = list(parameters_shape)
    if y.ndim == len(shape) + 1 and y.shape[-1] == 1:
        y = y.squeeze(-1)
    if list(y.shape) != shape:
        raise ValueError(f"targets {tuple(y.shape)} do not fit {tuple(shape)} logits: give one target per logit")
    check_labeled(y)
    if y.numel() and not bool(((y == 0) | (y == 1)).all()):
        raise ValueError("Bernoulli targets must be 0 or 1; for more classes use vbdl.Categorical()")
    return y.to(torch.float32)


class Bernoulli(Likelihood):
    """The likelihood of binary targets, whose outputs are logits of y = 1.

    Outputs are (batch,) or (batch, 1) for one target per row, (batch, outputs) for several.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    >>> p = vbdl.Predictor(vbdl.DeepEnsemble(net, 3), vbdl.Bernoulli(), compile=False)(torch.randn(5, 4))
    >>> p.probs.shape, p.label.dtype
    (torch.Size([5]), torch.bool)
    """

    def forward(self, outputs: Tensor) -> Tensor:
        """The logits, (batch, ...); (batch, 1) becomes (batch,)."""
        if outputs.ndim == 0:
            raise ValueError("Bernoulli needs one logit per row, the module returned a scalar: return (batch,) logits")
        return outputs.squeeze(-1) if outputs.ndim == 2 and outputs.shape[-1] == 1 else outputs

    def check_targets(self, y: Tensor, parameters_shape: Sequence[int]) -> Tensor:
        return check_yes_or_no(y, parameters_shape)

    def nll(self, parameters: Tensor, y: Tensor) -> Tensor:
        """The negative log-likelihood, (batch,), in nats, summed over a row's targets; parameters, y: (batch, ...)."""
        logits = wide(parameters)
        return per_row(F.binary_cross_entropy_with_logits(logits, y.to(logits.dtype), reduction="none"))

    def hessian(self, outputs: Tensor, y: Tensor) -> DiagonalHessian:
        """p (1 - p) of each logit, which does not depend on y."""
        return DiagonalHessian((outputs.sigmoid() * (-outputs).sigmoid()).flatten(1))

    def summarize(self, parameters: Tensor) -> State:
        """The statistics of these samples; parameters: (samples, batch, ...) logits."""
        logits = wide(parameters)
        n, mean, deviation = moments(logits.sigmoid())
        # the mean probability of 0 is kept too: 1 - probs would round it away if it is small
        against = (-logits).sigmoid().mean(0)
        return {"n": n, "probs": mean, "against": against, "deviation": deviation, "entropy": _entropy(logits).mean(0)}

    def merge(self, a: State, b: State) -> State:
        return merge_moments(a, b, "probs", "against", "entropy")

    def finish(self, summary: State) -> State:
        probs, aleatoric = summary["probs"], summary["entropy"]
        total = 0.0 - torch.xlogy(probs, probs) - torch.xlogy(summary["against"], summary["against"])
        aleatoric = torch.where(summary["n"] > 1, aleatoric, total)  # equal for one sample, but for rounding
        return {
            "probs": probs,
            "total": total,
            "aleatoric": aleatoric,
            "epistemic": (total - aleatoric).clamp_min(0),
            "standard_error": standard_error(summary["n"], summary["deviation"]),
        }

    def prediction(self, fields: State, n_samples: int | Tensor, samples: Tensor | None = None) -> BernoulliPrediction:
        return BernoulliPrediction(**fields, n_samples=n_samples, samples=samples)


def _entropy(logits: Tensor) -> Tensor:
    """The entropy of a Bernoulli with this logit, in nats: H = softplus(l) - l sigmoid(l), accurate in both tails."""
    size = logits.abs()
    return F.softplus(-size) + size * torch.sigmoid(-size)
