"""Tests whether a score differs significantly from a published column or from another result."""

import math
from dataclasses import dataclass

import torch
from scipy import stats

from vbdl.metrics import compare
from vbdl.report.run import PublishedRecord, ScoreRecord

ALPHA = 0.01  # significance level of paired tests over the splits
ERRORS = 2.0  # threshold in combined standard errors if only means and standard errors are published


@dataclass(frozen=True)
class Verdict:
    """The verdict of a comparison of a score with a reference: a published value or another run."""

    word: str  # "better", "worse" or "no difference found"
    difference: float  # score - reference, in the metric's units
    errors: float  # the difference in its standard errors; positive is better
    p_value: float
    paired: bool
    n: int


def sign(better: str) -> float:
    """+1 if higher values are better, -1 if lower ones are."""
    return 1.0 if better == "higher" else -1.0


def goodness(values: list[float], better: str) -> list[float]:
    """The values transformed so that higher is better: minus the distance if a nominal value is best."""
    if better in ("higher", "lower"):
        return [sign(better) * v for v in values]
    return [-abs(v - float(better)) for v in values]


def against_published(score: ScoreRecord, column: PublishedRecord) -> Verdict | None:
    """Compare a score with a published column; None if the score is not finite or has no standard error.

    Uses a paired t test if the authors published each split's value, else the distance in combined standard errors.
    """
    if score["standard_error"] is None or score["value"] is None:
        return None
    direction = sign(score["better"])
    published = column["per_split"]
    if len(published) == len(score["per_split"]) > 1:
        a, b = (torch.tensor(v, dtype=torch.float64) for v in (score["per_split"], published))
        test = compare(direction * a, direction * b)
        error = float((a - b).std()) / math.sqrt(len(a))
        errors = 0.0 if error == 0 else test.difference / error
        return Verdict(
            _word(errors, test.p_value < ALPHA),
            direction * test.difference,
            errors,
            test.p_value,
            True,
            len(a),
        )
    error = math.hypot(score["standard_error"], column["standard_error"])
    errors = direction * (score["value"] - column["mean"]) / error
    p_value = 2 * float(stats.norm.sf(abs(errors)))
    n = len(score["per_split"])
    return Verdict(_word(errors, abs(errors) > ERRORS), score["value"] - column["mean"], errors, p_value, False, n)


def between(scores: list[float], reference: list[float], better: str, alpha: float = ALPHA) -> Verdict | None:
    """Compare two results on the same splits or rows by a paired t test; None if they cannot be paired."""
    if len(scores) != len(reference) or len(scores) < 2 or None in scores or None in reference:
        return None
    a, b = (torch.tensor(goodness(v, better), dtype=torch.float64) for v in (scores, reference))
    test = compare(a, b)
    error = float((a - b).std()) / math.sqrt(len(a))
    # if all pairs differ by the same amount, the standard error is 0 and the difference certain
    errors = math.copysign(math.inf, test.difference) if error == 0 and test.difference else 0.0
    errors = test.difference / error if error else errors
    plain = sum(scores) / len(scores) - sum(reference) / len(reference)
    return Verdict(_word(test.difference, test.p_value < alpha), plain, errors, test.p_value, True, len(a))


def _word(signed: float, settled: bool) -> str:
    if not settled:
        return "no difference found"
    return "better" if signed > 0 else "worse"
