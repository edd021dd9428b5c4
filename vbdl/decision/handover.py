"""Driving hand-over: from a stream of predictions to drive, warn, hand over."""

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vbdl.decision.distribution import Evidence, distribution_of
from vbdl.decision.path_risk import PathBounds
from vbdl.decision.referral import uncertainty_of
from vbdl.types import Decision, Prediction


class Mode(enum.IntEnum):
    """What the vehicle does with this frame."""

    DRIVE = 0
    WARN = 1
    HAND_OVER = 2


@dataclass(frozen=True)
class Step:
    """One frame: its mode, and why."""

    mode: Mode
    reason: str  # "risk", "dwell", "latched", "late", "missing", "failed" or "not finite"


class HandOver(Decision):
    """A state machine over a risk per frame (an uncertainty, or a path risk), one number, high for bad.

    warn, hand_over: (enter, leave) thresholds of each level; enter at risk >= enter, leave only after `dwell` frames in
    a row of risk < leave: the gap and the dwell keep it from chattering. Going up never waits. Coming down goes one
    level at a time. deadline: seconds a frame may take; a late frame, a missing one and one that is not finite hand
    over at once (fail-safe). latched: a hand-over ends only by `resume`, called when the driver gives control back;
    otherwise it ends like a warning.

    kind, bounds: where the risk of a prediction comes from: an uncertainty (see uncertainty_of), or with bounds the
    probability that the predicted path leaves them.

    Two ways to use it. Alone: `step` takes one risk after the other, from wherever they come. Inside a predictor
    (`with_decision`): `action` is the mode that each row asks for on its own, as one frame after a drive without
    incident, `risk` the number it rests on; a prediction has no memory. `Drive` puts memory, deadline and fail-safe
    around such a predictor.

    The state is a few numbers: `state()` and `load` carry it over a restart.
    """

    bounds: PathBounds | None

    def __init__(
        self,
        warn: Sequence[float],
        hand_over: Sequence[float],
        dwell: int = 10,
        deadline: float | None = None,
        latched: bool = True,
        kind: str = "total",
        bounds: PathBounds | None = None,
    ):
        super().__init__()
        for name, (enter, leave) in (("warn", warn), ("hand_over", hand_over)):
            if not (math.isfinite(enter) and math.isfinite(leave) and leave <= enter):
                raise ValueError(f"{name} must be (enter, leave), finite, leave <= enter: {enter, leave}")
        if not (warn[0] <= hand_over[0] and warn[1] <= hand_over[1]):
            raise ValueError(f"warn {warn} must not lie above hand_over {hand_over}")
        if dwell < 1:
            raise ValueError(f"dwell must be at least 1 frame, not {dwell}")
        if deadline is not None and not deadline > 0:
            raise ValueError(f"deadline must be positive seconds, not {deadline}")
        (warn_enter, warn_leave), (hand_enter, hand_leave) = warn, hand_over
        self.warn, self.hand_over = (warn_enter, warn_leave), (hand_enter, hand_leave)
        self.kind, self.bounds = kind, bounds
        self.dwell, self.deadline, self.latched = dwell, deadline, latched
        self.mode, self.calm = Mode.DRIVE, 0

    def extra_repr(self) -> str:
        return f"warn={self.warn}, hand_over={self.hand_over}, kind={self.kind!r}"

    @property
    def reads_draws(self) -> bool:
        return self.bounds is not None

    def per_draw(self, parameters: Tensor) -> Tensor:
        """Probability of each draw that its path leaves the bounds."""
        assert self.bounds is not None
        return self.bounds(parameters)

    def risk(self, prediction: Prediction | Evidence) -> Tensor:
        """(batch,) the number of each row that the thresholds are compared with"""
        if self.bounds is None:
            return uncertainty_of(prediction, self.kind)
        distribution = distribution_of(prediction)
        if distribution is not None:
            return self.bounds.of(distribution)
        if not isinstance(prediction, Evidence) or prediction.per_draw is None:
            raise ValueError("a path risk needs the draws of a prediction: predict with predict(x, samples=True)")
        return prediction.per_draw

    def forward(self, prediction: Prediction | Evidence) -> dict[str, Tensor]:
        """A prediction -> action, (batch,) int64 modes, each row's own, and risk, (batch,). Not finite hands over."""
        risk = self.risk(prediction).to(torch.float64)
        # written so that a NaN fails both
        mode = torch.where(risk < self.hand_over[0], int(Mode.WARN), int(Mode.HAND_OVER))
        mode = torch.where(risk < self.warn[0], int(Mode.DRIVE), mode)
        return {"action": torch.where(risk.isfinite(), mode, int(Mode.HAND_OVER)), "risk": risk}

    def step(self, risk: float | None, latency: float | None = None) -> Step:
        """Takes the frame's risk, None for a frame that never came, and how long it took in seconds.

        With a deadline a latency must be given: a frame of unknown latency counts as late.
        """
        if risk is None:
            return self.fail("missing")
        if self.deadline is not None and (latency is None or not latency <= self.deadline):
            return self.fail("late")
        risk = float(risk)
        if not math.isfinite(risk):
            return self.fail("not finite")
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

    def fail(self, reason: str) -> Step:
        """Hand over, whatever the risk was."""
        self.mode, self.calm = Mode.HAND_OVER, 0
        return Step(self.mode, reason)
