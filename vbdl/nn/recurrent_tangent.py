"""The tangent of one recurrent layer as a single operator, for linearized networks.

torch's LSTM in float32 (oneDNN) has no forward-mode derivative, and its other recurrent layers would put every step of
the sequence into a traced graph, which takes minutes to compile. As one operator the tangent stays whole beside the
layer itself (`recurrent_layer`). Draws of a linearized network differ in their tangents alone: the layer is computed
once for all draws, and each step's product with the tangents is one batched product.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from vbdl.nn.recurrent_layer import gradients_of, library_of_vbdl, recurrent_layer, with_gradients
from vbdl.nn.scan import Packing

Dual = tuple[Tensor, Tensor | None]  # a value and its tangent, None for zero; (samples or 1, ...) each


def pushed(
    x: Tensor,
    batch_sizes: Tensor | None,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    kind: str,
    biases: bool,
    bidirectional: bool,
) -> tuple[Tensor, ...]:
    """The outputs, final h and final c of a layer with their tangents, in a forward-mode product of torch.func.

    Arguments as in `recurrent_layer`, without a samples axis.
    """
    n_states = len(states)
    values, tangents = zip(*(forward_ad.unpack_dual(t) for t in (x, *states, *weights)), strict=True)
    arguments = values[0], batch_sizes, list(values[1 : 1 + n_states]), list(values[1 + n_states :])
    options = kind, biases, bidirectional
    outputs = recurrent_layer(*arguments, *options, [False] * len(values))
    places = [place for place, t in enumerate(tangents) if t is not None]
    given = [t for t in tangents if t is not None]
    if not given:
        return outputs
    moved = recurrent_tangent(*arguments, given, places, *options, [False] * (len(values) + len(given)))
    made = [forward_ad.make_dual(o, t) for o, t in zip(outputs, moved, strict=True)]
    return (*made[: 1 + n_states], *outputs[1 + n_states :])


# -- the operator

library_of_vbdl.define(
    "recurrent_tangent(Tensor x, Tensor? batch_sizes, Tensor[] states, Tensor[] weights, Tensor[] tangents, "
    "int[] places, str kind, bool biases, bool bidirectional, bool[] stacked) -> (Tensor, Tensor, Tensor)"
)
recurrent_tangent = torch.ops.vbdl.recurrent_tangent.default
"""The tangents of the outputs, the final h and the final c of `recurrent_layer`, which takes the same arguments.

tangents: those that are not zero, of x, states and weights, whose places are counted in this order.
stacked: whether x, each state and each weight, then whether each of their tangents, has the samples axis.
"""


def plainly(
    x, batch_sizes, states, weights, tangents, places, kind, biases, bidirectional, stacked
) -> tuple[Tensor, ...]:
    """The operator by torch's plain operators, also for graphs that must not hold it."""
    values = [x, *states, *weights]
    pairs = list(zip([*values, *tangents], stacked, strict=True))
    samples = next((t.shape[0] for t, s in pairs if s), None)
    lifted = [t if s else t.unsqueeze(0) for t, s in pairs]
    moving = dict(zip(places, lifted[len(values) :], strict=True))
    duals = [(lifted[i], moving.get(i)) for i in range(len(values))]
    layer = _Layer(duals[0], duals[1 : 1 + len(states)], duals[1 + len(states) :], batch_sizes, kind, biases)
    moved = layer.tangents(bidirectional, samples or 1)
    if len(states) == 1:
        moved = (*moved, x.new_empty((samples or 1, 0)))
    return moved if samples is not None else tuple(t[0] for t in moved)


@torch.no_grad()
def _outputs(*arguments) -> tuple[Tensor, ...]:
    out, *finals = plainly(*arguments)
    return out.contiguous(), *(t.clone(memory_format=torch.contiguous_format) for t in finals)


library_of_vbdl.impl("recurrent_tangent", _outputs, "CompositeExplicitAutograd")


def _shapes(
    x, batch_sizes, states, weights, tangents, places, kind, biases, bidirectional, stacked
) -> tuple[Tensor, ...]:
    values = [x, *states, *weights, *tangents]
    lead = next(((t.shape[0],) for t, s in zip(values, stacked, strict=True) if s), ())
    inner = x.shape[1:-1] if stacked[0] else x.shape[:-1]
    sizes = [(*inner, (2 if bidirectional else 1) * states[0].shape[-1]), *(t.shape[-3:] for t in states)]
    return tuple(x.new_empty((*lead, *size)) for size in [*sizes, (0,)][:3])


