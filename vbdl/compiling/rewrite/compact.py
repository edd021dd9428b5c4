"""Dropout as arithmetic that is left out, with the masks and the results of the dense network.

With one mask per draw, a draw of a dropout network *is* a smaller dense network: the kept rows and columns of each
linear layer are gathered once, and a hidden layer costs (1 - p)^2 of its operations. Where all draws still share a
layer's input and it has few outputs, its mask is folded into the weights instead: one wide product for all draws.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from vbdl.compiling.graph import BODY, DRAWN, PREFIX, dependence
from vbdl.compiling.rewrite import cost
from vbdl.compiling.rewrite.linear import LINEAR, arguments, is_linear

_aten = torch.ops.aten
_ROUND = 16  # kept units are padded to this, with units of weight zero
_POINTWISE = {
    "relu", "gelu", "tanh", "sigmoid", "silu", "elu", "leaky_relu", "hardtanh", "hardswish", "hardsigmoid", "mish",
    "softplus", "exp", "neg", "abs", "sin", "cos", "clamp", "clamp_min", "clamp_max", "_to_copy", "detach", "clone",
    "mul", "add", "sub", "div", "pow", "sqrt", "rsqrt", "log", "log1p", "erf", "square",
}  # fmt: skip


def kept_units(mask: Tensor, width: int) -> Tensor:
    """(samples, width) indices of the units a mask (samples, ..., units) keeps, in order, then of dropped ones."""
    dropped = (mask.flatten(1) == 0).to(torch.int8)
    return dropped.sort(dim=1, stable=True).indices[:, :width]


def of_units(t: Tensor, units: Tensor, stacked: bool) -> Tensor:
    """t (samples, ..., n) or (..., n) at (samples, width) units of its last axis -> (samples, ..., width)."""
    if not stacked:
        t = t.expand(units.shape[0], *t.shape)
    index = units.view(units.shape[0], *[1] * (t.ndim - 2), -1).expand(*t.shape[:-1], -1)
    return t.gather(-1, index)


def submatrix(
    weight: Tensor, outputs: Tensor | None, inputs: Tensor | None, scale: Tensor | None, stacked: bool
) -> Tensor:
    """Kept outputs (samples, m) and inputs (samples, k) of weights ((samples), n, i) -> (samples, m, k), its inputs
    scaled by (samples, k)."""
    if outputs is not None and inputs is not None and not stacked:
        found = weight[outputs.unsqueeze(2), inputs.unsqueeze(1)]  # no (samples, m, i) on the way
    else:
        found = weight
        if outputs is not None:
            found = of_units(found.mT, outputs, stacked).mT
            stacked = True
        if inputs is not None:
            found = of_units(found, inputs, stacked)
    return found if scale is None else found * scale.unsqueeze(1)


@dataclass
class _Site:
    """A mask on what one or more linear layers take: mul(y, mask)."""

    node: fx.Node  # the masked input
    mask: fx.Node  # (samples, 1, ..., units), depends on the draw only
    source: fx.Node  # what is masked
    chain: list[fx.Node]  # pointwise steps from producer to source, in order
    producer: fx.Node  # a linear layer whose outputs can be left out, or any other value
    consumers: list[fx.Node]
    width: int = 0  # kept units, the most of any draw, padded
    units: Any = field(default=None, repr=False)
    scale: Any = field(default=None, repr=False)

    @property
    def size(self) -> int:
        return self.mask.meta["val"].shape[-1]


def compact(
    traced: fx.GraphModule,
    kinds: list[int],
    n_samples: int,
    budget: int,
    measure: Callable[[fx.Node, Callable[[Tensor], int]], int],
) -> list[str]:
    """Rewrite in place where the cost model finds it cheaper; returns a sentence on each choice.

    budget: bytes for what is kept of all draws. measure: the largest of a measure of blocks of a drawn value, over
    blocks of all draws.
    """
    region = dependence(traced, kinds)
    sites = _sites(traced, region)
    for site in sites:
        site.width = max(_ROUND, -(-measure(site.mask, _most_kept) // _ROUND) * _ROUND)
    smaller = [s for s in sites if s.width <= 0.9 * s.size]
    said: list[str] = []
    if smaller:
        dense, thin, size = _costs(smaller, region, n_samples)
        words = f"leaving out the dropped units is estimated at {_ms(thin)} a tile, masking them at {_ms(dense)}"
        if size > budget:
            said.append(f"dropped units are masked: the smaller networks of all draws take {size / 2**20:.0f} MiB")
        elif thin < 0.9 * dense:
            _thin(traced, smaller, region)
            said.append(f"every draw is a smaller network: {words}")
            sites = [s for s in sites if s not in smaller]
        else:
            said.append(f"dropped units are masked: {words}")
    for site in sites:
        if region[site.source] == PREFIX and (told := _fold(traced, site, n_samples, budget)):
            said.append(told)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    return said


def _sites(traced: fx.GraphModule, region: dict[fx.Node, int]) -> list[_Site]:
    sites = []
    for node in traced.graph.nodes:
        if node.target is not _aten.mul.Tensor or region[node] != BODY:
            continue
        users = list(node.users)
        if not users or not all(_takes(u, node) for u in users):
            continue
        a, b = node.args
        for source, mask in ((a, b), (b, a)):
            if isinstance(mask, fx.Node) and isinstance(source, fx.Node) and region[mask] == DRAWN != region[source]:
                break
        else:
            continue
        value, whole = mask.meta["val"], node.meta["val"]
        if value.ndim != whole.ndim or value.shape[-1] != whole.shape[-1] or any(n != 1 for n in value.shape[1:-1]):
            continue  # not one mask per draw and unit
        if region[source] == BODY and source.meta["val"].shape != whole.shape:
            continue
        chain, producer = _back(source, node, region)
        sites.append(_Site(node, mask, source, chain, producer, users))
    return sites


def _takes(user: fx.Node, node: fx.Node) -> bool:
    """Whether a node is the stacked input of a linear layer, and nothing else of it."""
    return is_linear(user) and user.args[0] is node and user.args[1] is not node and arguments(user)[3][0]


def _back(source: fx.Node, user: fx.Node, region: dict[fx.Node, int]) -> tuple[list[fx.Node], fx.Node]:
    """The pointwise steps before `source` that only it uses, back to a linear layer if there is one."""
    chain: list[fx.Node] = []
    node = source
    while region[node] == BODY and list(node.users) == [user]:
        if is_linear(node):
            return chain[::-1], node
        inside = _step(node, region)
        if inside is None:
            break
        chain.append(node)
        node, user = inside, node
    return [], source


def _step(node: fx.Node, region: dict[fx.Node, int]) -> fx.Node | None:
    """The one input of a pointwise step that has units of this draw and row; its others are one value a unit."""
    if node.op != "call_function" or getattr(node.target, "_opname", "") not in _POINTWISE:
        return None
    inner = None
    shape = node.meta["val"].shape
    for used in node.all_input_nodes:
        if region[used] in (PREFIX, BODY):
            if inner is not None or used.meta["val"].shape != shape:
                return None
            inner = used
        elif used.meta["val"].ndim and used.meta["val"].shape[-1] not in (1, shape[-1]):
            return None
    return inner


def _most_kept(mask: Tensor) -> int:
    return int((mask.flatten(1) != 0).sum(1).max())


def _shape_of(linear: fx.Node) -> tuple[int, int, int]:
    """(rows, inputs, outputs) of one sample."""
    x, weight, _, stacked = arguments(linear)
    value = x.meta["val"]
    rows = value[0].numel() if stacked[0] else value.numel()
    outputs, inputs = weight.meta["val"].shape[-2:]
    return rows // inputs, inputs, outputs


def _costs(sites: list[_Site], region: dict[fx.Node, int], n_samples: int) -> tuple[float, float, int]:
    """(seconds masked, seconds compacted, bytes kept) of every linear layer that the sites touch."""
    inputs = {c: s for s in sites for c in s.consumers}
    outputs = {s.producer: s for s in sites if is_linear(s.producer)}
    dense = thin = 0.0
    size = 0
    for linear in dict.fromkeys([*inputs, *outputs]):
        rows, k, n = _shape_of(linear)
        small_k = inputs[linear].width if linear in inputs else k
        small_n = outputs[linear].width if linear in outputs else n
        if arguments(linear)[3][1]:  # weights of its own for every sample in any case
            dense += cost.product(n_samples, rows, k, n) + cost.weights(n_samples, k, n)
        elif linear not in inputs or region[inputs[linear].source] != PREFIX:
            dense += cost.product(1, n_samples * rows, k, n)
        thin += cost.product(n_samples, rows, small_k, small_n) + cost.weights(n_samples, small_k, small_n)
        size += 4 * n_samples * small_k * small_n
    for site in sites:
        rows = _shape_of(site.consumers[0])[0]
        if region[site.source] == PREFIX:
            dense += min(_masked_or_folded(site, n_samples))
        else:
            dense += cost.activations(n_samples, rows, site.size)
        thin += cost.activations(n_samples, rows, site.width)
    return dense, thin, size


def _thin(traced: fx.GraphModule, sites: list[_Site], region: dict[fx.Node, int]) -> None:
    graph = traced.graph
    order = {node: i for i, node in enumerate(graph.nodes)}
    for site in sites:
        with graph.inserting_after(site.mask):
            site.units = graph.call_function(kept_units, (site.mask, site.width))
        with graph.inserting_after(site.units):
            flat = graph.call_function(torch.flatten, (site.mask, 1))
        with graph.inserting_after(flat):
            site.scale = graph.call_function(torch.gather, (flat, 1, site.units))
    _sort(traced, [n for s in sites for n in (s.units, s.scale)])
    inputs = {c: s for s in sites for c in s.consumers}
    outputs = {s.producer: s for s in sites if is_linear(s.producer)}
    replaced: dict[fx.Node, fx.Node] = {}
    for linear in sorted(dict.fromkeys([*inputs, *outputs]), key=order.__getitem__):
        before, after = inputs.get(linear), outputs.get(linear)
        x, weight, bias, stacked = arguments(linear)
        with graph.inserting_before(linear):
            if before is not None:
                x = _compacted(graph, before, replaced, region)
            weight = graph.call_function(
                submatrix,
                (
                    weight,
                    after.units if after else None,
                    before.units if before else None,
                    before.scale if before else None,
                    stacked[1],
                ),
            )
            if bias is not None and after is not None:
                bias = graph.call_function(of_units, (bias, after.units, stacked[2]))
            flags = [stacked[0] or before is not None, True, stacked[2] or after is not None]
            new = graph.call_function(LINEAR, (x, weight, bias, flags))
        if after is None:
            linear.replace_all_uses_with(new)
        else:
            replaced[linear] = new  # its users are rebuilt on fewer units


def _compacted(graph: fx.Graph, site: _Site, replaced: dict[fx.Node, fx.Node], region: dict[fx.Node, int]) -> fx.Node:
    """What the mask let through, its kept units only; the mask's scale is in the weights."""
    if site.node in replaced:
        return replaced[site.node]
    if site.producer not in replaced:
        found = graph.call_function(of_units, (site.source, site.units, region[site.source] == BODY))
    else:
        found = replaced[site.producer]
        inner = site.producer
        for step in site.chain:
            args, kwargs = map_arg(
                (step.args, dict(step.kwargs)),
                lambda n, inner=inner, found=found: found if n is inner else _own(graph, n, site, region),
            )
            inner, found = step, graph.create_node("call_function", step.target, args, kwargs)
    replaced[site.node] = found
    return found


