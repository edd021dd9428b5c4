"""One layer of an LSTM, GRU or RNN over time with the tangents of its values, by torch's plain operators.

A loop of Python runs the steps at once, with derivatives. torch's `scan` puts a single step into a graph, whatever the
length of the sequence, which compiles in seconds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._higher_order_ops.scan import scan_op

from vbdl.nn.scan import Packing

Dual = tuple[Tensor, Tensor | None]  # a value and its tangent, None for zero; (samples or 1, ...) each
Constants = Sequence[Dual | None]
# (states, gates of a step, constants) -> states
Step = Callable[[Sequence[Dual], Dual, Constants], list[Dual]]
# (step, states, gates of all steps, constants) -> the states after every step, (steps, ...) each
Loop = Callable[[Step, Sequence[Dual], Dual, Constants], list[Dual]]


def _plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _product(a: Tensor, w: Tensor) -> Tensor:
    """a @ w, (samples or 1, rows, columns); weights that all samples share multiply the rows of all at once."""
    return a @ (w[0] if len(w) == 1 else w)


def _multiplied(a: Dual, w: Dual) -> Dual:
    """The product of (.., rows, k) and (.., k, columns)."""
    moved = _plus(None if a[1] is None else _product(a[1], w[0]), None if w[1] is None else _product(a[0], w[1]))
    return _product(a[0], w[0]), moved


def _added(a: Dual, b: Dual) -> Dual:
    value, tangent = a[0] + b[0], _plus(a[1], b[1])
    return value, None if tangent is None else tangent.expand(-1, *value.shape[1:])  # one bias is for all rows


def _times(a: Dual, b: Dual) -> Dual:
    moved = _plus(None if a[1] is None else a[1] * b[0], None if b[1] is None else a[0] * b[1])
    return a[0] * b[0], moved


def _changed(a: Dual, value: Tensor, slope: Tensor) -> Dual:
    return value, None if a[1] is None else a[1] * slope


def _sigmoid(a: Dual) -> Dual:
    value = a[0].sigmoid()
    return _changed(a, value, value * (1 - value))


def _tanh(a: Dual) -> Dual:
    value = a[0].tanh()
    return _changed(a, value, 1 - value * value)


def _relu(a: Dual) -> Dual:
    return _changed(a, a[0].relu(), (a[0] > 0).to(a[0].dtype))


def _of(a: Dual, change: Callable[[Tensor], Tensor]) -> Dual:
    """Apply a linear change to value and tangent."""
    return change(a[0]), None if a[1] is None else change(a[1])


def _split(a: Dual, parts: int) -> list[Dual]:
    values, tangents = a[0].chunk(parts, -1), [None] * parts if a[1] is None else a[1].chunk(parts, -1)
    return list(zip(values, tangents, strict=True))


@dataclass(frozen=True)
class DualLayer:
    """The arguments of `recurrent_layer`, each with its tangent."""

    x: Dual
    states: Sequence[Dual]
    weights: Sequence[Dual]
    batch_sizes: Tensor | None
    kind: str
    biases: bool
    bidirectional: bool

    def values(self, loop: Loop) -> tuple[Tensor, ...]:
        """Compute the outputs and final states, (samples or 1, ...) each."""
        return self._outputs(loop, lambda state: state[0])

    def tangents(self, samples: int, loop: Loop) -> tuple[Tensor, ...]:
        """Compute the tangents of outputs and final states, (samples, ...) each."""

        def full(state: Dual) -> Tensor:
            value, tangent = state
            tangent = torch.zeros_like(value) if tangent is None else tangent
            return tangent.expand(-1, samples, *tangent.shape[2:])

        return self._outputs(loop, full)

    def _outputs(self, loop: Loop, wanted: Callable[[Dual], Tensor]) -> tuple[Tensor, ...]:
        directions = 2 if self.bidirectional else 1
        size = len(self.weights) // directions
        packing = None if self.batch_sizes is None else Packing(self.batch_sizes)
        one = self.x if packing is None else _of(self.x, packing.pad)
        reverse = (lambda t: t.flip(1)) if packing is None else packing.reverse
        outputs, finals = [], []
        for direction in range(directions):
            x = one if direction == 0 else _of(one, reverse)
            states = [_of(s, lambda t, d=direction: t[:, d]) for s in self.states]
            weights = self.weights[direction * size : (direction + 1) * size]
            whole = [wanted(state) for state in self._steps(x, weights, states, loop)]
            finals.append([each[-1] if packing is None else packing.last(each) for each in whole])
            out = whole[0].transpose(0, 1)
            outputs.append(out if direction == 0 else reverse(out))
        joined = torch.cat(outputs, -1)
        if packing is not None:
            joined = packing.pack(joined)
        return joined, *(torch.stack(each, 1) for each in zip(*finals, strict=True))

    def _steps(self, x: Dual, weights: Sequence[Dual], states: list[Dual], loop: Loop) -> list[Dual]:
        """Compute h, of an LSTM also c, after each step of one direction, (steps, samples or 1, batch, ...)."""
        transposed = lambda w: _of(w, lambda t: t.mT)
        w_input, w_hidden = transposed(weights[0]), transposed(weights[1])
        row = lambda b: _of(b, lambda t: t.unsqueeze(1))
        b_input, b_hidden = (row(weights[2]), row(weights[3])) if self.biases else (None, None)
        rest = weights[4:] if self.biases else weights[2:]
        projection = transposed(rest[0]) if rest else None
        n_steps, n_rows = x[0].shape[1:3]
        gates = _multiplied(_of(x, lambda t: t.flatten(1, 2)), w_input)
        gates = gates if b_input is None else _added(gates, b_input)
        gates = _of(gates, lambda t: t.unflatten(1, (n_steps, n_rows)).transpose(0, 1))
        change = _STEPS[self.kind]

        def step(states: Sequence[Dual], gates: Dual, constants: Constants) -> list[Dual]:
            w_hidden, b_hidden, projection = constants
            assert w_hidden is not None
            hidden = _multiplied(states[0], w_hidden)
            hidden = hidden if b_hidden is None else _added(hidden, b_hidden)
            after = change(gates, hidden, states)
            return after if projection is None else [_multiplied(after[0], projection), *after[1:]]

        return loop(step, states, gates, (w_hidden, b_hidden, projection))


def in_python(step: Step, states: Sequence[Dual], gates: Dual, constants: Constants) -> list[Dual]:
    """Run all steps in a loop of Python."""
    each = []
    for i in range(len(gates[0])):
        states = step(states, _of(gates, lambda t, i=i: t[i]), constants)
        each.append(states)
    moving = [any(states[place][1] is not None for states in each) for place in range(len(states))]
    return [
        (
            torch.stack([s[place][0] for s in each]),
            torch.stack([_tangent(s[place], each[-1][place]) for s in each]) if moves else None,
        )
        for place, moves in enumerate(moving)
    ]


def _tangent(state: Dual, like: Dual) -> Tensor:
    """The tangent of a state, zeros in the shape of another's if it has none."""
    if state[1] is not None:
        return state[1]
    assert like[1] is not None  # once it moves, it moves in every later step
    return torch.zeros_like(like[1])


