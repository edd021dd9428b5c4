"""Run a stream of frames through a predictor with a HandOver decision, with memory, a deadline and a fail-safe."""

import copy
import logging
from concurrent.futures import Future, ThreadPoolExecutor

from vbdl.decision.deciding import DecidingLikelihood
from vbdl.decision.handover import HandOver, Step
from vbdl.engine.predictor import Predictor
from vbdl.types import Inputs, Prediction


class Drive:
    """One drive: drive(x) -> Step for each frame, with a predictor made by with_decision(predictor, HandOver(...)).

    A frame hands over if it is None, its prediction raises, or its risk is not finite. It also hands over at the
    deadline of HandOver, if the prediction is not finished: predictions run in a separate thread, and while a late one
    still runs, every new frame is late, too. Warm the predictor up first, because a frame that compiles is late.

    `prediction` is that of the last frame, or None if it was not finished in time. Several drives can share a
    predictor; each has its own state machine, `machine`, whose state() and load carry it over a restart. `close` ends
    the thread.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> predict = vbdl.Predictor(vbdl.DeepEnsemble(net, 4), vbdl.Categorical(), compile=False)
    >>> hand_over = vbdl.decision.HandOver(warn=(2.0, 1.5), hand_over=(3.0, 2.0))  # nats
    >>> with vbdl.decision.Drive(vbdl.with_decision(predict, hand_over)) as drive:
    ...     modes = [drive(torch.zeros(1, 4)).mode.name, drive(None).mode.name]  # None: a missing frame
    >>> modes
    ['DRIVE', 'HAND_OVER']
    """

    def __init__(self, predictor: Predictor):
        likelihood = predictor.likelihood
        decision = likelihood.decision if isinstance(likelihood, DecidingLikelihood) else None
        if not isinstance(decision, HandOver):
            raise TypeError("Drive needs a predictor with a HandOver decision: with_decision(predictor, HandOver(...))")
        self.predictor, self.machine = predictor, copy.deepcopy(decision)
        self.prediction: Prediction | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="vbdl-drive")
        self._running: Future | None = None

    def __call__(self, x: Inputs | None) -> Step:
        """Process one frame. x: one row, (1, ...), or None for a missing frame."""
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
        except Exception as error:  # any error hands over at once; its reason is logged
            log = logging.getLogger(__name__)
            reason = " ".join(str(error).split())[:300]  # a single line, because there may be many frames per second
            log.error("a frame could not be predicted: %s: %s", type(error).__name__, reason)
            log.debug("traceback of the failed frame", exc_info=error)
            return self.machine.fail("failed")
        self.prediction = prediction
        return self.machine.step(risk, 0.0)  # latency 0: the deadline was enforced by the wait above

    def _predict(self, x: Inputs) -> tuple[Prediction, float]:
        prediction = self.predictor(x)
        assert prediction.risk is not None  # of the decision that the constructor asks for
        (risk,) = prediction.risk.tolist()
        return prediction, risk

    def resume(self) -> None:
        """End a latched hand-over, after the driver gave control back."""
        self.machine.resume()

    def close(self) -> None:
        """End the thread without waiting for a running prediction."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> "Drive":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