def _own(graph: fx.Graph, node: fx.Node, site: _Site, region: dict[fx.Node, int]) -> fx.Node:
    """A value of each unit, of the kept ones: (samples, 1, ..., width)."""
    value = node.meta["val"]
    if not value.ndim or value.shape[-1] == 1:
        return node
    stacked = region[node] == DRAWN
    if not stacked:  # give it the axes that a broadcast against (samples, rows, units) would
        whole = site.node.meta["val"].ndim
        node = graph.call_function(torch.reshape, (node, [1] * (whole - 1 - value.ndim) + list(value.shape)))
    return graph.call_function(of_units, (node, site.units, stacked))


def _masked_or_folded(site: _Site, n_samples: int) -> tuple[float, float]:
    """Seconds of the layers after a mask on what all draws share: on activations, and in the weights."""
    rows, k, _ = _shape_of(site.consumers[0])
    outputs = sum(_shape_of(c)[2] for c in site.consumers)
    masked = cost.product(1, n_samples * rows, k, outputs) + cost.activations(n_samples, rows, k)
    return masked, cost.product(1, rows, k, n_samples * outputs) + cost.weights(n_samples, k, outputs)


def _fold(traced: fx.GraphModule, site: _Site, n_samples: int, budget: int) -> str | None:
    size = 4 * n_samples * sum(arguments(c)[1].meta["val"].numel() for c in site.consumers)
    if any(arguments(c)[3][1] for c in site.consumers) or size > budget:
        return None
    masked, folded = _masked_or_folded(site, n_samples)
    if folded >= masked:
        return f"a mask is applied to activations: estimated at {_ms(masked)} a tile, folded into weights {_ms(folded)}"
    graph = traced.graph
    with graph.inserting_after(site.mask):
        flat = graph.call_function(torch.flatten, (site.mask, 1))
    with graph.inserting_after(flat):
        mask = graph.call_function(torch.unsqueeze, (flat, 1))
    for linear in site.consumers:
        _, weight, bias, stacked = arguments(linear)
        with graph.inserting_before(linear):
            folded_weight = graph.call_function(torch.mul, (weight, mask))
            new = graph.call_function(LINEAR, (site.source, folded_weight, bias, [False, True, stacked[2]]))
        linear.replace_all_uses_with(new)
    return f"a mask is folded into the weights after it, one product for all draws: {_ms(folded)}, not {_ms(masked)}"


def _sort(traced: fx.GraphModule, early: list[fx.Node]) -> None:
    """Every drawn value before what uses it: a unit list is needed where its mask's producer is."""
    graph = traced.graph
    anchor = [n for n in graph.nodes if n.op == "placeholder"][-1]
    needed: list[fx.Node] = []
    seen: set[fx.Node] = set()

    def visit(node: fx.Node) -> None:
        if node in seen or node.op == "placeholder":
            return
        seen.add(node)
        for used in node.all_input_nodes:
            visit(used)
        needed.append(node)

    for node in early:
        visit(node)
    for node in needed:
        anchor.append(node)
        anchor = node


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2g} ms"
