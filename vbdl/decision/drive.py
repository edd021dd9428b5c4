"""A stream of frames through a predictor that hands over: memory, a clock and a fail-safe around predict(x)."""

import copy
import logging
from concurrent.futures import Future, ThreadPoolExecutor

from vbdl.decision.deciding import DecidingLikelihood
from vbdl.decision.handover import HandOver, Step
from vbdl.engine.predictor import Predictor
from vbdl.types import Inputs, Prediction


class Drive:
    """One drive: drive(x) -> Step, frame after frame, of a predictor made by with_decision(predictor, HandOver(...)).

    A frame that is None, one whose prediction raises, and one that is not finite hand over; so does one that takes
    longer than the machine's deadline, at the deadline: the prediction runs in a thread of its own, and while a late
    one is still at it every new frame is late too. Warm the predictor up first: a frame that compiles is late.

    `prediction` is the last frame's, None where there was none in time. Several drives may share a predictor; each has
    a machine of its own, `machine`, whose state() and load carry it over a restart. `close` ends the thread.
    """

    def __init__(self, predictor: Predictor):
        likelihood = predictor.likelihood
        decision = likelihood.decision if isinstance(likelihood, DecidingLikelihood) else None
        if not isinstance(decision, HandOver):
            raise TypeError("a drive needs a predictor that hands over: with_decision(predictor, HandOver(...))")
        self.predictor, self.machine = predictor, copy.deepcopy(decision)
        self.prediction: Prediction | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="vbdl-drive")
        self._running: Future | None = None

    def __call__(self, x: Inputs | None) -> Step:
        """x: one row, (1, ...); None for a frame that never came."""
        self.prediction = None
        if x is None:
            return self.machine.step(None)
        if self._running is not None and not self._running.done():
            return self.machine.fail("late")
        self._running = self._thread.submit(self._predict, x)
        try:
            prediction, risk = self._running.result(timeout=self.machine.deadline)
        except TimeoutError:
            return self.machine.fail("late")
        except Exception as error:  # whatever went wrong, the driver must be told at once, and the reason kept
            log = logging.getLogger(__name__)
            said = " ".join(str(error).split())[:300]  # one line a frame, however many a second there are
            log.error("a frame could not be predicted: %s: %s", type(error).__name__, said)
            log.debug("where it failed", exc_info=error)
            return self.machine.fail("failed")
        self.prediction = prediction
        return self.machine.step(risk, 0.0)  # in time, or the wait would have ended

    def _predict(self, x: Inputs) -> tuple[Prediction, float]:
        prediction = self.predictor(x)
        (risk,) = prediction.risk.tolist()
        return prediction, risk

    def resume(self) -> None:
        """The driver gives control back."""
        self.machine.resume()

    def close(self) -> None:
        """Ends the thread, without waiting for a prediction that hangs."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> "Drive":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
