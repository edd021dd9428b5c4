"""The rewrite of dropout that computes only the kept units, with the same masks and results as the dense network.

With one mask per draw, a draw of a dropout network *is* a smaller dense network: the kept rows and columns of each
weight matrix are gathered once, and a hidden layer costs (1 - p)^2 of its operations. If all draws share a layer's
input and the layer has few outputs, its mask is instead multiplied into the weights: one wide product for all draws.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from vbdl.compiling.graph import BODY, DRAWN, PREFIX, dependence, name_of
from vbdl.compiling.rewrite import cost
from vbdl.compiling.rewrite.linear import LINEAR, arguments, is_linear

_aten = torch.ops.aten
_ROUND = 16  # the number of kept units is rounded up to a multiple of this, with units of weight zero
_POINTWISE = {
    "relu", "gelu", "tanh", "sigmoid", "silu", "elu", "leaky_relu", "hardtanh", "hardswish", "hardsigmoid", "mish",
    "softplus", "exp", "neg", "abs", "sin", "cos", "clamp", "clamp_min", "clamp_max", "_to_copy", "detach", "clone",
    "mul", "add", "sub", "div", "pow", "sqrt", "rsqrt", "log", "log1p", "erf", "square",
}  # fmt: skip


def kept_units(mask: Tensor, width: int) -> Tensor:
    """The indices of the units that a mask keeps, in ascending order, then of dropped units to fill up.

    mask: (samples, ..., units). Returns (samples, width).
    """
    dropped = (mask.flatten(1) == 0).to(torch.int8)
    return dropped.sort(dim=1, stable=True).indices[:, :width]


def of_units(t: Tensor, units: Tensor, stacked: bool) -> Tensor:
    """Gather units along the last axis of t.

    t: (samples, ..., n) if stacked, else (..., n). units: (samples, width) indices. Returns (samples, ..., width).
    """
    if not stacked:
        t = t.expand(units.shape[0], *t.shape)
    index = units.view(units.shape[0], *[1] * (t.ndim - 2), -1).expand(*t.shape[:-1], -1)
    return t.gather(-1, index)


def submatrix(
    weight: Tensor, outputs: Tensor | None, inputs: Tensor | None, scale: Tensor | None, stacked: bool
) -> Tensor:
    """Gather the kept outputs and inputs of weights, and scale the inputs.

    weight: (samples, n, i) if stacked, else (n, i). outputs: (samples, m) indices. inputs: (samples, k) indices.
    scale: (samples, k). Returns (samples, m, k). Outputs or inputs of None are all kept.
    """
    if outputs is not None and inputs is not None and not stacked:
        weight = weight[outputs.unsqueeze(2), inputs.unsqueeze(1)]  # without an intermediate (samples, m, i)
    else:
        if outputs is not None:
            weight = of_units(weight.mT, outputs, stacked).mT
            stacked = True
        if inputs is not None:
            weight = of_units(weight, inputs, stacked)
    return weight if scale is None else weight * scale.unsqueeze(1)


@dataclass
class _Site:
    """A dropout mask on the input of one or more linear layers: mul(source, mask)."""

    node: fx.Node  # the product of source and mask
    mask: fx.Node  # (samples, 1, ..., units), depends on the draw only
    source: fx.Node  # the value that is masked
    chain: list[fx.Node]  # pointwise operations from producer to source, in order
    producer: fx.Node  # a linear layer whose outputs can be left out, or any other value
    consumers: list[fx.Node]  # the linear layers
    width: int = 0  # the largest number of kept units of any draw, rounded up
    units: fx.Node | None = field(default=None, repr=False)  # node: (samples, width) indices of the kept units
    scale: fx.Node | None = field(default=None, repr=False)  # node: (samples, width), the mask at these units

    @property
    def size(self) -> int:
        """The number of units of the mask, kept or dropped."""
        return self.mask.meta["val"].shape[-1]


def compact(
    traced: fx.GraphModule,
    kinds: list[int],
    n_samples: int,
    budget: int,
    measure: Callable[[fx.Node, Callable[[Tensor], int]], int],
) -> list[str]:
    """Rewrite a traced graph in place if the cost model finds that cheaper, and return a sentence on each choice.

    budget: bytes for values that are kept of all draws. measure: measure(node, of) is the maximum of `of` over blocks
    of a node's values in all draws.
    """
    region = dependence(traced, kinds)
    sites = _sites(traced, region)
    for site in sites:
        site.width = max(_ROUND, -(-measure(site.mask, _most_kept) // _ROUND) * _ROUND)
    smaller = [s for s in sites if s.width <= 0.9 * s.size]
    sentences: list[str] = []
    if smaller:
        dense, thin, size = _costs(smaller, region, n_samples)
        words = f"leaving out the dropped units is estimated at {_ms(thin)} a tile, masking them at {_ms(dense)}"
        if size > budget:
            sentences.append(f"dropped units are masked: the smaller networks of all draws take {size / 2**20:.0f} MiB")
        elif thin < 0.9 * dense:
            _thin(traced, smaller, region)
            sentences.append(f"every draw is a smaller network: {words}")
            sites = [s for s in sites if s not in smaller]
        else:
            sentences.append(f"dropped units are masked: {words}")
    for site in sites:
        if region[site.source] == PREFIX and (sentence := _fold(traced, site, n_samples, budget)):
            sentences.append(sentence)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    return sentences


def _sites(traced: fx.GraphModule, region: dict[fx.Node, int]) -> list[_Site]:
    """Find the products of a value and a mask with one number a draw and unit whose users are all linear layers."""
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
            continue  # the mask has more than one number for a draw and unit
        if region[source] == BODY and source.meta["val"].shape != whole.shape:
            continue
        chain, producer = _back(source, node, region)
        sites.append(_Site(node, mask, source, chain, producer, users))
    return sites


def _takes(user: fx.Node, node: fx.Node) -> bool:
    """True if `user` is a linear layer with `node` as its stacked input, and as nothing else."""
    return is_linear(user) and user.args[0] is node and user.args[1] is not node and arguments(user)[3][0]


def _back(source: fx.Node, user: fx.Node, region: dict[fx.Node, int]) -> tuple[list[fx.Node], fx.Node]:
    """Follow pointwise operations with a single user from `source` back to a linear layer.

    Returns the operations in order, and the layer; or [] and `source`, if there is no such layer.
    """
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
    """The input that depends on the row, if the node is a pointwise operation with exactly one; otherwise None.

    All other inputs must be scalars or have one value for each unit.
    """
    if name_of(node) not in _POINTWISE:
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
    """The largest number of units that a draw's mask keeps; mask: (samples, ..., units)."""
    return int((mask.flatten(1) != 0).sum(1).max())


