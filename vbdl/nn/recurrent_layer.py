"""One layer of an LSTM, GRU or RNN as a single operator, for one network or for all samples at once.

torch's own layers have no vmap rule, and traced they are a graph of every step. As one operator the layer stays whole
in a traced graph, and samples with weights of their own, such as the members of an ensemble, share one scan over time:
the products of all steps with the input come first, then each step is one batched product. Samples with the same
weights are more rows of one layer. torch's LSTM of a padded sequence calls oneDNN, which is faster than a scan; such
samples run one after the other.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import register_flop_formula

from vbdl.nn.recurrent_dual import DualLayer, in_graph
from vbdl.nn.scan import STEPS, Packing

KINDS = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}  # torch's function -> the number of gates
_WASTE, _LARGE = 1.5, 2**14  # steps of padding a step that counts; numbers in a state above which these cost time


@dataclass(frozen=True)
class _Layer:
    """The arguments of the operator."""

    x: Tensor  # ([samples], steps, batch, inputs) or, packed, ([samples], entries, inputs)
    batch_sizes: Tensor | None  # (steps,) int64, the number of rows that have each step, if packed
    states: list[Tensor]  # h, of an LSTM also c: ([samples], directions, batch, hidden)
    weights: list[Tensor]  # of each direction: input, hidden, their biases, the projection, ([samples], ...) each
    kind: str
    biases: bool
    bidirectional: bool
    stacked: list[bool]  # whether x, each state and each weight has the samples axis

    @property
    def samples(self) -> int | None:
        """The number of samples, or None without any."""
        return next((t.shape[0] for t, s in zip(self.tensors, self.stacked, strict=True) if s), None)

    @property
    def tensors(self) -> list[Tensor]:
        return [self.x, *self.states, *self.weights]

    @property
    def shares_weights(self) -> bool:
        return not any(self.stacked[1 + len(self.states) :])

    def of(self, tensors: Sequence[Tensor], stacked: bool, batch_sizes: Tensor | None = None) -> "_Layer":
        """The same layer with these tensors, all stacked or none."""
        x, states, weights = tensors[0], tensors[1 : 1 + len(self.states)], tensors[1 + len(self.states) :]
        sizes = self.batch_sizes if batch_sizes is None else batch_sizes
        flags = [stacked] * len(self.tensors)
        return _Layer(x, sizes, list(states), list(weights), self.kind, self.biases, self.bidirectional, flags)

    def each(self) -> "list[_Layer]":
        """The layers of all samples, without the samples axis."""
        n = self.samples or 1
        parts = [t.unbind(0) if s else (t,) * n for t, s in zip(self.tensors, self.stacked, strict=True)]
        return [self.of(tensors, False) for tensors in zip(*parts, strict=True)]

    def expanded(self) -> "_Layer":
        """The layer with a samples axis in every tensor, without copies."""
        n = self.samples or 1
        pairs = zip(self.tensors, self.stacked, strict=True)
        return self.of([t if s else t.expand(n, *t.shape) for t, s in pairs], True)


def _library(layer: _Layer) -> tuple[Tensor, ...]:
    """torch's own layer, without a samples axis."""
    function = getattr(torch, layer.kind)
    states = layer.states if layer.kind == "lstm" else layer.states[0]
    packed = () if layer.batch_sizes is None else (layer.batch_sizes,)
    order = (False,) if layer.batch_sizes is None else ()
    weights, options = layer.weights, (layer.biases, 1, 0.0, False, layer.bidirectional, *order)
    return function(layer.x, *packed, states, weights, *options)


def _one_by_one(layer: _Layer, run: Callable[[_Layer], tuple[Tensor, ...]] = _library) -> tuple[Tensor, ...]:
    """torch's own layer for each sample in turn: the reference, which has a derivative."""
    if layer.samples is None:
        return run(layer)
    outputs = [run(one) for one in layer.each()]
    return tuple(torch.stack(each) for each in zip(*outputs, strict=True))


def _run(layer: _Layer) -> tuple[Tensor, ...]:
    """The outputs and final states, by whichever of torch's layer and the scan is faster for these sizes."""
    samples = layer.samples
    if samples is not None and layer.shares_weights:
        return _as_rows(layer, samples, _run)
    if _prefers_library(layer):
        return _one_by_one(layer)
    return _scan(layer)