def in_graph(step: Step, states: Sequence[Dual], gates: Dual, constants: Constants) -> list[Dual]:
    """Run all steps as torch's `scan` operator, of which a traced graph holds one step."""
    given = [_of(gates, lambda t: t[0]), *states, *(c for c in constants if c is not None)]
    once = max(value.shape[0] for value, _ in given)
    tangents = [tangent for _, tangent in given if tangent is not None]
    each = max([once, *(t.shape[0] for t in tangents)]) if tangents else None  # the samples of all tangents

    def full(state: Dual) -> list[Tensor]:  # of the same shape after every step
        value, tangent = state
        parts = [value.expand(once, *value.shape[1:])]
        if each is not None:
            tangent = torch.zeros_like(value) if tangent is None else tangent
            parts.append(tangent.expand(each, *tangent.shape[1:]))
        # `contiguous` keeps strides of axes of one
        return [t.clone(memory_format=torch.contiguous_format) for t in parts]

    flat = [t for state in states for t in full(state)]
    width, n_gates = len(flat) // len(states), 1 if gates[1] is None else 2
    pair = lambda parts: (parts[0], parts[1] if len(parts) > 1 else None)

    def combine(*tensors: Tensor) -> list[Tensor]:
        before = [pair(tensors[i : i + width]) for i in range(0, len(flat), width)]
        remaining = list(tensors[len(flat) :])
        gate = pair([remaining.pop(0) for _ in range(n_gates)])
        fixed = [None if c is None else pair([remaining.pop(0) for t in c if t is not None]) for c in constants]
        after = [t for state in step(before, gate, fixed) for t in full(state)]
        return [*after, *(t.clone() for t in after)]  # carried on, and kept

    parts = lambda dual: [t for t in dual if t is not None]
    kept = tuple(t for c in constants if c is not None for t in parts(c))
    outputs = scan_op(combine, flat, parts(gates), kept)[len(flat) :]
    return [pair(outputs[i : i + width]) for i in range(0, len(flat), width)]


def _gru(gates: Dual, hidden: Dual, states: Sequence[Dual]) -> list[Dual]:
    """Compute h after a step: Cho et al. 2014, with the reset gate after the product, as torch."""
    (x_reset, x_update, x_new), (h_reset, h_update, h_new) = _split(gates, 3), _split(hidden, 3)
    reset, update = _sigmoid(_added(x_reset, h_reset)), _sigmoid(_added(x_update, h_update))
    new = _tanh(_added(x_new, _times(reset, h_new)))
    return [_added(new, _times(update, _added(states[0], _of(new, torch.neg))))]


def _lstm(gates: Dual, hidden: Dual, states: Sequence[Dual]) -> list[Dual]:
    """Compute h, before a projection, and c after a step: Hochreiter and Schmidhuber 1997 with a forget gate."""
    enter, forget, new, leave = _split(_added(gates, hidden), 4)
    cell = _added(_times(_sigmoid(forget), states[1]), _times(_sigmoid(enter), _tanh(new)))
    return [_times(_sigmoid(leave), _tanh(cell)), cell]


_STEPS: dict[str, Callable[[Dual, Dual, Sequence[Dual]], list[Dual]]] = {
    "gru": _gru,
    "lstm": _lstm,
    "rnn_tanh": lambda gates, hidden, states: [_tanh(_added(gates, hidden))],  # Elman 1990
    "rnn_relu": lambda gates, hidden, states: [_relu(_added(gates, hidden))],
}
