"""Driving hand-over: from a stream of predictions to drive, warn, hand over."""

import enum
import math
from dataclasses import dataclass

import torch
from torch import Tensor


class Mode(enum.IntEnum):
    """What the vehicle does with this frame."""

    DRIVE = 0
    WARN = 1
    HAND_OVER = 2


@dataclass(frozen=True)
class Step:
    """One frame: its mode, and why."""

    mode: Mode
    reason: str  # "risk", "dwell", "latched", "late", "missing" or "not finite"


class HandOver:
    """A state machine over a risk per frame (an uncertainty, or a path risk), one number, high for bad.

    warn, hand_over: (enter, leave) thresholds of each level; enter at risk >= enter, leave only after `dwell` frames in
    a row of risk < leave: the gap and the dwell keep it from chattering. Going up never waits. Coming down goes one
    level at a time. deadline: seconds a frame may take; a late frame, a missing one and one that is not finite hand
    over at once (fail-safe). latched: a hand-over ends only by `resume`, called when the driver gives control back;
    otherwise it ends like a warning.

    The state is a few numbers: `state()` and `load` carry it over a restart.
    """

    def __init__(
        self,
        warn: tuple[float, float],
        hand_over: tuple[float, float],
        dwell: int = 10,
        deadline: float | None = None,
        latched: bool = True,
    ):
        for name, (enter, leave) in (("warn", warn), ("hand_over", hand_over)):
            if not (math.isfinite(enter) and math.isfinite(leave) and leave <= enter):
                raise ValueError(f"{name} must be (enter, leave), finite, leave <= enter: {enter, leave}")
        if not (warn[0] <= hand_over[0] and warn[1] <= hand_over[1]):
            raise ValueError(f"warn {warn} must not lie above hand_over {hand_over}")
        if dwell < 1:
            raise ValueError(f"dwell must be at least 1 frame, not {dwell}")
        if deadline is not None and not deadline > 0:
            raise ValueError(f"deadline must be positive seconds, not {deadline}")
        self.warn, self.hand_over = warn, hand_over
        self.dwell, self.deadline, self.latched = dwell, deadline, latched
        self.mode, self.calm = Mode.DRIVE, 0

    def step(self, risk: float | None, latency: float | None = None) -> Step:
        """Takes the frame's risk, None for a frame that never came, and how long it took in seconds.

        With a deadline a latency must be given: a frame of unknown latency counts as late.
        """
        if risk is None:
            return self._fail("missing")
        if self.deadline is not None and (latency is None or not latency <= self.deadline):
            return self._fail("late")
        risk = float(risk)
        if not math.isfinite(risk):
            return self._fail("not finite")
        if risk >= self.hand_over[0]:
            return self._go(Mode.HAND_OVER)
        if risk >= self.warn[0] and self.mode == Mode.DRIVE:
            return self._go(Mode.WARN)
        if self.mode == Mode.DRIVE:
            return Step(self.mode, "risk")
        if self.mode == Mode.HAND_OVER and self.latched:
            return Step(self.mode, "latched")
        leave = self.hand_over[1] if self.mode == Mode.HAND_OVER else self.warn[1]
        self.calm = self.calm + 1 if risk < leave else 0
        if self.calm < self.dwell:
            return Step(self.mode, "dwell" if self.calm else "risk")
        return self._go(Mode(self.mode - 1))

    def run(self, risks: Tensor, latencies: Tensor | None = None) -> Tensor:
        """Frames in order: (frames,) risks and seconds -> (frames,) int64 modes"""
        if risks.ndim != 1 or (latencies is not None and latencies.shape != risks.shape):
            raise ValueError("risks and latencies must both be (frames,)")
        waits = [None] * risks.numel() if latencies is None else latencies.tolist()
        steps = [self.step(r, w) for r, w in zip(risks.tolist(), waits, strict=True)]
        return torch.tensor([int(s.mode) for s in steps], dtype=torch.int64)

    def resume(self) -> None:
        """The driver gives control back. Starts in WARN: the risk has to show that it is low."""
        if self.mode == Mode.HAND_OVER:
            self.mode, self.calm = Mode.WARN, 0

    def state(self) -> dict[str, int]:
        return {"mode": int(self.mode), "calm": self.calm}

    def load(self, state: dict[str, int]) -> "HandOver":
        self.mode, self.calm = Mode(state["mode"]), int(state["calm"])
        return self

    def _go(self, mode: Mode) -> Step:
        self.mode, self.calm = mode, 0
        return Step(mode, "risk")

    def _fail(self, reason: str) -> Step:
        self.mode, self.calm = Mode.HAND_OVER, 0
        return Step(self.mode, reason)
