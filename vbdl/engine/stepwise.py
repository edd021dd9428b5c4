"""Adaptive predictions: draws are made in steps, until every row is settled or the time is up.

After each step a rule (`adaptive.py`) says which rows are settled, and the open rows are packed into fewer and smaller
tiles for the next step. Draw s is the same whatever the number of draws, so a row's answer equals that of a predictor
with as many samples, up to rounding: sums are merged step by step here, and over all draws at once there.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vbdl.calling.inputs import Flat
from vbdl.data.tiles import pad, padded
from vbdl.engine.adaptive import Rule, step_size
from vbdl.engine.chunking import Calls
from vbdl.engine.execution import Execution
from vbdl.engine.executions import Executions
from vbdl.types import Likelihood, State


@dataclass
class _Group:
    """The rows of one tile, with their statistics after `count` draws."""

    rows: Tensor  # (rows,) int64, their indices in the batch; the tile may be padded with more
    tile: Flat
    executions: Sequence[Execution]
    steps: list[Calls]  # the steps of each execution
    sums: State  # running sums of the draws so far
    rule_state: State
    open: Tensor  # (rows,) bool, True for rows that are not settled yet
    count: int = 0
    inputs: dict[int, dict[str, Tensor]] = field(default_factory=dict)  # index of an execution -> inputs of its steps


def predict(
    executions: Executions,
    x: Flat,
    rule: Rule | None = None,
    deadline: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[State, Tensor]:
    """Predict these rows step by step; return the prediction's fields, and the number of draws of each row, (rows,).

    rule: which rows are settled after a step; None: no row stops early.
    deadline: seconds from now. The first step is always made, a later one only if at least as much time is left as the
        longest step has taken so far.
    """
    started, rows = clock(), x.rows
    likelihood, settings = executions.likelihood, executions.settings
    fields: State = {}
    counts = torch.zeros(rows, dtype=torch.int64)

    def write(group: _Group, values: State, which: Tensor) -> None:
        for name, t in values.items():
            if name not in fields:
                fields[name] = t.new_empty(rows, *t.shape[1:])
            fields[name][group.rows[which].to(t.device)] = t[: len(group.rows)][which.to(t.device)]
        counts[group.rows[which]] = group.count

    groups = _packed(executions, x, torch.arange(rows), None)
    first = groups[0]
    steps = list(_steps(first))
    longest, late = 0.0, False
    for number, (part, index) in enumerate(steps):
        for group in groups:
            begun = clock()
            late = late or (deadline is not None and number > 0 and begun - started + longest > deadline)
            if late:
                break
            _step(executions, group, part, index, rule)
            longest = max(clock() - begun, longest if number > 1 else 0.0)  # the first step may include making draws
        if late:
            break
        if rule is None or number == len(steps) - 1:
            continue
        for group in groups:
            values = likelihood.finish(group.sums)
            done = rule.settled(values, group.count, group.rule_state)[: len(group.rows)].cpu() & group.open
            if bool(done.any()):
                write(group, values, done)
                group.open = group.open & ~done
        groups = [g for g in groups if bool(g.open.any())]
        left = sum(int(g.open.sum()) for g in groups)
        if not left:
            break
        size = settings.tile_for(left)
        if -(-left // size) * size < sum(g.tile.rows for g in groups):
            groups = _packed(executions, x, torch.cat([g.rows[g.open] for g in groups]), groups)
    for group in groups:
        if bool(group.open.any()):
            write(group, likelihood.finish(group.sums), group.open)
    if not rows:
        fields = {n: t[:0] for n, t in likelihood.finish(first.sums).items()}
    return fields, counts


def warm_up(executions: Executions, example: Flat) -> None:
    """Compile every step, with "sums" and with "parameters", for every tile size: open rows may be packed into any."""
    for size in executions.settings.tiles:
        (group,) = _packed(executions, pad(example, 0, size), torch.arange(size), None)
        for part, index in _steps(group):
            group.sums = _run(executions, group, part, index, "sums")
            _run(executions, group, part, index, "parameters")


def _steps(group: _Group) -> Iterator[tuple[int, int]]:
    """Yield each step as (index of its execution, index of the step in that execution)."""
    return ((part, index) for part, steps in enumerate(group.steps) for index in range(len(steps)))


def _step(executions: Executions, group: _Group, part: int, index: int, rule: Rule | None) -> None:
    """Add the draws of one step to a group's sums, count and rule state."""
    likelihood = executions.likelihood
    if rule is None or not rule.bets:
        group.sums = _run(executions, group, part, index, "sums")
    else:
        draws = _run(executions, group, part, index, "parameters")["parameters"]
        group.sums = likelihood.merge(group.sums, likelihood.summarize(draws))
        probs = _probabilities(likelihood, draws, rule)
        if index == part == 0:
            _check_average(likelihood, probs, group.sums, rule)
        group.rule_state = rule.update(group.rule_state, probs)
    group.count += group.steps[part].count(index)


