"""Traced graphs of a module's forward pass, cut into four regions by what each value depends on.

    once    neither draw nor input     computed once
    drawn   the draw only              masks and weights: computed once a draw, and kept if memory allows
    prefix  the input only             the layers before the first random one: computed once a batch
    body    both                       computed for every draw and batch

The regions follow from the data flow alone, whatever the method and the layers are.
"""

import contextlib
import functools
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx._symbolic_trace as torchs
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from vbdl.calling.graphs import in_no_kernel, recorded

ONCE, DRAWN, PREFIX, BODY = range(4)  # bit 0: depends on the draw; bit 1: on the input

_one_trace = threading.RLock()
_patches = torchs._new_patcher


class _OfThisThread:
    """A flag that is true in the thread that made it, until its end: torch.fx reads it to know whether a trace runs."""

    def __init__(self) -> None:
        self._thread: int | None = threading.get_ident()

    def __bool__(self) -> bool:
        return self._thread == threading.get_ident()

    def end(self) -> None:
        self._thread = None


@contextlib.contextmanager
def _patches_of_one_thread() -> Iterator[torchs._Patcher]:
    """The context in which torch.fx replaces methods of nn.Module for a trace, entered by one thread at a time.

    torch keeps these replacements in a global variable. If Inductor traces in the background while a prediction is
    traced, one of the two fails with "CURRENT_PATCHER is None", or the replaced methods stay. Modules that another
    thread calls meanwhile keep their own methods, and functions that it has compiled run.
    """
    with _patches() as patcher:
        thread, patch, flag = threading.get_ident(), patcher.patch_method, _OfThisThread()

        def patch_in_this_thread(cls: type, name: str, new_fn: Callable, deduplicate: bool = True) -> None:
            before = getattr(cls, name)

            @functools.wraps(new_fn)
            def method(*args, **kwargs):
                return (new_fn if threading.get_ident() == thread else before)(*args, **kwargs)

            patch(cls, name, method, deduplicate)

        patcher.patch_method = patch_in_this_thread
        torchs._is_fx_tracing_flag = flag  # type: ignore[assignment]
        try:
            yield patcher
        finally:
            flag.end()


_trace = torchs.Tracer.trace


@functools.wraps(_trace)
def _trace_alone(*args: Any, **kwargs: Any) -> fx.Graph:
    """Trace by torch.fx, one thread at a time: a trace sets a flag of the process, and sets it back to what it was."""
    with _one_trace:
        return _trace(*args, **kwargs)


torchs._new_patcher = _patches_of_one_thread
torchs.Tracer.trace = _trace_alone  # type: ignore[method-assign]


def trace(
    function: Callable, *args: object, aligned: bool = True, decompositions: Mapping[OpOverload, Callable] | None = None
) -> fx.GraphModule:
    """Trace the tensor operations of function(*args), with fake tensors: shapes are fixed, mutations are removed.

    aligned: pad matrix products so that every row starts at a multiple of 64 bytes: then a row's result does not depend
        on its place in the batch, which predictions promise and training does not need.
    decompositions: aten operation -> function to trace in its place.
    """
    tracer = make_fx(
        functionalize(function, remove="mutations"),
        decomposition_table={**_PLAIN, **(_ALIGNED if aligned else {}), **(decompositions or {})},
        tracing_mode="fake",
        _allow_non_fake_inputs=True,
    )
    with recorded(), in_no_kernel():
        return tracer(*args)


def _rrelu(x: Tensor, noise: Tensor, lower=1 / 8, upper=1 / 3, training=False, generator=None) -> Tensor:
    return NotImplemented if training else F.leaky_relu(x, (lower + upper) / 2)