def _shape_of(linear: fx.Node) -> tuple[int, int, int]:
    """The numbers (rows, inputs, outputs) of a linear layer for one sample."""
    x, weight, _, stacked = arguments(linear)
    value = x.meta["val"]
    rows = value[0].numel() if stacked[0] else value.numel()
    outputs, inputs = weight.meta["val"].shape[-2:]
    return rows // inputs, inputs, outputs


def _costs(sites: list[_Site], region: dict[fx.Node, int], n_samples: int) -> tuple[float, float, int]:
    """The cost of all linear layers before and after these masks.

    Returns the seconds with masks, the seconds with only the kept units, and the bytes of the gathered weights.
    """
    inputs = {c: s for s in sites for c in s.consumers}
    outputs = {s.producer: s for s in sites if is_linear(s.producer)}
    dense = thin = 0.0
    size = 0
    for linear in dict.fromkeys([*inputs, *outputs]):
        rows, k, n = _shape_of(linear)
        small_k = inputs[linear].width if linear in inputs else k
        small_n = outputs[linear].width if linear in outputs else n
        if arguments(linear)[3][1]:  # the weights are stacked already
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
    """Replace the linear layers before and after these masks by smaller ones of only the kept units."""
    graph = traced.graph
    order = {node: i for i, node in enumerate(graph.nodes)}
    for site in sites:
        with graph.inserting_after(site.mask):
            site.units = graph.call_function(kept_units, (site.mask, site.width))
        with graph.inserting_after(site.units):
            flat = graph.call_function(torch.flatten, (site.mask, 1))
        with graph.inserting_after(flat):
            site.scale = graph.call_function(torch.gather, (flat, 1, site.units))
    _sort(traced, [n for s in sites for n in (s.units, s.scale) if n is not None])
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
            replaced[linear] = new  # `_compacted` rebuilds the users of this layer on fewer units


def _compacted(graph: fx.Graph, site: _Site, replaced: dict[fx.Node, fx.Node], region: dict[fx.Node, int]) -> fx.Node:
    """The kept units of a site's source, (samples, rows, ..., width); the mask's scale is in the weights after it."""
    if site.node in replaced:
        return replaced[site.node]
    if site.producer not in replaced:
        value = graph.call_function(of_units, (site.source, site.units, region[site.source] == BODY))
    else:
        value = replaced[site.producer]
        inner = site.producer
        for step in site.chain:
            args, kwargs = map_arg(
                (step.args, dict(step.kwargs)),
                lambda n, inner=inner, value=value: value if n is inner else _of_kept(graph, n, site, region),
            )
            inner, value = step, graph.create_node("call_function", step.target, args, kwargs)
    replaced[site.node] = value
    return value


def _of_kept(graph: fx.Graph, node: fx.Node, site: _Site, region: dict[fx.Node, int]) -> fx.Node:
    """Gather the kept units of a value with one number for each unit, (samples, 1, ..., width); a scalar stays."""
    value = node.meta["val"]
    if not value.ndim or value.shape[-1] == 1:
        return node
    stacked = region[node] == DRAWN
    if not stacked:  # add the axes that broadcasting against (samples, rows, units) would add
        whole = site.node.meta["val"].ndim
        node = graph.call_function(torch.reshape, (node, [1] * (whole - 1 - value.ndim) + list(value.shape)))
    return graph.call_function(of_units, (node, site.units, stacked))


def _masked_or_folded(site: _Site, n_samples: int) -> tuple[float, float]:
    """The seconds of the layers after a mask whose source all draws share.

    Returns them for the mask applied to activations, and for the mask folded into the weights.
    """
    rows, k, _ = _shape_of(site.consumers[0])
    outputs = sum(_shape_of(c)[2] for c in site.consumers)
    masked = cost.product(1, n_samples * rows, k, outputs) + cost.activations(n_samples, rows, k)
    return masked, cost.product(1, rows, k, n_samples * outputs) + cost.weights(n_samples, k, outputs)


def _fold(traced: fx.GraphModule, site: _Site, n_samples: int, budget: int) -> str | None:
    """Fold a mask into the weights of the layers after it if that is cheaper; return a sentence, None if impossible."""
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
    """Move these nodes and what they depend on to the front of the graph: a mask's units are needed by its producer."""
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
