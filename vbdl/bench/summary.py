"""Summaries of a method's draws on a set of rows: running sums in float64 that need each draw once."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vbdl import former
from vbdl.likelihoods.moments import merge_deviation, merge_mean, moments
from vbdl.metrics.crps import crps_mixture

_CRPS_DRAWS = 64  # draws used for the CRPS, whose cost grows with their square


@dataclass
class EvaluatedRows:
    """The quantities of each row that scores and figures need, (splits, rows) each.

    total, aleatoric and epistemic are in nats for classes, in squared units of the target for regressions.
    """

    total: Tensor
    aleatoric: Tensor
    epistemic: Tensor
    probs: Tensor | None = None  # (splits, rows, classes)
    mean: Tensor | None = None  # target units
    nll: Tensor | None = None  # nats; of densities in target units
    loss: Tensor | None = None  # squared error in squared target units, or 0/1 error
    pit: Tensor | None = None  # P(Y <= y), regression
    crps: Tensor | None = None  # target units
    draws: int = 0
    extra: dict[str, Tensor] = field(default_factory=dict)


def classified(chunks: Iterable[Tensor], y: Tensor | None) -> EvaluatedRows:
    """Summarize the draws of a classifier.

    chunks: (draws, splits, rows, classes) logits. y: (splits, rows) class indices, or None.
    """
    n, probs, entropy = 0, torch.zeros(()), torch.zeros(())
    for chunk in chunks:
        log_p = chunk.double().log_softmax(-1)
        each = log_p.exp()
        probs = probs + each.sum(0)
        entropy = entropy - (each * log_p.clamp_min(torch.finfo(torch.float64).min)).sum(-1).sum(0)
        n += len(chunk)
    probs, aleatoric = probs / n, entropy / n
    total = -torch.xlogy(probs, probs).sum(-1)
    rows = EvaluatedRows(total, aleatoric, (total - aleatoric).clamp_min(0), probs, draws=n)
    if y is not None:
        picked = probs.gather(-1, y.unsqueeze(-1)).squeeze(-1)
        rows.nll = -picked.clamp_min(torch.finfo(torch.float64).tiny).log()
        rows.loss = (probs.argmax(-1) != y).double()
    return rows


def regressed(chunks: Iterable[Tensor], y: Tensor | None, scale: Tensor, center: Tensor) -> EvaluatedRows:
    """Summarize the draws of a regression in units of the target.

    chunks: (draws, splits, rows, 1, 2) mean and log-variance, standardized. y: (splits, rows), standardized, or None.
    scale, center: (splits,) standard deviation and mean that the targets were standardized with.
    """
    count = torch.zeros((), dtype=torch.float64)
    mean = deviation = noise = log_density = pit = torch.zeros(())
    kept: list[Tensor] = []
    for chunk in chunks:
        m, log_variance = chunk[..., 0, :].double().unbind(-1)
        n, at, spread = moments(m)
        variance = log_variance.exp()
        if float(count) == 0:
            mean, deviation, noise = at, spread, variance.mean(0)
        else:
            deviation = merge_deviation(count, mean, deviation, n, at, spread)
            mean, noise = merge_mean(count, mean, n, at), merge_mean(count, noise, n, variance.mean(0))
        if y is not None:
            z = (y - m) / variance.sqrt()
            each = torch.logsumexp(-0.5 * (z.square() + log_variance), dim=0)
            log_density = each if float(count) == 0 else torch.logaddexp(log_density, each)
            pit = pit + torch.special.ndtr(z).sum(0)
        if sum(len(k) for k in kept) < _CRPS_DRAWS:
            kept.append(torch.stack((m, variance.sqrt()))[:, : _CRPS_DRAWS - sum(k.shape[1] for k in kept)])
        count = count + n
    units = scale.double().unsqueeze(1)
    epistemic = deviation / count
    squared = units.square()
    rows = EvaluatedRows((noise + epistemic) * squared, noise * squared, epistemic * squared, draws=int(count))
    rows.mean = mean * units + center.double().unsqueeze(1)
    if y is not None:
        rows.nll = -(log_density - math.log(float(count)) - 0.5 * math.log(2 * math.pi)) + units.log()
        rows.loss = ((y - mean) * units).square()
        rows.pit = (pit / count).clamp(0, 1)
        means, stds = torch.cat(kept, dim=1)
        rows.crps = crps_mixture(means, stds, y.double()) * units
    return rows


__getattr__ = former.names(__name__, {"Rows": "EvaluatedRows"})