torch.library.register_fake("vbdl::recurrent_tangent", _shapes, lib=library_of_vbdl)


def _mapped(info, in_dims, x, batch_sizes, states, weights, tangents, places, kind, biases, bidirectional, stacked):
    dims = [in_dims[0], *in_dims[2], *in_dims[3], *in_dims[4]]
    front = [t if d is None else t.movedim(d, 0) for t, d in zip((x, *states, *weights, *tangents), dims, strict=True)]
    options = places, kind, biases, bidirectional

    def run(tensors: list[Tensor], flags: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
        (x,), *rest = _parts(tensors, (1, len(states), len(weights), len(tangents)))
        return recurrent_tangent(x, batch_sizes, *rest, *options, flags)

    if not any(stacked):
        return run(front, [d is not None for d in dims]), (0, 0, 0)
    each = []  # a vmap inside the module, within that over draws: one after the other
    for index in range(info.batch_size):
        one = [t if d is None else t[index] for t, d in zip(front, dims, strict=True)]
        each.append(run(one, stacked))
    return tuple(torch.stack(column) for column in zip(*each, strict=True)), (0, 0, 0)


torch.library.register_vmap("vbdl::recurrent_tangent", _mapped, lib=library_of_vbdl)


def _setup(ctx, inputs, output) -> None:
    x, batch_sizes, states, weights, tangents, *ctx.options = inputs
    ctx.sizes, ctx.batch_sizes = (1, len(states), len(weights), len(tangents)), batch_sizes
    ctx.save_for_backward(x, *states, *weights, *tangents)


def _backward(ctx, *gradients):
    """The gradient of the plain operators, which run again here."""
    tensors = with_gradients(ctx.saved_tensors)
    (x,), *rest = _parts(tensors, ctx.sizes)
    with torch.enable_grad():
        outputs = plainly(x, ctx.batch_sizes, *rest, *ctx.options)
    pairs = [(o, g) for o, g in zip(outputs, gradients, strict=True) if g is not None and o.requires_grad]
    found = gradients_of(pairs, tensors)
    (of_x,), *others = _parts(found, ctx.sizes)
    return of_x, None, *others, *[None] * len(ctx.options)


def _parts(tensors: Sequence[Any], sizes: Sequence[int]) -> list[list[Any]]:
    """A list cut into lists of these sizes."""
    remaining = iter(tensors)
    return [list(itertools.islice(remaining, size)) for size in sizes]


torch.library.register_autograd("vbdl::recurrent_tangent", _backward, setup_context=_setup, lib=library_of_vbdl)


def sentences(graph: fx.Graph) -> list[str]:
    """How the tangents of recurrent layers in a traced graph are executed, in a sentence."""
    said = "tangents of recurrent layers are scanned over time beside their values, with batched products"
    return [said] if any(node.target is recurrent_tangent for node in graph.nodes) else []


def _flops(
    x, batch_sizes, states, weights, tangents, places, kind, biases, bidirectional, stacked, out_shape=None, **_
) -> int:
    """The flops of all products: of values with values, of tangents with values and of values with tangents."""
    values = [x, *states, *weights]
    sizes = [t[1:] if s else t for t, s in zip([*values, *tangents], stacked, strict=True)]
    matrices = lambda places, sizes: sum(
        math.prod(size) for place, size in zip(places, sizes, strict=True) if place > len(states) and len(size) == 2
    )
    own = matrices(range(len(values)), sizes[: len(values)])
    moved = own + matrices(places, sizes[len(values) :])
    samples = lambda tensors: next((t[0] for t, s in zip(tensors, stacked, strict=False) if s), 1)
    once, each = samples(values), samples([*values, *tangents])
    return 2 * math.prod(sizes[0][:-1]) * (once * own + each * moved)


register_flop_formula(torch.ops.vbdl.recurrent_tangent)(_flops)  # type: ignore[misc]


# -- the scan, of values and tangents


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
class _Layer:
    """The arguments of the operator, each with its tangent."""

    x: Dual
    states: list[Dual]
    weights: list[Dual]
    batch_sizes: Tensor | None
    kind: str
    biases: bool

    def tangents(self, bidirectional: bool, samples: int) -> tuple[Tensor, ...]:
        """Compute the tangents of outputs and final states, (samples, ...) each."""
        directions = 2 if bidirectional else 1
        size = len(self.weights) // directions
        packing = None if self.batch_sizes is None else Packing(self.batch_sizes)
        one = self.x if packing is None else _of(self.x, packing.pad)
        reverse = (lambda t: t.flip(1)) if packing is None else packing.reverse
        outputs, finals = [], []
        for direction in range(directions):
            x = one if direction == 0 else _of(one, reverse)
            states = [_of(s, lambda t, d=direction: t[:, d]) for s in self.states]
            steps = self._steps(x, self.weights[direction * size : (direction + 1) * size], states)
            whole = [torch.stack([self._full(s, samples) for s in each]) for each in zip(*steps, strict=True)]
            finals.append([each[-1] if packing is None else packing.last(each) for each in whole])
            out = whole[0].transpose(0, 1)
            outputs.append(out if direction == 0 else reverse(out))
        joined = torch.cat(outputs, -1)
        if packing is not None:
            joined = packing.pack(joined)
        return joined, *(torch.stack(each, 1) for each in zip(*finals, strict=True))

    @staticmethod
    def _full(state: Dual, samples: int) -> Tensor:
        value, tangent = state
        tangent = torch.zeros_like(value) if tangent is None else tangent
        return tangent.expand(samples, *tangent.shape[1:])

    def _steps(self, x: Dual, weights: list[Dual], states: list[Dual]) -> list[list[Dual]]:
        """Compute h, of an LSTM also c, after each step of one direction."""
        transposed = lambda w: _of(w, lambda t: t.mT)
        w_input, w_hidden = transposed(weights[0]), transposed(weights[1])
        row = lambda b: _of(b, lambda t: t.unsqueeze(1))
        b_input, b_hidden = (row(weights[2]), row(weights[3])) if self.biases else (None, None)
        rest = weights[4:] if self.biases else weights[2:]
        projection = transposed(rest[0]) if rest else None
        n_steps, n_rows = x[0].shape[1:3]
        gates = _multiplied(_of(x, lambda t: t.flatten(1, 2)), w_input)
        gates = gates if b_input is None else _added(gates, b_input)
        gates = _of(gates, lambda t: t.unflatten(1, (n_steps, n_rows)))
        step, each = _STEPS[self.kind], []
        for i in range(n_steps):
            hidden = _multiplied(states[0], w_hidden)
            hidden = hidden if b_hidden is None else _added(hidden, b_hidden)
            states = step(_of(gates, lambda t, i=i: t[:, i]), hidden, states)
            if projection is not None:
                states = [_multiplied(states[0], projection), *states[1:]]
            each.append(states)
        return each


def _gru(gates: Dual, hidden: Dual, states: list[Dual]) -> list[Dual]:
    """Compute h after a step: Cho et al. 2014, with the reset gate after the product, as torch."""
    (x_reset, x_update, x_new), (h_reset, h_update, h_new) = _split(gates, 3), _split(hidden, 3)
    reset, update = _sigmoid(_added(x_reset, h_reset)), _sigmoid(_added(x_update, h_update))
    new = _tanh(_added(x_new, _times(reset, h_new)))
    return [_added(new, _times(update, _added(states[0], _of(new, torch.neg))))]


def _lstm(gates: Dual, hidden: Dual, states: list[Dual]) -> list[Dual]:
    """Compute h, before a projection, and c after a step: Hochreiter and Schmidhuber 1997 with a forget gate."""
    enter, forget, new, leave = _split(_added(gates, hidden), 4)
    cell = _added(_times(_sigmoid(forget), states[1]), _times(_sigmoid(enter), _tanh(new)))
    return [_times(_sigmoid(leave), _tanh(cell)), cell]


_STEPS: dict[str, Callable[[Dual, Dual, list[Dual]], list[Dual]]] = {
    "gru": _gru,
    "lstm": _lstm,
    "rnn_tanh": lambda gates, hidden, states: [_tanh(_added(gates, hidden))],  # Elman 1990
    "rnn_relu": lambda gates, hidden, states: [_relu(_added(gates, hidden))],
}
