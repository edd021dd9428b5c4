"""Draws until a row's answer is settled, or until time is up.

Draws are made in steps. After each, a rule says which rows are settled; the others are packed together into fewer and
smaller tiles and go on. Since draw s is the same whatever the number of draws, every row's answer is that of a
predictor of as many samples, to rounding: statistics are merged a step at a time, a predictor merges all at once.

    predict(x, tolerance=0.01)                      standard error of every probability (or mean) at most 0.01
    predict(x, tolerance=LabelDecided(0.95))        the label is that of endless draws, with this confidence
    predict(x, tolerance=ThresholdDecided(0.2, of=1))   which side of 0.2 the probability of class 1 is on
    predict(x, deadline=0.005)                      what five milliseconds allow

The rules of decisions look after every step and stay valid however often they look: they bet on the draws. A
non-negative supermartingale that starts at 1 reaches 1 / alpha with probability at most alpha, ever (Ville, 1939).

Waudby-Smith and Ramdas, Estimating Means of Bounded Random Variables by Betting, JRSS B 2024,
https://arxiv.org/abs/2010.09686
Howard, Ramdas, McAuliffe and Sekhon, Time-uniform, Nonparametric, Nonasymptotic Confidence Sequences, Annals of
Statistics 2021, https://arxiv.org/abs/1810.08240
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any, Protocol

import torch
from torch import Tensor

from vbdl.execution import Execution
from vbdl.stacking import map_inputs
from vbdl.tiles import pad
from vbdl.types import Inputs, Likelihood, State

LEAST_DRAWS = 16  # before a standard error is believed
LOOKS = 16  # steps the draws are divided into, of at least 8

# stakes, as parts of the largest that cannot lose everything: their average bets well whatever the margin is
_STAKES = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 0.95)


def step_size(n_samples: int) -> int:
    """Draws in a step."""
    return min(n_samples, max(8, -(-n_samples // LOOKS)))


class Rule(Protocol):
    """Says which rows are settled."""

    @property
    def bets(self) -> bool:
        """Whether it needs each draw's probabilities, or only the fields of the prediction so far."""
        ...

    def update(self, state: State, draws: Tensor) -> State:
        """What is known after these draws' probabilities (draws, rows, ...); {} before the first."""
        ...

    def settled(self, fields: State, count: int, state: State) -> Tensor:
        """(rows,) bool"""
        ...


@dataclass(frozen=True)
class StandardError:
    """Settled when the standard error of every mean of a row, probabilities or outputs, is at most this.

    An estimate, as standard errors are: it is believed from 16 draws on.
    """

    at_most: float
    bets = False

    def __post_init__(self):
        if not (self.at_most > 0 and math.isfinite(self.at_most)):
            raise ValueError(f"a tolerance is a standard error, positive and finite, got {self.at_most}")

    def update(self, state: State, draws: Tensor) -> State:
        return state

    def settled(self, fields: State, count: int, state: State) -> Tensor:
        error = fields["standard_error"]
        return (error.flatten(1) if error.ndim > 1 else error.unsqueeze(1)).amax(1).le(self.at_most) & (
            count >= LEAST_DRAWS
        )


@dataclass(frozen=True)
class LabelDecided:
    """Settled when the label is that of endless draws, but for a probability of 1 - confidence, row by row.

    The label of the first step is held against every other class on the draws that follow: against class b the stake
    is on p(label) - p(b), whose mean is not positive if b is the better one. One bet alone has to be lost for an
    error, the one against the best class, so that no share of alpha is lost to the number of classes or of looks.
    Bernoulli: which side of 0.5.
    """

    confidence: float = 0.95
    bets = True

    def __post_init__(self):
        _check_confidence(self.confidence)

    def update(self, state: State, draws: Tensor) -> State:
        if not _over_classes(draws):
            return ThresholdDecided(0.5, self.confidence).update(state, draws)
        if not state:
            label = draws.mean(0).argmax(-1)
            return {"label": label, "wealth": draws.new_zeros(*draws.shape[1:], len(_STAKES), dtype=torch.float64)}
        label = state["label"]
        margin = draws.gather(-1, label.expand(draws.shape[:-1]).unsqueeze(-1)) - draws
        return {"label": label, "wealth": state["wealth"] + _won(margin, 1.0)}

    def settled(self, fields: State, count: int, state: State) -> Tensor:
        if "label" not in state:
            return ThresholdDecided(0.5, self.confidence).settled(fields, count, state)
        enough = _log_wealth(state["wealth"]) >= -math.log(1 - self.confidence)
        itself = torch.nn.functional.one_hot(state["label"], enough.shape[-1]).bool()
        sure = (enough | itself).all(-1) & (fields["probs"].argmax(-1) == state["label"])
        return sure.flatten(1).all(1) if sure.ndim > 1 else sure


