"""Estimates with standard errors, confidence intervals, and the comparison of two methods on the same rows."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import SupportsFloat

import torch
from scipy import stats
from torch import Tensor

from vbdl.metrics._checks import check_rate, check_scores


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval [lower, upper] at confidence `level`.

    >>> found = vbdl.metrics.mean_estimate(torch.tensor([1.0, 2.0, 3.0])).interval(0.9)
    >>> round(found.lower, 2), round(found.upper, 2)
    (0.31, 3.69)
    """

    value: float
    lower: float
    upper: float
    level: float

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.lower:.4g}, {self.upper:.4g}]"


@dataclass(frozen=True)
class Estimate:
    """A mean over n rows and its standard error, which is NaN for fewer than two rows.

    >>> found = vbdl.metrics.mean_estimate(torch.tensor([1.0, 2.0, 3.0]))
    >>> found.value, round(found.standard_error, 3), found.n
    (2.0, 0.577, 3)
    """

    value: float
    standard_error: float
    n: int

    def __float__(self) -> float:
        return self.value

    def interval(self, level: float = 0.95) -> Interval:
        """Student's t interval for the mean; ValueError if there are fewer than two rows."""
        check_rate(level, "level")
        if self.n < 2:
            raise ValueError(f"an interval needs at least two rows, there are {self.n}")
        half = float(stats.t.ppf(0.5 + level / 2, self.n - 1)) * self.standard_error
        return Interval(self.value, self.value - half, self.value + half, level)


def mean_estimate(scores: Tensor) -> Estimate:
    """The mean of the rows' scores (batch,) with its standard error.

    >>> probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6]])
    >>> y = torch.tensor([0, 1, 1])
    >>> found = vbdl.metrics.mean_estimate(vbdl.metrics.brier_score(probs, y))
    >>> round(found.value, 3), round(found.standard_error, 3)
    (0.54, 0.38)
    """
    scores = check_scores(scores)
    n = scores.numel()
    error = float(scores.std(correction=1)) / math.sqrt(n) if n > 1 else math.nan
    return Estimate(float(scores.mean()), error, n)


def proportion_interval(successes: int, n: int, level: float = 0.95) -> Interval:
    """The exact binomial interval of the proportion successes / n.

    Clopper, Pearson, The use of confidence or fiducial limits illustrated in the case of the binomial, 1934,
    https://doi.org/10.1093/biomet/26.4.404

    >>> found = vbdl.metrics.proportion_interval(0, 30)  # no error among 30 rows
    >>> found.value, round(found.upper, 3)
    (0.0, 0.116)
    """
    check_rate(level, "level")
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"need 0 <= successes <= n and n >= 1, got successes={successes}, n={n}")
    tail = (1 - level) / 2
    lower = 0.0 if successes == 0 else float(stats.beta.ppf(tail, successes, n - successes + 1))
    upper = 1.0 if successes == n else float(stats.beta.ppf(1 - tail, successes + 1, n - successes))
    return Interval(successes / n, lower, upper, level)


