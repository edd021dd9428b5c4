"""Class targets: softmax of the outputs."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from vbdl_kernels import predictive_statistics

from vbdl.calling.stacking import is_of_a_trace
from vbdl.likelihoods.moments import merge_moments, moments, per_row, standard_error, wide
from vbdl.types import Likelihood, Prediction, SoftmaxHessian, State

_PADDING = -100  # the number of targets that torch's loss leaves out
_NO_CLASS = -(2**62)  # so that it refuses that number like any other


def _in_one_pass(parameters: Tensor) -> bool:
    """Whether the kernel can take these logits; it reads them once and makes no (samples, batch, classes) array."""
    return parameters.is_cuda and parameters.ndim == 3


@dataclass(frozen=True, kw_only=True)
class CategoricalPrediction(Prediction):
    """The class probabilities p(class | x), averaged over the samples.

    total is the entropy of the mean probabilities, aleatoric the mean entropy of the samples' probabilities, epistemic
    their difference, the mutual information of class and parameters: in nats, one value per row (or per row and pixel).
    samples are logits.
    """

    probs: Tensor  # (batch, ..., classes)
    ignore_index: int | None = None  # the number of targets that do not count, as of the likelihood

    @property
    def mean(self) -> Tensor:
        """The probabilities, under the name every prediction has."""
        return self.probs

    @property
    def label(self) -> Tensor:
        """The most probable class, (batch, ...)."""
        return self.probs.argmax(-1)

    @property
    def confidence(self) -> Tensor:
        """The probability of the label, (batch, ...)."""
        return self.probs.amax(-1)

    def log_prob(self, y: Tensor) -> Tensor:
        """The log of the mean probability of class y, (batch, ...), in nats; 0 for targets that do not count.

        Raises ValueError for invalid targets.
        """
        y = check_classes(torch.as_tensor(y, device=self.probs.device), self.probs.shape, self.ignore_index)
        ignored = None if self.ignore_index is None else y == self.ignore_index
        index = y if ignored is None else y.masked_fill(ignored, 0)
        picked = self.probs.gather(-1, index.unsqueeze(-1)).squeeze(-1)
        each = picked.clamp_min(torch.finfo(picked.dtype).tiny).log()
        return each if ignored is None else each.masked_fill(ignored, 0.0)


def check_classes(y: Tensor, parameters_shape: Sequence[int], ignore_index: int | None = None) -> Tensor:
    """The targets as int64 class numbers, (batch, ...). Raises ValueError for any other dtype, shape or class.

    parameters_shape: (batch, ..., classes). ignore_index: a number that is taken besides the classes.
    """
    *shape, classes = parameters_shape
    if y.is_floating_point() or y.dtype == torch.bool:
        raise ValueError(f"Categorical targets must be class numbers (an integer dtype), got {y.dtype}")
    if list(y.shape) != list(shape):
        raise ValueError(
            f"targets {tuple(y.shape)} do not fit outputs for {tuple(shape)}, {classes} classes: give one class number "
            f"for each"
        )
    y = y.to(torch.int64)  # in an integer dtype without a sign, a negative number is another one
    counted = y if ignore_index is None else y[y != ignore_index]
    if counted.numel() and not (0 <= int(counted.min()) and int(counted.max()) < classes):
        raise ValueError(
            f"targets run from {int(counted.min())} to {int(counted.max())}, but the module returns {classes} classes "
            f"(0 to {classes - 1})"
        )
    return y


class Categorical(Likelihood):
    """The likelihood of class targets, whose outputs are logits, (batch, ..., classes).

    class_axis: the axis of the classes in the outputs, 1 for images (batch, classes, height, width).
    ignore_index: the number of targets that do not count in the loss, such as -100 for the padding of sequences.
    Uncertainty: H[E p] = E H[p] + MI (Depeweg et al., Decomposition of Uncertainty in Bayesian Deep Learning, 2018,
    https://arxiv.org/abs/1710.07283).

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> predict = vbdl.Predictor(vbdl.DeepEnsemble(net, 4), vbdl.Categorical(), compile=False)
    >>> p = predict(torch.randn(5, 4))
    >>> p.probs.shape, p.label.shape
    (torch.Size([5, 3]), torch.Size([5]))
    >>> torch.allclose(p.total, p.aleatoric + p.epistemic)
    True
    """

    ignore_index: int | None = None

    def __init__(self, class_axis: int = -1, ignore_index: int | None = None):
        super().__init__()
        self.class_axis, self.ignore_index = class_axis, ignore_index

    def extra_repr(self) -> str:
        given = {"class_axis": (self.class_axis, -1), "ignore_index": (self.ignore_index, None)}
        return ", ".join(f"{name}={value}" for name, (value, default) in given.items() if value != default)

    def forward(self, outputs: Tensor) -> Tensor:
        """The logits with the classes moved last, (batch, ..., classes)."""
        if outputs.ndim < 2:
            raise ValueError(
                f"Categorical needs logits (batch, classes), the module returned {tuple(outputs.shape)}; "
                f"for one logit per row use vbdl.Bernoulli()"
            )
        return outputs if self.class_axis == -1 else outputs.movedim(self.class_axis, -1)

    def check_targets(self, y: Tensor, parameters_shape: Sequence[int]) -> Tensor:
        shape = list(parameters_shape)
        if self.class_axis == -1 and list(y.shape) != shape[:-1]:
            for axis in range(1, len(shape) - 1):
                if list(y.shape) == shape[:axis] + shape[axis + 1 :]:
                    raise ValueError(
                        f"targets {tuple(y.shape)} do not fit logits {tuple(shape)} with the classes last, but with "
                        f"the classes on axis {axis}: use vbdl.Categorical(class_axis={axis})"
                    )
        try:
            return check_classes(y, parameters_shape, self.ignore_index)
        except ValueError as error:
            if self.ignore_index is not None or not bool((y == _PADDING).any()):
                raise
            raise ValueError(
                f"{error}; entries of {_PADDING}, by which collators pad targets, do not count with "
                f"vbdl.Categorical(ignore_index={_PADDING})"
            ) from None

    def nll(self, parameters: Tensor, y: Tensor) -> Tensor:
        """The negative log-likelihood, (batch,), in nats, summed over the axes between batch and classes.

        parameters: (batch, ..., classes) logits; y: (batch, ...).
        """
        log_probs = wide(parameters).log_softmax(-1)
        ignored = None if self.ignore_index is None else y == self.ignore_index
        if is_of_a_trace(parameters) or y.shape != log_probs.shape[:-1]:
            if ignored is None:
                return per_row(-log_probs.gather(-1, y.unsqueeze(-1)).squeeze(-1))
            each = -log_probs.gather(-1, y.masked_fill(ignored, 0).unsqueeze(-1)).squeeze(-1)
            return per_row(each.masked_fill(ignored, 0.0))
        # the same numbers with half the operations, which is what the step of a small network takes
        index = _NO_CLASS if self.ignore_index is None else self.ignore_index
        each = F.nll_loss(log_probs.flatten(0, -2), y.flatten(), reduction="none", ignore_index=index)
        return each if y.ndim == 1 else per_row(each.view(y.shape))

    def hessian(self, outputs: Tensor, y: Tensor) -> SoftmaxHessian:
        """diag(p) - p p^T, which does not depend on the class y; 0 where it does not count."""
        probs = self(outputs).softmax(-1)
        if self.ignore_index is not None:
            probs = probs.masked_fill((y == self.ignore_index).unsqueeze(-1), 0.0)
        return SoftmaxHessian(probs, self.class_axis)

    def summarize(self, parameters: Tensor) -> State:
        """The statistics of these samples; parameters: (samples, batch, ..., classes) logits."""
        if _in_one_pass(parameters):
            samples = float(parameters.shape[0])
            statistics = predictive_statistics(parameters)
            n = torch.full((), samples, dtype=statistics.mean.dtype, device=parameters.device)
            deviation = statistics.variance * samples
            return {"n": n, "probs": statistics.mean, "deviation": deviation, "entropy": statistics.aleatoric}
        log_probs = wide(parameters).log_softmax(-1)
        probs = log_probs.exp()
        n, mean, deviation = moments(probs)
        # a class of probability 0 has log -inf and adds nothing: 0 * -inf would be nan
        entropy = 0.0 - (probs * log_probs.clamp_min(torch.finfo(log_probs.dtype).min)).sum(-1)  # never -0.0
        return {"n": n, "probs": mean, "deviation": deviation, "entropy": entropy.mean(0)}

    def merge(self, a: State, b: State) -> State:
        return merge_moments(a, b, "probs", "entropy")

    def finish(self, summary: State) -> State:
        probs, aleatoric = summary["probs"], summary["entropy"]
        total = 0.0 - torch.xlogy(probs, probs).sum(-1)  # negating the sum would give -0.0 for a certain class
        aleatoric = torch.where(summary["n"] > 1, aleatoric, total)  # equal for one sample, but for rounding
        return {
            "probs": probs,
            "total": total,
            "aleatoric": aleatoric,
            # not negative by Jensen's inequality, but rounding can give -1e-8 if all samples agree
            "epistemic": (total - aleatoric).clamp_min(0),
            "standard_error": standard_error(summary["n"], summary["deviation"]),
        }

    def prediction(
        self, fields: State, n_samples: int | Tensor, samples: Tensor | None = None
    ) -> CategoricalPrediction:
        return CategoricalPrediction(**fields, n_samples=n_samples, samples=samples, ignore_index=self.ignore_index)