@dataclass(frozen=True)
class ThresholdDecided:
    """Settled when it is decided which side of a threshold a probability is on, as endless draws would have it.

    of: the class; not given for Bernoulli. Wrong with a probability of at most 1 - confidence, row by row, however
    often it is looked at: of the two bets, that it is above and that it is below, only one can be lost.
    """

    threshold: float
    confidence: float = 0.95
    of: int | None = None
    bets = True

    def __post_init__(self):
        _check_confidence(self.confidence)
        if not 0.0 < self.threshold < 1.0:
            raise ValueError(f"a threshold of a probability lies between 0 and 1, got {self.threshold}")

    def update(self, state: State, draws: Tensor) -> State:
        if self.of is not None:
            if not -draws.shape[-1] <= self.of < draws.shape[-1]:
                raise ValueError(f"there are {draws.shape[-1]} classes, and of={self.of}")
            draws = draws[..., self.of]
        elif _over_classes(draws):
            raise ValueError("which class is it: ThresholdDecided(threshold, of=class)")
        beyond = draws - self.threshold
        above, below = _won(beyond, self.threshold), _won(-beyond, 1 - self.threshold)
        if not state:
            return {"above": above, "below": below}
        return {"above": state["above"] + above, "below": state["below"] + below}

    def settled(self, fields: State, count: int, state: State) -> Tensor:
        best = torch.maximum(_log_wealth(state["above"]), _log_wealth(state["below"]))
        sure = best >= -math.log(1 - self.confidence)
        return sure.flatten(1).all(1) if sure.ndim > 1 else sure


@dataclass(frozen=True)
class NeverSettled:
    """All draws for every row: what warming up runs."""

    bets = True

    def update(self, state: State, draws: Tensor) -> State:
        return state

    def settled(self, fields: State, count: int, state: State) -> Tensor:
        return torch.zeros(next(iter(fields.values())).shape[0], dtype=torch.bool)


def as_rule(tolerance: Any) -> Rule:
    """A number as the standard error it is, a rule as it is; TypeError for anything else."""
    if isinstance(tolerance, Real) and not isinstance(tolerance, bool):
        return StandardError(float(tolerance))
    if isinstance(tolerance, type) or not all(hasattr(tolerance, n) for n in ("bets", "update", "settled")):
        raise TypeError(
            f"a tolerance is a standard error or a rule of vbdl.adaptive, like LabelDecided(0.95), got {tolerance!r}"
        )
    return tolerance


def _check_confidence(confidence: float) -> None:
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"a confidence lies between 0 and 1, got {confidence}")


def _over_classes(draws: Tensor) -> bool:
    """Whether the last axis runs over classes whose probabilities sum to one."""
    return draws.ndim > 2 and torch.allclose(draws.sum(-1), draws.new_ones(()), atol=1e-3)


def _won(gains: Tensor, largest_loss: float) -> Tensor:
    """(draws, ...) gains of at least -largest_loss -> (..., stakes) log of what each stake has made of 1."""
    stakes = torch.tensor(_STAKES, dtype=torch.float64, device=gains.device) / largest_loss
    return torch.log1p(gains.double().unsqueeze(-1) * stakes).sum(0)


def _log_wealth(each: Tensor) -> Tensor:
    """Log of the average over stakes."""
    return each.logsumexp(-1) - math.log(len(_STAKES))


# -- running


@dataclass
class Steps:
    """What a predictor offers to be run step by step."""

    likelihood: Likelihood
    size: Callable[[int], int]  # rows -> the tile that takes them
    executions: Callable[[Inputs], list[Execution]]
    run: Callable[[list[Execution], str, Callable[[], State]], State]  # guards what may compile


@dataclass
class _Group:
    """Rows that go through in one tile, and what is known of them."""

    rows: Tensor  # their numbers in the batch; the tile may be larger
    tile: Inputs
    executions: list[Execution]
    begun: list[Any]  # of each execution, what its steps share
    carried: State
    betted: State
    open: Tensor  # (rows,) bool, not settled yet
    count: int = 0