def bootstrap(
    metric: Callable[..., SupportsFloat],
    *rows: Tensor,
    n_resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """The percentile bootstrap interval of any metric, by resampling rows.

    rows: tensors (batch, ...). metric: metric(*rows) returns one number. The interval's value is the metric of the
    original rows. If resampling biases the metric, as it does for ECE and AURC, the interval is biased, too.

    Efron, Tibshirani, An Introduction to the Bootstrap, 1993, https://doi.org/10.1201/9780429246593

    >>> _ = torch.manual_seed(0)
    >>> logits = 3 * torch.randn(500, 3)  # too large by a factor of two
    >>> y = torch.distributions.Categorical(logits=logits / 2).sample()
    >>> probs = logits.softmax(1)
    >>> found = vbdl.metrics.bootstrap(vbdl.metrics.ece, probs, y, n_resamples=100)
    >>> found.lower < found.value < found.upper
    True
    """
    check_rate(level, "level")
    if n_resamples < 2:
        raise ValueError(f"n_resamples must be at least 2, not {n_resamples}")
    sizes = {r.shape[0] for r in rows}
    if len(sizes) != 1:
        raise ValueError(f"all tensors must have the same number of rows, got {sorted(sizes)}")
    n = sizes.pop()
    if n < 2:
        raise ValueError(f"a bootstrap needs at least two rows, there are {n}")
    generator = torch.Generator().manual_seed(seed)
    values = torch.empty(n_resamples, dtype=torch.float64)
    for i in range(n_resamples):
        index = torch.randint(n, (n,), generator=generator)
        values[i] = float(metric(*(r[index.to(r.device)] for r in rows)))
    tail = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    lower, upper = values.quantile(tail).tolist()
    return Interval(float(metric(*rows)), lower, upper, level)


def block_interval(
    metric: Callable[..., SupportsFloat], *rows: Tensor, blocks: int = 20, level: float = 0.95
) -> Interval:
    """The interval of any metric of rows in the order of time, by leaving out one block of consecutive rows at a time.

    Rows that are near in time are alike, so that intervals for independent rows are too narrow. This one holds if rows
    farther apart than a block are independent; 20 blocks make it 7 % wider than many would.

    rows: tensors (batch, ...), in the order of time. metric: metric(*rows) returns one number.
    Raises ValueError for fewer rows than blocks.

    Kuensch, The jackknife and the bootstrap for general stationary observations, Annals of Statistics, 1989,
    https://doi.org/10.1214/aos/1176347265

    >>> noise = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    >>> errors = torch.nn.functional.avg_pool1d(noise[None], 24, 1)[0]  # hours of one day are alike
    >>> found = vbdl.metrics.block_interval(lambda e: e.mean(), errors)
    >>> naive = vbdl.metrics.mean_estimate(errors).interval()
    >>> (found.upper - found.lower) > 3 * (naive.upper - naive.lower)
    True
    """
    check_rate(level, "level")
    sizes = {r.shape[0] for r in rows}
    if len(sizes) != 1:
        raise ValueError(f"all tensors must have the same number of rows, got {sorted(sizes)}")
    n = sizes.pop()
    if not 2 <= blocks <= n:
        raise ValueError(f"blocks must be from 2 to the number of rows, {n}, got {blocks}")
    value = float(metric(*rows))
    left = torch.ones(n, dtype=torch.bool)
    without = []
    for block in torch.arange(n).tensor_split(blocks):
        left[block] = False
        without.append(float(metric(*(r[left.to(r.device)] for r in rows))))
        left[block] = True
    center = math.fsum(without) / blocks
    error = math.sqrt((blocks - 1) / blocks * math.fsum((v - center) ** 2 for v in without))
    half = float(stats.t.ppf(0.5 + level / 2, blocks - 1)) * error
    return Interval(value, value - half, value + half, level)


@dataclass(frozen=True)
class Comparison:
    """The mean of a - b over rows with its interval. p_value: of the two-sided test that it is zero.

    >>> found = vbdl.metrics.compare(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.5, 2.4, 3.6]))
    >>> round(found.difference, 2), found.settled
    (-0.5, True)
    """

    difference: float
    lower: float
    upper: float
    level: float
    p_value: float
    n: int

    @property
    def settled(self) -> bool:
        """Whether the interval excludes zero."""
        return self.lower > 0 or self.upper < 0


def compare(
    scores_a: Tensor,
    scores_b: Tensor,
    level: float = 0.95,
    method: str = "t",
    n_resamples: int = 9999,
    seed: int = 0,
) -> Comparison:
    """Compare two methods by their scores on the same rows, (batch,) each.

    method: "t", Student's interval and test of the differences, or "permutation", the same interval with a p-value from
    flipping the signs of the differences, which needs no normal distribution.
    Rows must be independent; if they come in groups (tracks, patients), average the scores of each group first.

    >>> ours, theirs = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.5, 2.4, 3.6])  # a score of the same rows
    >>> found = vbdl.metrics.compare(ours, theirs)
    >>> round(found.difference, 2), round(found.p_value, 3)
    (-0.5, 0.013)
    """
    check_rate(level, "level")
    a, b = check_scores(scores_a, "scores_a"), check_scores(scores_b, "scores_b")
    if a.shape != b.shape:
        raise ValueError(f"paired scores need the same rows, got {a.numel()} and {b.numel()}")
    difference = a - b.to(a.device)
    n = difference.numel()
    if n < 2:
        raise ValueError(f"a comparison needs at least two rows, there are {n}")
    interval = mean_estimate(difference).interval(level)
    error = mean_estimate(difference).standard_error
    if method == "t":
        if error == 0.0:
            p_value = 1.0 if interval.value == 0 else 0.0
        else:
            p_value = 2 * float(stats.t.sf(abs(interval.value) / error, n - 1))
    elif method == "permutation":
        generator = torch.Generator().manual_seed(seed)
        observed, extreme, done = abs(float(difference.mean())), 0, 0
        host = difference.cpu()
        while done < n_resamples:
            # chunks keep the sign matrix below a few tens of megabytes
            size = min(n_resamples - done, max(1, 4_000_000 // n))
            signs = torch.randint(0, 2, (size, n), generator=generator, dtype=torch.int8) * 2 - 1
            means = (signs.to(torch.float64) @ host) / n
            extreme += int((means.abs() >= observed * (1 - 1e-12)).sum())
            done += size
        p_value = (extreme + 1) / (n_resamples + 1)
    else:
        raise ValueError(f"method must be 't' or 'permutation', not {method!r}")
    return Comparison(interval.value, interval.lower, interval.upper, level, p_value, n)
