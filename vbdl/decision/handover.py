"""Hand-over to the driver: turn a stream of predictions into the modes drive, warn and hand over."""

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
    """The vehicle's mode after a frame.

    >>> [mode.name for mode in vbdl.decision.Mode]
    ['DRIVE', 'WARN', 'HAND_OVER']
    """

    DRIVE = 0
    WARN = 1
    HAND_OVER = 2


@dataclass(frozen=True)
class Step:
    """The result for one frame: the mode and its reason.

    >>> machine = vbdl.decision.HandOver(warn=(0.2, 0.1), hand_over=(0.5, 0.3))
    >>> step = machine.step(None)  # a missing frame
    >>> step.mode.name, step.reason
    ('HAND_OVER', 'missing')
    """

    mode: Mode
    reason: str  # "risk", "dwell", "latched", "late", "missing", "failed" or "not finite"


class HandOver(Decision):
    """A decision and state machine over the risk of each frame (an uncertainty or a path risk, high is bad).

    warn, hand_over: (enter, leave) thresholds of a mode. It is entered at once if risk >= enter, and left only after
        `dwell` successive frames with risk < leave, one mode at a time; gap and dwell prevent chattering.
    deadline: seconds a frame may take. A late, missing or non-finite frame hands over at once (fail-safe).
    latched: a hand-over ends only by `resume`, called when the driver gives control back; otherwise like a warning.
    kind: the uncertainty of a prediction used as risk (see uncertainty_of).
    bounds: use the probability that the predicted path leaves these bounds as risk instead.

    Alone, `step` takes the risks of successive frames from any source. Inside a predictor (`with_decision`), which has
    no memory, `action` is the mode of each row as a first frame, in mode DRIVE, and `risk` the number it is based on;
    `Drive` adds memory, deadline and fail-safe to such a predictor. `state()` and `load` carry the state machine over a
    restart.

    >>> machine = vbdl.decision.HandOver(warn=(0.2, 0.1), hand_over=(0.5, 0.3), dwell=2, latched=False)
    >>> [machine.step(risk).mode.name for risk in (0.0, 0.3, 0.6, 0.0, 0.0, 0.0, 0.0)]
    ['DRIVE', 'WARN', 'HAND_OVER', 'HAND_OVER', 'WARN', 'WARN', 'DRIVE']
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
                raise ValueError(f"{name} must be (enter, leave), finite, leave <= enter, not {enter, leave}")
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
    def reads_epistemic(self) -> bool:  # type: ignore[override]
        return self.kind == "epistemic" and self.bounds is None

    @property
    def reads_draws(self) -> bool:
        return self.bounds is not None

    def per_draw(self, parameters: Tensor) -> Tensor:
        """The probability of each draw that its path leaves the bounds, (samples, batch)."""
        assert self.bounds is not None
        return self.bounds(parameters)

    def risk(self, prediction: Prediction | Evidence) -> Tensor:
        """The risk of each row, which the thresholds are compared with, (batch,)."""
        if self.bounds is None:
            return uncertainty_of(prediction, self.kind)
        distribution = distribution_of(prediction)
        if distribution is not None:
            return self.bounds.of(distribution)
        if not isinstance(prediction, Evidence) or prediction.per_draw is None:
            raise ValueError("a path risk needs the draws of a prediction: call predict(x, samples=True)")
        return prediction.per_draw

    def words(self, action: Tensor) -> list[str]:
        return [Mode(mode).name.lower().replace("_", " ") for mode in action.tolist()]

    def forward(self, prediction: Prediction | Evidence) -> dict[str, Tensor]:
        """The mode of each row on its own, `action` (batch,) int64, and its `risk` (batch,); non-finite hands over."""
        risk = self.risk(prediction).to(torch.float64)
        # comparisons that are False for NaN, so that NaN hands over
        mode = torch.where(risk < self.hand_over[0], int(Mode.WARN), int(Mode.HAND_OVER))
        mode = torch.where(risk < self.warn[0], int(Mode.DRIVE), mode)
        return {"action": torch.where(risk.isfinite(), mode, int(Mode.HAND_OVER)), "risk": risk}

    def step(self, risk: float | None, latency: float | None = None) -> Step:
        """Process one frame.

        risk: its risk, or None for a missing frame. latency: seconds it took; with a deadline a frame without it counts
        as late.
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
        """Process frames in order: risks and latencies in seconds, (frames,) each -> modes, (frames,) int64."""
        if risks.ndim != 1 or (latencies is not None and latencies.shape != risks.shape):
            raise ValueError("risks must be (frames,), and latencies, if given, of the same shape")
        waits = [None] * risks.numel() if latencies is None else latencies.tolist()
        steps = [self.step(r, w) for r, w in zip(risks.tolist(), waits, strict=True)]
        return torch.tensor([int(s.mode) for s in steps], dtype=torch.int64)

    def resume(self) -> None:
        """End a hand-over, after the driver gave control back; the mode is WARN until the risk has been low."""
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
        """Hand over for this reason, whatever the risk."""
        self.mode, self.calm = Mode.HAND_OVER, 0
        return Step(self.mode, reason)
