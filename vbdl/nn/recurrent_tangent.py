"""The tangent of one recurrent layer as a single operator, for linearized networks.

torch's LSTM in float32 (oneDNN) has no forward-mode derivative, and its other recurrent layers would put every step of
the sequence into a traced graph, which takes minutes to compile. As one operator the tangent stays whole beside the
layer itself (`recurrent_layer`). Draws of a linearized network differ in their tangents alone: the layer is computed
once for all draws, and each step's product with the tangents is one batched product.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from vbdl.nn.recurrent_dual import DualLayer, Loop, in_graph, in_python
from vbdl.nn.recurrent_layer import gradients_of, library_of_vbdl, recurrent_layer, with_gradients


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
    x, batch_sizes, states, weights, tangents, places, kind, biases, bidirectional, stacked, *, loop: Loop = in_python
) -> tuple[Tensor, ...]:
    """The operator by torch's plain operators."""
    values = [x, *states, *weights]
    pairs = list(zip([*values, *tangents], stacked, strict=True))
    samples = next((t.shape[0] for t, s in pairs if s), None)
    lifted = [t if s else t.unsqueeze(0) for t, s in pairs]
    moving = dict(zip(places, lifted[len(values) :], strict=True))
    duals = [(lifted[i], moving.get(i)) for i in range(len(values))]
    parts = duals[0], duals[1 : 1 + len(states)], duals[1 + len(states) :]
    moved = DualLayer(*parts, batch_sizes, kind, biases, bidirectional).tangents(samples or 1, loop)
    if len(states) == 1:
        moved = (*moved, x.new_empty((samples or 1, 0)))
    return moved if samples is not None else tuple(t[0] for t in moved)


def lowered(*arguments) -> tuple[Tensor, ...]:
    """The operator by torch's scan, for graphs that must not hold it."""
    return plainly(*arguments, loop=in_graph)


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
