"""Published protocols for UCI regression, and the published results.

* 2016: Gal and Ghahramani, Dropout as a Bayesian Approximation, ICML 2016, Table 1: 10 times the base epochs, batches
  of 32, rates 0.005 and 0.05. They tuned tau by Bayesian optimization on the test splits; here it is chosen from the
  grid of 2018 on the last fifth of the training part, without test rows.
* 2018: the authors' grid search, yaringal/DropoutUncertaintyExps@6eb4497: 100 times the base epochs, batches of 128,
  four rates, three values of tau, chosen for each split by validation likelihood, then trained again on all rows.
* Deep ensembles: Lakshminarayanan, Pritzel and Blundell, NeurIPS 2017, section 3.3 and Table 1.
* Mean-field: the MFVI column of Antoran, Allingham and Hernandez-Lobato, Depth Uncertainty, NeurIPS 2020.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """A column of a published table for one data set."""

    column: str  # "MC dropout 2018"
    method: str  # the registered method it is compared with; "" for reference only
    metric: str  # name of a score: "ll", "rmse", "accuracy"
    mean: float
    standard_error: float  # over the splits, of the published mean
    source: str
    differs: str = ""  # how the run's settings differ from those of the column
    per_split: tuple[float, ...] = ()  # values on the same splits, if published; they allow a paired test


@dataclass(frozen=True)
class Set:
    """The protocols' settings for one data set."""

    rows: int
    features: int
    splits: int
    hidden: int  # units of the hidden layer
    epochs: int  # base number of epochs, which the protocols multiply
    taus: tuple[float, float, float]  # noise precisions to choose from, original target units


@dataclass(frozen=True)
class Protocol:
    """The settings with which MC dropout is searched and trained."""

    name: str
    of: Set
    times_epochs: int
    batch_size: int
    rates: tuple[float, ...]

    @property
    def epochs(self) -> int:
        return self.of.epochs * self.times_epochs


SETS = {
    "boston": Set(506, 13, 20, 50, 40, (0.1, 0.15, 0.2)),
    "concrete": Set(1030, 8, 20, 50, 40, (0.025, 0.05, 0.075)),
    "energy": Set(768, 8, 20, 50, 40, (0.25, 0.5, 0.75)),
    "kin8nm": Set(8192, 8, 20, 50, 40, (150.0, 200.0, 250.0)),
    "naval": Set(11934, 16, 20, 50, 40, (30000.0, 40000.0, 50000.0)),
    "power": Set(9568, 4, 20, 50, 40, (0.05, 0.1, 0.15)),
    "protein": Set(45730, 9, 5, 100, 20, (0.025, 0.05, 0.075)),
    "wine": Set(1599, 11, 20, 50, 40, (2.5, 3.0, 3.5)),
    "yacht": Set(308, 6, 20, 50, 40, (0.25, 0.5, 0.75)),
}

PROTOCOLS = ("2016", "2018")
OWN = "own"  # no published protocol: every method trains by the data set's recipe


def protocol(name: str, of: str) -> Protocol:
    """The protocol of a year, "2016" or "2018", for a data set."""
    if name == "2016":
        return Protocol("2016", SETS[of], 10, 32, (0.005, 0.05))
    if name == "2018":
        return Protocol("2018", SETS[of], 100, 128, (0.005, 0.01, 0.05, 0.1))
    raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}, not {name!r}")