def _copy(into: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """The source in the place of `into`, in the memory layout of `into`: forward-mode products rely on it."""
    source = source.to(into.dtype).broadcast_to(into.shape)
    if into.is_contiguous():
        return source.clone(memory_format=torch.contiguous_format)
    order = sorted(range(into.ndim), key=into.stride, reverse=True)
    back = sorted(range(into.ndim), key=order.__getitem__)
    return source.permute(order).clone(memory_format=torch.contiguous_format).permute(back)


def _batch_norm(x: Tensor, *args: object) -> object:
    """Batch normalization of a contiguous sequence: of others the kernel returns other strides than it does traced."""
    if x.ndim != 3 or x.is_contiguous():
        return NotImplemented
    return torch.ops.aten.native_batch_norm.default(x.contiguous(), *args)


def _filled(value: float | None, has_size: bool) -> Callable[..., Tensor]:
    """A tensor of one number that nothing but its shape depends on, in the place of one made `like` another.

    value: the number; None: it is an argument. has_size: whether the size is an argument.
    """

    def fill(like: Tensor, *args: Any, dtype=None, device=None, layout=None, pin_memory=None, memory_format=None):
        size, *rest = args if has_size else (like.shape, *args)
        if layout not in (None, torch.strided) or memory_format not in (None, torch.preserve_format):
            return NotImplemented
        if not has_size and not like.is_contiguous():  # whose layout it would have
            return NotImplemented
        number: Any = rest[0] if value is None else value
        return torch.full(tuple(size), number, dtype=dtype or like.dtype, device=device or like.device)

    return fill


# rrelu_with_noise counts as random even in evaluation; the copy that functionalization writes has no derivative
_PLAIN = {
    torch.ops.aten.rrelu_with_noise.default: _rrelu,
    torch.ops.aten.copy.default: _copy,
    torch.ops.aten.native_batch_norm.default: _batch_norm,
}

CONSTANTS = {
    torch.ops.aten.new_ones.default: _filled(1, True),
    torch.ops.aten.new_zeros.default: _filled(0, True),
    torch.ops.aten.new_full.default: _filled(None, True),
    torch.ops.aten.ones_like.default: _filled(1, False),
    torch.ops.aten.zeros_like.default: _filled(0, False),
    torch.ops.aten.full_like.default: _filled(None, False),
}
"""Decompositions after which no constant looks as if it depended on the rows. In training zeros_like is no gradient."""


# On a CPU the order in which a matrix product sums a row depends on the row's alignment in memory, so the same row can
# get different last bits at different places of the batch. With every row at a multiple of 64 bytes it cannot. Matrices
# of other widths are padded with zeros; weights are padded once, not in every call. (Linear layers need no padding:
# their rows are the columns of the product, see `rewrite/linear.py`.)
_LANES = 16  # float32 numbers in 64 bytes
_BLOCK = 64  # a width that is a multiple of this is summed in the same order at any alignment


def _is_aligned(t: Tensor) -> bool:
    return all(stride % _LANES == 0 for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1 < stride)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with aligned rows, (..., m, k) @ (..., k, n); NotImplemented if the plain product has them already."""
    k, n = b.shape[-2:]
    if n % _BLOCK == 0 or (n % _LANES == 0 and _is_aligned(a) and _is_aligned(b)):
        return NotImplemented  # keeps the operation as it is
    extra_k, extra_n = -k % _LANES, -n % _LANES
    a, b = F.pad(a, (0, extra_k)), F.pad(b, (0, extra_n, 0, extra_k))
    return torch.matmul(a.contiguous(), b.contiguous())[..., :n]


def _product_and_sum(bias: Tensor, a: Tensor, b: Tensor, beta=1, alpha=1) -> Tensor:
    out = _product(a, b)
    return out if out is NotImplemented else beta * bias + alpha * out


def _product_with_vector(a: Tensor, v: Tensor) -> Tensor:
    return (a @ v.unsqueeze(-1)).squeeze(-1)


_ALIGNED = {
    torch.ops.aten.mm.default: _product,
    torch.ops.aten.bmm.default: _product,
    torch.ops.aten.addmm.default: _product_and_sum,
    torch.ops.aten.baddbmm.default: _product_and_sum,
    torch.ops.aten.mv.default: _product_with_vector,
}


@dataclass
class Region:
    """A part of a graph as a graph of its own, from a flat list of values to a list of values.

    inputs, outputs: names of the values. nodes: the part's nodes in the original graph, in order.
    """

    graph: fx.GraphModule
    inputs: list[str]
    outputs: list[str]
    nodes: list[fx.Node]

    @property
    def empty(self) -> bool:
        """True if the region has no nodes."""
        return not self.nodes

    def flops(self) -> int:
        """The number of multiplications and additions in the region's matrix products and convolutions."""
        return sum(flops_of(node) for node in self.nodes)

    def peak_bytes(self) -> int:
        """The largest number of bytes that the region's values take at any time, if its nodes run in order."""
        last = {}
        for position, node in enumerate(self.nodes):
            for used in node.all_input_nodes:
                last[used] = position
        ending: dict[int, int] = {}
        alive = peak = 0
        for position, node in enumerate(self.nodes):
            alive += own_bytes(node)
            ending[last.get(node, len(self.nodes))] = ending.get(last.get(node, len(self.nodes)), 0) + own_bytes(node)
            peak = max(peak, alive)
            alive -= ending.get(position, 0)
        return peak


@dataclass
class Cut:
    """A graph cut into its four regions."""

    regions: tuple[Region, Region, Region, Region]  # ONCE, DRAWN, PREFIX, BODY
    placeholders: list[str]  # names of the whole graph's placeholders, in order
    outputs: list[str]  # names of the values that the whole graph returns
    values: dict[str, fx.Node] = field(repr=False)  # name -> node of the whole graph

    @property
    def random(self) -> str | None:
        """The name of an operation that draws from torch's generator, or None if there is none."""
        for node in self.values.values():
            if draws_from_generator(node):
                return str(node.target)
        return None

    @property
    def output_depends_on_draw(self) -> bool:
        """True if any output of the whole graph depends on the draw."""
        return any(name in self.regions[BODY].outputs or name in self.regions[DRAWN].outputs for name in self.outputs)

    def kept_bytes(self) -> int:
        """The bytes of the values that `drawn` passes to other regions; a view counts as the whole tensor."""
        kept = set()
        for name in self.regions[DRAWN].outputs:
            node = self.values[name]
            while _is_view(node):
                node = node.all_input_nodes[0]
            if node.op != "placeholder":
                kept.add(node)
        return sum(own_bytes(node) for node in kept)

    def read_placeholders(self) -> set[str]:
        """The names of the placeholders that regions with the input read, themselves or as a view."""
        nodes = [self.values[name] for which in (PREFIX, BODY) for name in self.regions[which].inputs]
        read = set()
        for node in nodes:
            while _is_view(node):
                node = node.all_input_nodes[0]
            if node.op == "placeholder":
                read.add(node.name)
        return read


def dependence(traced: fx.GraphModule, kinds: Sequence[int]) -> dict[fx.Node, int]:
    """The region of every value: ONCE, DRAWN, PREFIX or BODY.

    kinds: the region of each placeholder, in order: ONCE, DRAWN or PREFIX.
    """
    region: dict[fx.Node, int] = {}
    placeholder_kinds = iter(kinds)
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            region[node] = next(placeholder_kinds)
        elif node.op != "output":
            region[node] = 0
            for used in node.all_input_nodes:
                region[node] |= region[used]
    return region


def part_of(traced: fx.GraphModule, wanted: fx.Node) -> Region:
    """The part of a graph that computes one value, as a function of the placeholders that it needs."""
    needed: set[fx.Node] = set()
    stack = [wanted]
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack.extend(node.all_input_nodes)
    ordered = [n for n in traced.graph.nodes if n in needed]
    placeholders = [n for n in ordered if n.op == "placeholder"]
    return extract(traced, [n for n in ordered if n.op != "placeholder"], placeholders, [wanted])


def cut(traced: fx.GraphModule, kinds: Sequence[int]) -> Cut:
    """Cut a traced graph into its four regions.

    kinds: the region of each placeholder, in order: ONCE, DRAWN or PREFIX.
    """
    later = [node for chain in _larger_copies(dependence(traced, kinds)) for node in _of_bytes(traced, chain)]
    region = {**dependence(traced, kinds), **dict.fromkeys(later, BODY)}
    placeholders = [n.name for n in traced.graph.nodes if n.op == "placeholder"]
    end = next(n for n in traced.graph.nodes if n.op == "output")
    returned = [n for n in tree_leaves(end.args) if isinstance(n, fx.Node)]

    regions = []
    for which in (ONCE, DRAWN, PREFIX, BODY):
        inside = [n for n in region if region[n] == which and n.op != "placeholder"]
        members = set(inside)
        inputs, outputs = [], []
        for node in inside:
            for used in node.all_input_nodes:
                if used not in members and used not in inputs:
                    inputs.append(used)
            if node in returned or any(user not in members for user in node.users if user.op != "output"):
                outputs.append(node)
        regions.append(extract(traced, inside, inputs, outputs))
    return Cut(tuple(regions), placeholders, [n.name for n in returned], {n.name: n for n in region})


def _larger_copies(region: Mapping[fx.Node, int]) -> list[list[fx.Node]]:
    """What the body can compute from a smaller value of `drawn`: a mask in bytes is kept, not the same in floats.

    The body reads a value of each element by itself anyway, in loops that are compiled into one. Returns chains of
    nodes, each the only user of the one after it.
    """
    chains = []
    for node, which in region.items():
        if which != DRAWN or not _is_of_each(node) or any(region.get(user) != BODY for user in node.users):
            continue
        chain = [node]
        while _is_of_each(source := chain[-1].all_input_nodes[0]) and set(source.users) == {chain[-1]}:
            chain.append(source)
        if region[source] == DRAWN and source.op != "placeholder" and 2 * _all_bytes(source) <= _all_bytes(node):
            chains.append(chain)
    return chains


def _of_bytes(traced: fx.GraphModule, chain: list[fx.Node]) -> list[fx.Node]:
    """Let a chain of `_larger_copies` begin with bytes in the place of truth values, which compiled loops read slowly.

    Returns the chain.
    """
    source = chain[-1].all_input_nodes[0]
    views = list(itertools.takewhile(_is_view, reversed(chain)))
    converted = chain[-1 - len(views)] if len(views) < len(chain) else source
    if source.meta["val"].dtype == torch.bool != converted.meta["val"].dtype and name_of(converted) == "_to_copy":
        with traced.graph.inserting_after(source):
            numbers = traced.graph.call_function(torch.ops.aten.view.dtype, (source, torch.uint8))
        numbers.meta = {**source.meta, "val": source.meta["val"].view(torch.uint8)}
        chain[-1].replace_input_with(source, numbers)
        for node in views:
            node.meta = {**node.meta, "val": node.meta["val"].view(torch.uint8)}
    return chain


def extract(traced: fx.GraphModule, nodes: list[fx.Node], inputs: list[fx.Node], outputs: list[fx.Node]) -> Region:
    """Copy these nodes into a graph of their own, with the given values of the whole graph as inputs and outputs."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        copied[node] = graph.placeholder(node.name)
        copied[node].meta = dict(node.meta)
    for node in nodes:
        copied[node] = graph.node_copy(node, lambda n: copied[n])
    graph.output([copied[n] for n in outputs])
    module = fx.GraphModule(traced, graph)
    return Region(module, [n.name for n in inputs], [n.name for n in outputs], nodes)


def composed(
    regions: Sequence[Region], inputs: Sequence[str], outputs: Sequence[str], end: fx.GraphModule | None = None
) -> fx.GraphModule:
    """Put regions that run one after the other into one graph, which takes the values named `inputs`.

    outputs: names of the values to return, as a tuple. end: a graph of values with these names, whose outputs are
    returned instead; names that no region has are inputs that follow those in `inputs`.
    """
    graph, constants, held = fx.Graph(), nn.Module(), []
    values: dict[str, fx.Node] = {}
    metas = {n.name: n.meta for r in regions for n in r.graph.graph.nodes if n.op == "placeholder"}
    if end is not None:
        ends = [n for n in end.graph.nodes if n.op == "placeholder"]
        metas |= {name: n.meta for name, n in zip(outputs, ends, strict=True) if name not in metas}
        computed = {name for r in regions for name in r.outputs}
        inputs = [*inputs, *(n for n in outputs if n not in inputs and n not in computed)]
    for name in inputs:
        values[name] = graph.placeholder(name)
        values[name].meta = dict(metas[name])

    def insert(module: fx.GraphModule, given: Sequence[str]) -> list[fx.Node]:
        """Insert a graph with these values as its placeholders; returns its outputs."""
        names, copies = iter(given), {}
        for node in module.graph.nodes:
            if node.op == "placeholder":
                copies[node] = values[next(names)]
            elif node.op == "output":
                return [copies[n] for n in tree_leaves(node.args)]
            else:
                copies[node] = graph.node_copy(node, copies.__getitem__)
                if node.op == "get_attr":
                    copies[node].target = name = f"constant_{len(held)}"
                    held.append(name)
                    setattr(constants, name, getattr(module, str(node.target)))
        raise AssertionError("a graph ends with its output")

    for region in regions:
        values.update(zip(region.outputs, insert(region.graph, region.inputs), strict=True))
    graph.output(tuple(values[n] for n in outputs) if end is None else tuple(insert(end, outputs)))
    graph.eliminate_dead_code()
    return fx.GraphModule(constants, graph)


_VIEWS = {"view", "permute", "transpose", "t", "expand", "slice", "select", "squeeze", "unsqueeze", "detach", "alias"}


def operator_of(node: fx.Node) -> OpOverload | None:
    """The torch operator that a node calls; None for any other node, like a placeholder or `operator.getitem`."""
    return node.target if isinstance(node.target, OpOverload) else None


def name_of(node: fx.Node) -> str:
    """The name of the operator that a node calls, "add" for aten.add.Tensor; "" if it calls none."""
    operator = operator_of(node)
    return "" if operator is None else operator._opname


def draws_from_generator(node: fx.Node) -> bool:
    """Whether a node calls an operator that draws from torch's generator."""
    operator = operator_of(node)
    return operator is not None and torch.Tag.nondeterministic_seeded in operator.tags


def own_bytes(node: fx.Node) -> int:
    """The bytes that a node's value takes; 0 for a view of another value."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return 0
    return 0 if _is_view(node) else value.numel() * value.element_size()


def _all_bytes(node: fx.Node) -> int:
    value = node.meta["val"]
    return value.numel() * value.element_size()


def _is_of_each(node: fx.Node) -> bool:
    """Whether a node is a view, another type or a multiple by a number of one value, element by element."""
    return len(node.all_input_nodes) == 1 and (
        (_is_view(node) and name_of(node) not in ("slice", "select", "expand"))
        or name_of(node) == "_to_copy"
        or (name_of(node) in ("mul", "div") and not isinstance(node.args[1], fx.Node))
    )


def _is_view(node: fx.Node) -> bool:
    return name_of(node) in _VIEWS


def flops_of(node: fx.Node) -> int:
    """The number of multiplications and additions of a node that is a matrix product or a convolution; else 0."""
    operator = operator_of(node)
    if operator is None:
        return 0
    if name_of(node) == "sum":  # a product with a single row is traced as this
        return _flops_of_sum(node)
    if operator.overloadpacket not in flop_registry:
        return 0
    values = tree_map_only(fx.Node, lambda n: n.meta["val"], (node.args, node.kwargs))
    return flop_registry[operator.overloadpacket](*values[0], **values[1], out_val=node.meta["val"])


def _flops_of_sum(node: fx.Node) -> int:
    """Those of a matrix product that is a sum of outer products: x.unsqueeze(-2) * w, summed over the last axis."""
    product = node.all_input_nodes[0]
    factors = [n.meta.get("val") for n in product.all_input_nodes]
    value = product.meta.get("val")
    if name_of(product) != "mul" or len(factors) != 2 or not isinstance(value, Tensor):
        return 0
    sizes = [f.numel() for f in factors if isinstance(f, Tensor)]
    return 2 * value.numel() if len(sizes) == 2 and min(sizes) < value.numel() else 0
