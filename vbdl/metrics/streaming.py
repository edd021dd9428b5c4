"""Accumulators that compute metrics over streams of batches: update, compute, merge, reset.

`Mean` averages any score of single rows in O(1) memory. `Rows` is for metrics that cannot be computed exactly in
bounded memory, because they sort all rows: it keeps the rows.
"""

import math
from collections.abc import Callable
from typing import Generic, Protocol, Self, SupportsFloat, TypeVar

import torch
from torch import Tensor

from vbdl.metrics._checks import check_finite
from vbdl.metrics.estimate import Estimate, Interval, bootstrap

Value = TypeVar("Value", bound=SupportsFloat)


class Mean:
    """The mean of a score of single rows with its standard error, in O(1) memory: Mean(brier_score), ...

    Batches are merged by the method of Chan, Golub, LeVeque, Algorithms for Computing the Sample Variance, 1983,
    https://doi.org/10.1080/00031305.1983.10483115

    >>> probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6]])
    >>> y = torch.tensor([0, 1, 1])
    >>> from vbdl.metrics import Mean, brier_score
    >>> score = Mean(brier_score)
    >>> score.update(probs[:2], y[:2])
    >>> score.update(probs[2:], y[2:])
    >>> round(score.compute().value, 3), score.compute().n
    (0.54, 3)
    """

    def __init__(self, score: Callable[..., Tensor]):
        self.score = score
        self.reset()

    def reset(self) -> None:
        self.n = 0
        self.mean = 0.0
        self.m2 = 0.0  # sum of squared deviations from the mean

    def update(self, *args: Tensor, **kwargs: object) -> None:
        """Add a batch, given as the arguments of the score, which returns (batch,). An empty batch changes nothing."""
        scores = check_finite(self.score(*args, **kwargs), "the score").reshape(-1)
        if scores.numel():
            mean = float(scores.mean())
            self._combine(scores.numel(), mean, float(((scores - mean) ** 2).sum()))

    def merge(self, other: "Mean") -> "Mean":
        """Add the rows of another accumulator of the same score; return self."""
        if other.score is not self.score and getattr(other.score, "__qualname__", None) != getattr(
            self.score, "__qualname__", other
        ):
            raise ValueError("merge needs two accumulators of the same score")
        self._combine(other.n, other.mean, other.m2)
        return self

    def _combine(self, n: int, mean: float, m2: float) -> None:
        if n == 0:
            return
        total = self.n + n
        delta = mean - self.mean
        self.mean += delta * (n / total)
        self.m2 += m2 + delta * delta * (self.n * (n / total))
        self.n = total

    def compute(self) -> Estimate:
        """The mean over all rows so far; ValueError if there are none."""
        if self.n == 0:
            raise ValueError("no rows yet: call update first")
        error = math.sqrt(self.m2 / (self.n - 1) / self.n) if self.n > 1 else math.nan
        return Estimate(self.mean, error, self.n)


class Accumulator(Protocol):
    """The interface of streaming metrics: they take batches and return the metric of all rows."""

    def update(self, *rows: Tensor) -> None:
        """Add a batch."""
        ...

    def merge(self, other: Self) -> Self:
        """Add the rows of another accumulator of the same kind; return self."""
        ...

    def compute(self) -> SupportsFloat:
        """The metric of all rows so far."""
        ...

    def reset(self) -> None:
        """Forget all rows."""
        ...


class Rows(Generic[Value]):
    """Any metric over a stream, computed exactly on all rows, which are kept on the CPU.

    >>> scores, positive = torch.tensor([0.1, 0.4, 0.35, 0.8]), torch.tensor([0, 0, 1, 1])
    >>> from vbdl.metrics import Rows, auroc
    >>> metric = Rows(auroc)
    >>> metric.update(scores[:2], positive[:2])
    >>> metric.update(scores[2:], positive[2:])
    >>> metric.compute()
    0.75
    """

    def __init__(self, metric: Callable[..., Value]):
        self.metric = metric
        self.reset()

    def reset(self) -> None:
        self.rows: list[tuple[Tensor, ...]] = []

    def update(self, *rows: Tensor) -> None:
        """Add a batch, given as the arguments of the metric, tensors (batch, ...)."""
        if len({r.shape[0] for r in rows}) != 1:
            raise ValueError(f"all tensors must have the same number of rows, got {[r.shape[0] for r in rows]}")
        if self.rows and len(self.rows[0]) != len(rows):
            raise ValueError(f"earlier batches had {len(self.rows[0])} tensors, this one has {len(rows)}")
        # copied: a view would keep the caller's batch in memory and change with it
        self.rows.append(tuple(r.detach().to("cpu", copy=True) for r in rows))

    def merge(self, other: Self) -> Self:
        """Append the rows of another accumulator; return self."""
        self.rows.extend(other.rows)
        return self

    def compute(self) -> Value:
        """The metric of all rows so far; ValueError if there are none."""
        return self.metric(*self._columns())

    def interval(self, level: float = 0.95, n_resamples: int = 1000, seed: int = 0) -> Interval:
        """The bootstrap interval of the metric over all rows so far; see `bootstrap`."""
        return bootstrap(self.metric, *self._columns(), n_resamples=n_resamples, level=level, seed=seed)

    def _columns(self) -> list[Tensor]:
        if not self.rows:
            raise ValueError("no rows yet: call update first")
        return [torch.cat(columns) for columns in zip(*self.rows, strict=True)]
