"""Streams: recurrent networks that get their sequences in parts, as from a sensor, and keep the state of every draw.

The network runs as it is. Each call of an LSTM, GRU or RNN begins with the state in which it ended in the part before,
of the same draw or member. Draws stay the same through the stream, and masks over time go on, so that the prediction
after the last part is that of the whole sequence.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vbdl.calling.inputs import TENSOR, Flat
from vbdl.engine.executions import outside_autocast
from vbdl.engine.plain import Plain
from vbdl.engine.prepared import prepared
from vbdl.model import Model
from vbdl.nn.keyed import KeyedNetwork
from vbdl.nn.recurrent import CarriedStates
from vbdl.types import Inputs, Prediction

if TYPE_CHECKING:
    from vbdl.engine.predictor import Predictor

_APART = 1e-3  # relative to the largest output: far above rounding errors, far below the effect of a lost state

States = list[tuple[Tensor, ...]]  # of each call of a recurrent layer: h, of an LSTM also c


class StreamState:
    """Predictions on sequences that come in parts; `predict.stream_state()` makes one.

        stream = predict.stream_state()
        for part in sensor:  # (batch, steps, features), any number of steps
            p = stream(part)  # after this part, as of all steps so far

    The rows of a batch are streams beside each other, and stay in their places. Steps are the second axis of the first
    input. Weights are drawn, as with joint=True, and predictions have no gradient. Not for several threads at once. If
    there is one input, the second call also runs both parts as one sequence, to compare. `state_dict` returns what
    `load_state_dict` of another process goes on with.

    steps: the number of steps so far.
    """

    def __init__(self, predictor: "Predictor"):
        if predictor.estimator != "sampling":
            raise ValueError("a stream keeps the states of draws: use predictor.replace(estimator='sampling')")
        self._predictor, self.steps = predictor, 0
        self._states: dict[str, States] = {}  # "part/draw", or "part/first-last" of draws that share a call
        self._plains: list[Plain] = []
        self._rows: int | None = None
        self._before: tuple[Flat, Tensor] | None = None  # the first part, until the second has been compared with it

    def __call__(self, x: Inputs, samples: bool = False) -> Prediction:
        """Predict after a part of the sequences: (batch, steps, ...) inputs -> the likelihood's kind of prediction.

        samples: also keep the parameters of p(y | x) of each draw. Raises ValueError for another number of rows than
        before, and for a network whose prediction does not follow from the states of recurrent layers and this part.
        """
        predictor = self._predictor
        part = predictor.check(x).map(Tensor.detach)
        count = self._count(part)
        first = self.steps == 0
        with torch.no_grad(), outside_autocast(predictor.device):
            if not self._plains:
                self._plains = self._made(part)
            states = {key: list(each) for key, each in self._states.items()}  # unchanged if this part fails
            outputs = self._run(part, self.steps, count, states)
            if first:
                self._before = (part, outputs) if part.structure == TENSOR else None
            elif self._before is not None:
                self._compare(self._before[0], part, outputs)
                self._before = None
            likelihood = predictor.likelihood
            fields = likelihood.finish(likelihood.summarize(outputs))
        self._states, self._rows, self.steps = states, part.rows, self.steps + count
        return likelihood.prediction(fields, predictor.n_samples, outputs if samples else None)

    def reset(self) -> None:
        """Begin new streams, of any number of rows."""
        self._states, self._plains, self._rows, self._before, self.steps = {}, [], None, None, 0

    def state_dict(self) -> dict[str, Tensor]:
        """The states of all draws and the number of steps so far, to save with `torch.save`."""
        flat = {"steps": torch.tensor(self.steps), "rows": torch.tensor(self._rows or 0)}
        for key, states in self._states.items():
            for place, state in enumerate(states):
                flat |= {f"{key}/{place}/{number}": t for number, t in enumerate(state)}
        return flat

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on with what `state_dict` returned, in a stream of the same posterior, seed and number of samples."""
        if "steps" not in state or "rows" not in state:
            raise ValueError("this is no state of a stream: pass what state_dict() of a stream returned")
        self.reset()
        self.steps, self._rows = int(state["steps"]), int(state["rows"]) or None
        for name in sorted((n for n in state if n not in ("steps", "rows")), key=_order):
            key = "/".join(name.split("/")[:2])
            place, number = map(int, name.split("/")[2:])
            states = self._states.setdefault(key, [])
            states += [()] * (place == len(states))
            if place >= len(states) or len(states[place]) != number:
                raise ValueError(f"the state of a stream lacks what precedes {name}: pass all of what was saved")
            states[place] = (*states[place], state[name].to(self._predictor.device))

    # -- running

    def _count(self, part: Flat) -> int:
        """The number of steps of a part. Raises ValueError for inputs without steps or with other rows."""
        first = part.tensors[0]
        if first.ndim < 2 or not first.shape[1] or not part.rows:
            raise ValueError(f"a part of a stream is (batch, steps, ...), with at least one of each; got {first.shape}")
        if self._rows is not None and part.rows != self._rows:
            raise ValueError(
                f"the stream has the states of {self._rows} rows, got {part.rows}: pass the same rows in every part, "
                f"or call reset() to begin new streams"
            )
        return first.shape[1]

    def _made(self, part: Flat) -> list[Plain]:
        """The networks of each architecture, run as they are. Raises ValueError for a saved state of other draws."""
        predictor, plains, start = self._predictor, [], 0
        settings = predictor.settings
        for posterior in predictor.posterior.parts:
            count = min(posterior.n_draws or predictor.n_samples, predictor.n_samples - start)
            if count <= 0:
                break
            model = Model(posterior, predictor.likelihood, settings.autocast, first_member=start)
            model = prepared(model, part.nested)
            plains.append(Plain(model, part, settings, count))
            start += count
        expected = {key for index, plain in enumerate(plains) for key, _ in _calls(index, plain)}
        if self._states and self._states.keys() != expected:
            raise ValueError(
                f"the saved state is of the draws {sorted(self._states)}, this predictor's are {sorted(expected)}: "
                f"load it with the posterior, n_samples and settings that it was saved with"
            )
        return plains

    def _run(self, part: Flat, first: int, count: int, states: dict[str, States]) -> Tensor:
        """The parameters of p(y | x) of all draws, (samples, rows, ...), whose states in `states` are replaced."""
        outputs = []
        for index, plain in enumerate(self._plains):
            network = plain.network
            for key, numbers in _calls(index, plain):
                carried = CarriedStates(states.setdefault(key, []))
                if isinstance(network, KeyedNetwork):
                    network.steps = (first, count)
                try:
                    with carried:
                        run = plain.together if plain.repeated else plain.each
                        outputs.append(run(numbers, part))
                finally:
                    if isinstance(network, KeyedNetwork):
                        network.steps = None
                if not carried.calls:
                    raise ValueError(
                        "the network calls no nn.LSTM, nn.GRU or nn.RNN, so there is no state to keep from one part to "
                        "the next: predict whole sequences, or use such a layer instead of a cell in a loop"
                    )
                if carried.calls != len(states[key]):
                    raise ValueError(
                        f"the network called {carried.calls} recurrent layers for this part and {len(states[key])} "
                        f"before: a stream needs the same calls for every part"
                    )
        return torch.cat(outputs)

    def _compare(self, before: Flat, part: Flat, outputs: Tensor) -> None:
        """Raise ValueError if the second part's outputs are not those of the first two parts as one sequence."""
        a, b = before.tensors[0], part.tensors[0]
        whole = part.map(lambda _: torch.cat([a, b], 1))
        expected = self._run(whole, 0, whole.tensors[0].shape[1], {})
        if expected.shape != outputs.shape:  # an output for each step
            expected = expected[:, :, -b.shape[1] :]
        scale = float(expected.abs().nan_to_num(posinf=0.0).max()) if expected.numel() else 0.0
        if expected.shape != outputs.shape or not torch.allclose(expected, outputs, rtol=_APART, atol=_APART * scale):
            self.reset()
            raise ValueError(
                "the first two parts as one sequence give another prediction than one after the other: the network "
                "looks at other steps by more than its recurrent layers (a mean over time, attention, convolutions, "
                "cells in a loop). Predict whole sequences, or read the outputs at the last step"
            )


def _calls(index: int, plain: Plain) -> list[tuple[str, range]]:
    """The calls of a network: (the key of their states, the numbers of their draws)."""
    size = plain.most_draws if plain.repeated else 1
    starts = range(0, plain.n_samples, size)
    each = [range(start, min(start + size, plain.n_samples)) for start in starts]
    return [(f"{index}/{numbers[0]}-{numbers[-1]}", numbers) for numbers in each]


def _order(name: str) -> tuple[str, int, int]:
    """The order of the tensors in a saved state: those of a call one after the other."""
    part, draws, place, number = name.split("/")
    return f"{part}/{draws}", int(place), int(number)