def _prefers_library(layer: _Layer) -> bool:
    rows, hidden = layer.states[0].shape[-2:]
    sizes = layer.batch_sizes
    if layer.x.device.type != "cpu" or layer.x.dtype not in (torch.float32, torch.float64) or not layer.x.numel():
        return True
    if sizes is not None:
        return len(sizes) * rows > _WASTE * layer.x.shape[-2] and rows * hidden > _LARGE
    return _has_onednn(layer)


def _has_onednn(layer: _Layer) -> bool:
    """Whether oneDNN has this layer, on a CPU."""
    per_direction = len(layer.weights) // (2 if layer.bidirectional else 1)
    projected = per_direction > (4 if layer.biases else 2)
    return (
        layer.kind == "lstm"
        and not projected
        and layer.x.dtype == torch.float32
        and bool(torch.backends.mkldnn.enabled)
    )


def _as_rows(layer: _Layer, samples: int, run: Callable[[_Layer], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """The samples of one set of weights as rows of one layer; the samples axis is the inner one of the rows."""
    everything = layer.expanded()
    inner = [t.movedim(0, -2) for t in (everything.x, *everything.states)]  # (..., batch or entries, samples, features)
    tensors = [t.flatten(-3, -2) for t in inner] + layer.weights
    sizes = None if layer.batch_sizes is None else layer.batch_sizes * samples
    outputs = run(layer.of(tensors, False, sizes))
    return tuple(t.unflatten(-2, (-1, samples)).movedim(-2, 0) for t in outputs)


# -- the scan


def _scan(layer: _Layer) -> tuple[Tensor, ...]:
    """The layer by one loop over time in which each step is a batched product over samples and directions."""
    whole = layer.expanded()
    directions = 2 if layer.bidirectional else 1
    n, size = whole.states[0].shape[0], len(whole.weights) // directions
    packing = None if layer.batch_sizes is None else Packing(layer.batch_sizes)
    if packing is not None:
        whole = whole.of([packing.pad(whole.x), *whole.states, *whole.weights], True)
        one = whole.x if layer.stacked[0] else whole.x[:1]
    else:
        one = whole.x if layer.stacked[0] else layer.x.unsqueeze(0)
    steps, rows = one.shape[1:3]
    products, hidden, hidden_biases, projections = [], [], [], []
    for direction in range(directions):
        weights = iter(whole.weights[direction * size : (direction + 1) * size])
        w_input, w_hidden = next(weights), next(weights)
        b_input, b_hidden = (next(weights), next(weights)) if layer.biases else (None, None)
        projections += list(weights)
        x = one if direction == 0 else packing.reverse(one) if packing is not None else one.flip(1)
        flat = x.reshape(len(one), steps * rows, -1).expand(n, -1, -1)
        if b_input is None or b_hidden is None:
            product = torch.bmm(flat, w_input.mT)
        elif layer.kind == "gru":  # its reset gate multiplies the hidden bias too
            product = torch.baddbmm(b_input.unsqueeze(1), flat, w_input.mT)
            hidden_biases.append(b_hidden)
        else:
            product = torch.baddbmm((b_input + b_hidden).unsqueeze(1), flat, w_input.mT)
        products.append(product.view(n, steps, rows, -1))
        hidden.append(w_hidden)
    join = lambda parts: parts[0] if len(parts) == 1 else torch.cat(parts)
    states = [t.transpose(0, 1).flatten(0, 1) for t in whole.states]  # (directions * samples, batch, hidden)
    gates = list(join(products).unbind(1))  # of each step: (directions * samples, batch, gates * hidden)
    bias = join(hidden_biases).unsqueeze(1) if hidden_biases else None
    projection = join(projections).mT if projections else None
    outputs, cells = STEPS[layer.kind](gates, join(hidden).mT, bias, projection, states)
    final = [outputs, *([cells] if layer.kind == "lstm" else [])]
    if packing is None:
        finals = [t[-1] for t in final]
    else:
        finals = [packing.last(t) for t in final]
    finals = [t.unflatten(0, (directions, n)).transpose(0, 1) for t in finals]
    each = [outputs[:, d * n : (d + 1) * n].transpose(0, 1) for d in range(directions)]  # (samples, steps, batch, ...)
    if directions == 2:
        each[1] = packing.reverse(each[1]) if packing is not None else each[1].flip(1)
    joined = torch.cat(each, -1) if directions == 2 else each[0]
    if packing is not None:
        joined = packing.pack(joined)
    results = (joined, *finals)
    return results if layer.samples is not None else tuple(t[0] for t in results)


# -- the operator, registered in the plain way because torch.library.custom_op takes 0.1 ms of a call

library_of_vbdl = torch.library.Library("vbdl", "FRAGMENT")
library_of_vbdl.define(
    "recurrent_layer(Tensor x, Tensor? batch_sizes, Tensor[] states, Tensor[] weights, str kind, bool biases, "
    "bool bidirectional, bool[] stacked) -> (Tensor, Tensor, Tensor)"
)
recurrent_layer = torch.ops.vbdl.recurrent_layer.default
"""The outputs, final h and final c of one layer; arguments as in `_Layer`; c is empty if not an LSTM's.

kind: "lstm", "gru", "rnn_tanh" or "rnn_relu". Outputs have a leading samples axis if any argument has.
"""


@torch.no_grad()
def _outputs(x, batch_sizes, states, weights, kind, biases, bidirectional, stacked) -> tuple[Tensor, Tensor, Tensor]:
    layer = _Layer(x, batch_sizes, states, weights, kind, biases, bidirectional, stacked)
    out, h, *c = _run(layer)
    finals = [t.clone(memory_format=torch.contiguous_format) for t in (h, *c)]  # they may be views of the outputs
    return out.contiguous(), finals[0], finals[1] if c else _none(layer)


library_of_vbdl.impl("recurrent_layer", _outputs, "CompositeExplicitAutograd")


def _none(layer: _Layer) -> Tensor:
    """The final c of a layer that has none; the samples axis is there, because vmap needs it."""
    return layer.x.new_empty((0,) if layer.samples is None else (layer.samples, 0))


def _shapes(x, batch_sizes, states, weights, kind, biases, bidirectional, stacked) -> tuple[Tensor, ...]:
    layer = _Layer(x, batch_sizes, states, weights, kind, biases, bidirectional, stacked)
    lead = () if layer.samples is None else (layer.samples,)
    directions, hidden = (2 if bidirectional else 1), states[0].shape[-1]
    inner = x.shape[1:-1] if stacked[0] else x.shape[:-1]
    empty = [x.new_empty((*lead, *inner, directions * hidden))]
    empty += [x.new_empty((*lead, *t.shape[-3:])) for t in states]
    return (*empty, _none(layer)) if len(states) == 1 else tuple(empty)


torch.library.register_fake("vbdl::recurrent_layer", _shapes, lib=library_of_vbdl)


def _mapped(info, in_dims, x, batch_sizes, states, weights, kind, biases, bidirectional, stacked):
    dims = [in_dims[0], *in_dims[2], *in_dims[3]]
    tensors = [t if d is None else t.movedim(d, 0) for t, d in zip((x, *states, *weights), dims, strict=True)]
    if any(stacked):  # a vmap inside the module, within that over draws: one after the other
        each = []
        for index in range(info.batch_size):
            one = [t if d is None else t[index] for t, d in zip(tensors, dims, strict=True)]
            parts = one[0], batch_sizes, one[1 : 1 + len(states)], one[1 + len(states) :]
            each.append(recurrent_layer(*parts, kind, biases, bidirectional, stacked))
        return tuple(torch.stack(column) for column in zip(*each, strict=True)), (0, 0, 0)
    parts = tensors[0], batch_sizes, tensors[1 : 1 + len(states)], tensors[1 + len(states) :]
    return recurrent_layer(*parts, kind, biases, bidirectional, [d is not None for d in dims]), (0, 0, 0)


torch.library.register_vmap("vbdl::recurrent_layer", _mapped, lib=library_of_vbdl)


def with_gradients(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors that a backward pass differentiates by, in the graph of the forward if it is differentiated again."""
    again = torch.is_grad_enabled()
    return [t if again and t.requires_grad else t.detach().requires_grad_() for t in tensors]


def gradients_of(pairs: Sequence[tuple[Tensor, Tensor]], tensors: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Differentiate outputs by tensors; pairs: each output and the gradient of what follows by it."""
    outputs, own = zip(*pairs, strict=True)
    again = torch.is_grad_enabled()
    return torch.autograd.grad(outputs, tensors, own, allow_unused=True, create_graph=again)


def _setup(ctx, inputs, output) -> None:
    x, batch_sizes, states, weights, *ctx.options = inputs
    ctx.n_states, ctx.batch_sizes = len(states), batch_sizes
    ctx.save_for_backward(x, *states, *weights)


def _backward(ctx, *gradients):
    """The gradient of torch's own layers, which run again here."""
    tensors = with_gradients(ctx.saved_tensors)
    n = 1 + ctx.n_states
    with torch.enable_grad():
        layer = _Layer(tensors[0], ctx.batch_sizes, tensors[1:n], tensors[n:], *ctx.options)
        outputs = _one_by_one(layer)
    pairs = [(o, g) for o, g in zip(outputs, gradients, strict=False) if g is not None and o.requires_grad]
    found = gradients_of(pairs, tensors)
    return found[0], None, list(found[1:n]), list(found[n:]), None, None, None, None


torch.library.register_autograd("vbdl::recurrent_layer", _backward, setup_context=_setup, lib=library_of_vbdl)


def lowered(*arguments) -> tuple[Tensor, ...]:
    """The operator for graphs that must not hold it: by torch's own layer where that is one node, else by its scan."""
    layer = _Layer(*arguments)
    if layer.x.device.type == "cpu" and layer.x.numel() and _has_onednn(layer):
        return _of_single_layers(layer, _library)
    lifted = [(t if s else t.unsqueeze(0), None) for t, s in zip(layer.tensors, layer.stacked, strict=True)]
    n = 1 + len(layer.states)
    options = layer.batch_sizes, layer.kind, layer.biases, layer.bidirectional
    outputs = DualLayer(lifted[0], lifted[1:n], lifted[n:], *options).values(in_graph)
    if layer.samples is None:
        outputs = tuple(t[0] for t in outputs)
    return outputs if len(outputs) == 3 else (*outputs, _none(layer))


def lowered_to_single_layers(*arguments) -> tuple[Tensor, ...]:
    """The operator by operators without a samples axis; NotImplemented, which keeps it, if it is one."""
    layer = _Layer(*arguments)
    return NotImplemented if layer.samples is None else _of_single_layers(layer, _as_operator)


def _as_operator(layer: _Layer) -> tuple[Tensor, ...]:
    options = (layer.kind, layer.biases, layer.bidirectional, layer.stacked)
    outputs = recurrent_layer(layer.x, layer.batch_sizes, layer.states, layer.weights, *options)
    return outputs[: 1 + len(layer.states)]


def _of_single_layers(layer: _Layer, run: Callable[[_Layer], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    samples = layer.samples
    if samples is not None and layer.shares_weights:
        outputs = _as_rows(layer, samples, run)
    else:
        outputs = _one_by_one(layer, run)
    return outputs if len(outputs) == 3 else (*outputs, _none(layer))


def sentences(graph: fx.Graph) -> list[str]:
    """How the recurrent layers of a traced graph are executed, in a sentence for each way."""
    ways = []
    for node in graph.nodes:
        if node.target is recurrent_layer:
            layer = _Layer(*tree_map_only(fx.Node, lambda n: n.meta["val"], node.args))
            if layer.samples is None:
                ways.append("a recurrent layer that no draw changes runs once for all of them")
            elif layer.shares_weights:
                ways.append("the draws are rows of one recurrent layer, whose weights they share")
            elif _prefers_library(layer):
                ways.append("torch's own recurrent layer, which is faster than a scan, runs one draw after the other")
            else:
                ways.append("recurrent layers of different weights share one scan over time, with batched products")
    return list(dict.fromkeys(ways))


def _flops(x, batch_sizes, states, weights, kind, biases, bidirectional, stacked, out_shape=None, **options) -> int:
    """The flops of all products, for every sample and step."""
    first = 1 + len(states)
    samples = next((t[0] for t, s in zip((x, *states, *weights), stacked, strict=True) if s), 1)
    sizes = [math.prod(w[1:] if s else w) for w, s in zip(weights, stacked[first:], strict=True)]
    matrices = sum(size for w, s, size in zip(weights, stacked[first:], sizes, strict=True) if len(w) == 2 + s)
    return 2 * samples * math.prod(x[1:-1] if stacked[0] else x[:-1]) * matrices


register_flop_formula(torch.ops.vbdl.recurrent_layer)(_flops)  # type: ignore[misc]