def predict(
    x: Inputs,
    rows: int,
    steps: Steps,
    rule: Rule | None = None,
    deadline: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[State, Tensor]:
    """The fields of the prediction of these rows, and (rows,) the number of draws each is based on.

    deadline: seconds from now; the first step of every row is made in any case, a later one only where the time the
    last one took is left.
    """
    begun_at = clock()
    fields: State = {}
    counts = torch.zeros(rows, dtype=torch.int64)

    def write(group: _Group, found: State, which: Tensor) -> None:
        for name, t in found.items():
            if name not in fields:
                fields[name] = t.new_empty(rows, *t.shape[1:])
            fields[name][group.rows[which].to(t.device)] = t[: len(group.rows)][which.to(t.device)]
        counts[group.rows[which]] = group.count

    groups = _packed(x, torch.arange(rows), steps, None)
    first = groups[0]
    places = [(part, index) for part, e in enumerate(groups[0].executions) for index in range(e.n_steps)]
    longest, late = 0.0, False
    for number, (part, index) in enumerate(places):
        for group in groups:
            begun = clock()
            late = late or (deadline is not None and number > 0 and begun - begun_at + longest > deadline)
            if late:
                break
            _step(group, part, index, steps, rule)
            longest = max(clock() - begun, longest if number > 1 else 0.0)  # the first may have made the draws
        if late:
            break
        if rule is None or number == len(places) - 1:
            continue
        for group in groups:
            found = steps.likelihood.finish(group.carried)
            done = rule.settled(found, group.count, group.betted)[: len(group.rows)].cpu() & group.open
            if bool(done.any()):
                write(group, found, done)
                group.open = group.open & ~done
        groups = [g for g in groups if bool(g.open.any())]
        left = sum(int(g.open.sum()) for g in groups)
        if not left:
            break
        size = steps.size(left)
        if -(-left // size) * size < sum(_rows_of(g.tile) for g in groups):
            groups = _packed(x, torch.cat([g.rows[g.open] for g in groups]), steps, groups)
    for group in groups:
        if bool(group.open.any()):
            write(group, steps.likelihood.finish(group.carried), group.open)
    if not rows:
        fields = {n: t[:0] for n, t in steps.likelihood.finish(first.carried).items()}
    return fields, counts


def _rows_of(tile: Inputs) -> int:
    found: list[int] = []
    map_inputs(lambda t: found.append(t.shape[0]) or t, tile)
    return found[0]


def _packed(x: Inputs, rows: Tensor, steps: Steps, before: list[_Group] | None) -> list[_Group]:
    """These rows in as few tiles as hold them, with what the groups before knew of them."""
    size, groups = steps.size(len(rows)), []
    known: list[State] = []
    if before is not None:
        known = [_gathered([g.carried for g in before], before), _gathered([g.betted for g in before], before)]
    mine = map_inputs(lambda t: t.index_select(0, rows.to(t.device)), x)
    for start in range(0, max(len(rows), 1), size):
        tile = pad(mine, start, size)
        executions = steps.executions(tile)
        one = rows[start : start + size]
        group = _Group(one, tile, executions, [None] * len(executions), {}, {}, torch.ones(len(one), dtype=torch.bool))
        if before is None:
            group.carried = executions[0].empty_sums()
        else:
            group.carried, group.betted = (_part(state, start, size) for state in known)
            group.count = before[0].count
        groups.append(group)
    return groups


def _gathered(states: list[State], groups: list[_Group]) -> State:
    """Entries of the rows still open, one after the other; a scalar is the same for all."""
    return {
        n: t if t.ndim == 0 else torch.cat(
            [s[n][: len(g.rows)][g.open.to(t.device)] for s, g in zip(states, groups, strict=True)]
        )
        for n, t in states[0].items()
    }  # fmt: skip


def _part(state: State, start: int, size: int) -> State:
    return {n: t if t.ndim == 0 else pad(t, start, size) for n, t in state.items()}  # type: ignore[misc]


def _step(group: _Group, part: int, index: int, steps: Steps, rule: Rule | None) -> None:
    execution = group.executions[part]
    end = "sums" if rule is None or not rule.bets else "parameters"

    def run() -> State:
        if group.begun[part] is None:
            group.begun[part] = execution.begin(group.tile)
        return execution.step(index, group.begun[part], group.carried if end == "sums" else {}, end)

    found = steps.run(group.executions, f"{end} of {execution.step_count(index)} in part {part}", run)
    group.count += execution.step_count(index)
    if end == "sums":
        group.carried = found
        return
    assert rule is not None
    draws, likelihood = found["parameters"], steps.likelihood
    if isinstance(rule, NeverSettled):
        return
    group.carried = likelihood.merge(group.carried, likelihood.summarize(draws))
    each = [likelihood.finish(likelihood.summarize(d.unsqueeze(0))) for d in draws]
    if "probs" not in each[0]:
        raise ValueError(f"{type(rule).__name__} decides between classes: for outputs use a standard error")
    probs = torch.stack([e["probs"] for e in each])
    if index == part == 0 and not torch.allclose(
        probs.mean(0), likelihood.finish(group.carried)["probs"], rtol=0, atol=1e-4
    ):
        raise ValueError(
            f"{type(rule).__name__} bets on the probabilities of each draw, whose average must be the prediction's: "
            f"{type(likelihood).__name__} makes something else of them. Use a standard error, or calibrate the logits"
        )
    group.betted = rule.update(group.betted, probs)
