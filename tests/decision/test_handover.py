import math

import pytest
import torch

from vbdl.decision import HandOver, Mode, path_risk


def _machine(**kwargs):
    return HandOver(**{"warn": (0.5, 0.3), "hand_over": (0.8, 0.6), "dwell": 3} | kwargs)


def _modes(machine, *risks):
    return [machine.step(r).mode.name[0] for r in risks]


def test_escalates_at_once_and_comes_down_one_level_after_the_dwell():
    machine = _machine(latched=False)
    assert _modes(machine, 0.1, 0.5, 0.9) == ["D", "W", "H"]
    assert _modes(machine, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1) == ["H", "H", "W", "W", "W", "D"]
    assert _modes(machine, 0.85) == ["H"]


def test_hysteresis_and_dwell_stop_chatter():
    machine = _machine(latched=False)
    # between leave and enter nothing moves, either way
    assert _modes(machine, 0.4) == ["D"]
    assert _modes(machine, 0.55, 0.4, 0.4, 0.4, 0.4) == ["W"] * 5
    # one frame above leave starts the dwell again
    assert _modes(machine, 0.1, 0.1, 0.35, 0.1, 0.1, 0.1) == ["W"] * 5 + ["D"]


def test_a_latched_hand_over_ends_only_by_resume():
    machine = _machine()
    assert _modes(machine, 0.9) == ["H"]
    assert _modes(machine, *[0.0] * 50) == ["H"] * 50
    machine.resume()
    assert _modes(machine, 0.0, 0.0, 0.0) == ["W", "W", "D"]
    machine.resume()  # nothing to resume
    assert machine.mode == Mode.DRIVE


@pytest.mark.parametrize(
    "risk, latency, reason",
    [
        (None, 0.01, "missing"),
        (0.0, 0.06, "late"),
        (0.0, None, "late"),
        (0.0, math.nan, "late"),
        (math.nan, 0.01, "not finite"),
        (math.inf, 0.01, "not finite"),
        (-math.inf, 0.01, "not finite"),
    ],
)
def test_fail_safe(risk, latency, reason):
    machine = _machine(deadline=0.05)
    assert machine.step(0.0, 0.05).mode == Mode.DRIVE
    step = machine.step(risk, latency)
    assert step.mode == Mode.HAND_OVER and step.reason == reason


def test_state_survives_a_restart():
    machine, other = _machine(latched=False), _machine(latched=False)
    _modes(machine, 0.6, 0.1, 0.1)
    other.load(machine.state())
    assert _modes(machine, 0.1) == _modes(other, 0.1) == ["D"]


def test_run_is_the_frames_in_order():
    risks = torch.tensor([0.1, 0.6, 0.9, math.nan])
    assert _machine().run(risks).tolist() == [0, 1, 2, 2]
    assert _machine(deadline=1.0).run(risks, torch.tensor([0.5, 2.0, 0.5, 0.5])).tolist() == [0, 2, 2, 2]
    with pytest.raises(ValueError, match="frames"):
        _machine().run(risks[None])


def test_bad_thresholds_are_refused():
    for bad in (
        {"warn": (0.3, 0.5)},
        {"hand_over": (0.4, 0.2)},
        {"warn": (math.nan, 0.1)},
        {"dwell": 0},
        {"deadline": 0.0},
    ):
        with pytest.raises(ValueError):
            _machine(**bad)


def test_path_risk_counts_paths_and_not_steps():
    paths = torch.zeros(4, 1, 3)
    paths[0, 0, 1] = 2.0  # crosses and comes back
    paths[1, 0, 2] = -2.0
    risk = path_risk(paths, lower=-1.0, upper=1.0)
    assert risk.probability.tolist() == [0.5]
    assert risk.by_step.tolist() == [[0.0, 0.25, 0.5]]
    assert path_risk(paths, upper=1.0).probability.tolist() == [0.25]
    # touching the bound is not crossing it
    assert path_risk(paths, upper=2.0).probability.tolist() == [0.0]


def test_path_risk_of_a_random_walk_is_the_reflection_principle():
    generator = torch.Generator().manual_seed(0)
    steps = torch.randint(0, 2, (40_000, 1, 21), generator=generator) * 2.0 - 1
    risk = path_risk(steps.cumsum(2), upper=4.5)
    # P(max_n S >= 5) = 2 P(S_n > 5) + P(S_n = 5) for the simple walk of n = 21
    p = [math.comb(21, k) / 2**21 for k in range(22)]  # k ups: S = 2k - 21
    exact = sum(p[k] for k in range(22) if 2 * k - 21 >= 5) + sum(p[k] for k in range(22) if 2 * k - 21 > 5)
    error = math.sqrt(exact * (1 - exact) / 40_000)
    assert abs(float(risk.probability) - exact) < 4 * error
    assert bool((risk.by_step.diff(dim=1) >= 0).all())


def test_few_samples_without_a_crossing_do_not_promise_zero():
    risk = path_risk(torch.zeros(20, 2, 5), upper=1.0)
    # rule of three
    assert float(risk.upper[0]) == pytest.approx(1 - 0.05 ** (1 / 20), rel=1e-9)
    broken = torch.zeros(2, 1, 3)
    broken[:, 0, 0] = math.nan
    risk = path_risk(broken, upper=1.0)
    assert risk.probability.tolist() == [1.0] and risk.upper.tolist() == [1.0]
    with pytest.raises(ValueError, match="without a bound"):
        path_risk(broken)


def test_bounds_by_step_and_row():
    paths = torch.tensor([[[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]]])
    lane = torch.tensor([[3.0, 3.0, 3.0], [3.0, 3.0, 1.5]])
    assert path_risk(paths, upper=lane).probability.tolist() == [0.0, 1.0]