def _run(executions: Executions, group: _Group, part: int, index: int, end: str) -> State:
    steps = group.steps[part]
    with executions.compiling(group.executions, f"{end} of {steps.count(index)} in part {part}"):
        if part not in group.inputs:
            group.inputs[part] = steps.inputs(group.tile)
        return steps.run(index, end, group.inputs[part], group.sums if end == "sums" else None)


def _probabilities(likelihood: Likelihood, draws: Tensor, rule: Rule) -> Tensor:
    """The probabilities of each draw alone, (draws, rows, ...). Raises ValueError if the likelihood has none."""
    each = [likelihood.finish(likelihood.summarize(draw.unsqueeze(0))) for draw in draws]
    if "probs" not in each[0]:
        raise ValueError(
            f"{type(rule).__name__} is about probabilities of classes, which {type(likelihood).__name__} does not "
            f"predict: use a standard error as the tolerance"
        )
    return torch.stack([fields["probs"] for fields in each])


def _check_average(likelihood: Likelihood, probs: Tensor, sums: State, rule: Rule) -> None:
    """Raise ValueError if the prediction is not the average of the draws' probabilities, which the rule assumes."""
    if not torch.allclose(probs.mean(0), likelihood.finish(sums)["probs"], rtol=0, atol=1e-4):
        raise ValueError(
            f"{type(rule).__name__} needs a prediction that is the average of the draws' probabilities, which that of "
            f"{type(likelihood).__name__} is not. Use a standard error as the tolerance, or calibrate the logits"
        )


def _packed(executions: Executions, x: Flat, rows: Tensor, before: list[_Group] | None) -> list[_Group]:
    """Pack these rows into as few tiles as hold them.

    rows: indices in the batch x. before: the groups that the rows come from, which hold their sums, or None at first.
    """
    settings = executions.settings
    size = settings.tile_for(len(rows))
    draws = settings.chunk_size or step_size(settings.n_samples)
    if before is not None:
        sums = _of_open_rows([g.sums for g in before], before)
        rule_state = _of_open_rows([g.rule_state for g in before], before)
    selected = x.map(lambda t: t.index_select(0, rows.to(t.device)))
    groups = []
    for start in range(0, max(len(rows), 1), size):
        tile, numbers = pad(selected, start, size), rows[start : start + size]
        each = executions.drawing(tile)
        groups.append(
            _Group(
                rows=numbers,
                tile=tile,
                executions=each,
                steps=[execution.chunking(draws) for execution in each],
                sums=each[0].empty_sums() if before is None else _slice(sums, start, size),
                rule_state={} if before is None else _slice(rule_state, start, size),
                open=torch.ones(len(numbers), dtype=torch.bool),
                count=0 if before is None else before[0].count,
            )
        )
    return groups


def _of_open_rows(states: list[State], groups: list[_Group]) -> State:
    """Concatenate the entries of all open rows; a scalar entry is the same in every group and is taken once."""
    return {
        n: t if t.ndim == 0 else torch.cat(
            [s[n][: len(g.rows)][g.open.to(t.device)] for s, g in zip(states, groups, strict=True)]
        )
        for n, t in states[0].items()
    }  # fmt: skip


def _slice(state: State, start: int, size: int) -> State:
    return {n: t if t.ndim == 0 else padded(t, start, size) for n, t in state.items()}