# RMSE and log-likelihood, as printed: MC dropout 2016 and 2018 (standard errors), deep ensembles and MFVI (standard
# deviations over the splits)
_PRINTED = {
    "boston": (
        (2.97, 0.19),
        (-2.46, 0.06),
        (2.9, 0.18),
        (-2.4, 0.04),
        (3.28, 1),
        (-2.41, 0.25),
        (3.218, 0.837),
        (-2.573, 0.136),
    ),
    "concrete": (
        (5.23, 0.12),
        (-3.04, 0.02),
        (4.82, 0.16),
        (-2.93, 0.02),
        (6.03, 0.58),
        (-3.06, 0.18),
        (5.894, 0.742),
        (-3.19, 0.11),
    ),
    "energy": (
        (1.66, 0.04),
        (-1.99, 0.02),
        (0.54, 0.06),
        (-1.21, 0.01),
        (2.09, 0.29),
        (-1.38, 0.22),
        (1.686, 1.016),
        (-1.961, 0.648),
    ),
    "kin8nm": ((0.1, 0), (0.95, 0.01), (0.08, 0), (1.14, 0.01), (0.09, 0), (1.2, 0.02), (0.084, 0.007), (1.055, 0.084)),
    "naval": ((0.01, 0), (3.8, 0.01), (0, 0), (4.45, 0), (0, 0), (5.63, 0.05), (0.005, 0.005), (3.389, 2.891)),
    "power": (
        (4.02, 0.04),
        (-2.8, 0.01),
        (4.01, 0.04),
        (-2.8, 0.01),
        (4.11, 0.17),
        (-2.79, 0.04),
        (4.286, 0.179),
        (-2.877, 0.041),
    ),
    "protein": (
        (4.36, 0.01),
        (-2.89, 0),
        (4.27, 0.02),
        (-2.87, 0),
        (4.71, 0.06),
        (-2.83, 0.02),
        (4.511, 0.145),
        (-2.929, 0.038),
    ),
    "wine": (
        (0.62, 0.01),
        (-0.93, 0.01),
        (0.62, 0.01),
        (-0.93, 0.01),
        (0.64, 0.04),
        (-0.94, 0.12),
        (0.66, 0.04),
        (-1.007, 0.063),
    ),
    "yacht": (
        (1.11, 0.09),
        (-1.55, 0.03),
        (0.67, 0.05),
        (-1.25, 0.01),
        (1.58, 0.48),
        (-1.18, 0.21),
        (3.419, 7.333),
        (-2.238, 0.952),
    ),
}

_ROUNDED = 0.01 / math.sqrt(12)  # standard deviation of the rounding to two printed decimals


def published(of: str, year: str, per_split: dict[str, tuple[float, ...]]) -> tuple[Published, ...]:
    """The published columns of a data set, for comparison with a run of the protocol of a year.

    per_split: {"rmse" or "ll": value of each split} of MC dropout 2018, if known.

    The energy RMSE of 2018 is printed with its standard deviation; its standard error, 0.0135, is from the log file.
    """
    printed, root = _PRINTED[of], math.sqrt(SETS[of].splits)
    columns = (
        ("MC dropout 2016", "mc-dropout", printed[0:2], 1.0, "Gal and Ghahramani 2016, Table 1"),
        ("MC dropout 2018", "mc-dropout", printed[2:4], 1.0, "Gal and Ghahramani 2018, grid search"),
        ("Deep Ensembles 2017", "deep-ensemble", printed[4:6], root, "Lakshminarayanan et al. 2017, Table 1"),
        ("MFVI (DUN 2020)", "mean-field", printed[6:8], root, "Antoran et al. 2020, standard splits"),
    )
    entries = []
    for column, method, pair, divisor, source in columns:
        for metric, (mean, spread) in zip(("rmse", "ll"), pair, strict=True):
            error = math.hypot(spread / divisor, _ROUNDED)
            known = per_split.get(metric, ()) if column == "MC dropout 2018" else ()
            if known:  # unrounded
                mean = sum(known) / len(known)
                error = math.sqrt(sum((v - mean) ** 2 for v in known) / (len(known) - 1) / len(known))
            elif column == "MC dropout 2018" and of == "energy" and metric == "rmse":
                error = 0.0135
            entries.append(Published(column, method, metric, mean, error, source, _differs(column, of, year), known))
    return tuple(entries)


def _differs(column: str, of: str, year: str) -> str:
    """The difference between an MC dropout run by the protocol of `year` and the column of the other year, or ""."""
    other = column.removeprefix("MC dropout ")
    if other in (column, year):
        return ""
    this_run, published_run = protocol(year, of), protocol(other, of)
    return (
        f"this run trained {this_run.epochs} epochs over the rates {_listed(this_run.rates)}, the column of {other} "
        f"{published_run.epochs} epochs over {_listed(published_run.rates)}"
    )


def _listed(rates: tuple[float, ...]) -> str:
    return ", ".join(f"{p:g}" for p in rates)
