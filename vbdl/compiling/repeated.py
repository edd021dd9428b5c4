"""Repeated blocks of a graph, so that each is compiled once: the equal layers of a transformer, the steps of a loop.

A graph lists its operations in the order in which the network called them, so repeated blocks follow each other. They
are found by the operations and how they are connected, never by the names of modules.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map

from vbdl.compiling.graph import Region, extract, flops_of

_REPEATS = 3  # fewer equal blocks are compiled as one graph with what is around them
_OPERATIONS = 40  # of a part; shorter blocks are put together
_WORK = (
    2e7  # floating-point operations of a part, a millisecond of a core; for fewer, calling it takes a noticeable share
)
_NO_TENSOR = 2**60  # instead of bytes, of several values in one: parts pass tensors alone
_SLOTS = 6  # inputs of an operation that are compared; what is left out is compared when the parts are compiled


@dataclass(frozen=True)
class _Run:
    """Equal blocks: `repeats` times `period` operations, from the operation `start` on."""

    start: int
    period: int
    repeats: int


@dataclass(frozen=True)
class Part:
    """A part of a graph. layouts: (index, strides) of those inputs that are copied to have these strides.

    The input of the first block may lie in memory in another way than what one block passes to the next: copied, it
    makes the first block equal to the others.
    """

    region: Region
    layouts: tuple[tuple[int, tuple[int, ...]], ...]

    def laid_out(self, inputs: list[Tensor]) -> list[Tensor]:
        """The part's inputs, in the layouts that its code is compiled for."""
        for index, strides in self.layouts:
            t = inputs[index]
            if t.stride() != strides:
                inputs[index] = torch.empty_strided(t.shape, strides, dtype=t.dtype, device=t.device).copy_(t)
        return inputs


def parts(traced: fx.GraphModule) -> list[Part]:
    """The graph as parts to run one after the other, of which many are equal; [] if no large block is repeated.

    The parts take the graph's own tensors by the names of the nodes that read them.
    """
    nodes = [n for n in traced.graph.nodes if n.op == "call_function"]
    if len(nodes) < _REPEATS * _OPERATIONS:
        return []
    place = {node: i for i, node in enumerate(nodes)}
    numbers: dict[str, int] = {}
    kinds = np.array([numbers.setdefault(_kind(n, place), len(numbers)) for n in nodes])
    work = np.array([flops_of(n) for n in nodes])
    runs = [r for r in _runs(nodes, place, kinds) if work[r.start : r.start + r.period].sum() >= _WORK]
    if not runs:
        return []
    alive = _bytes_alive(nodes, place)
    borders = {0, len(nodes)}
    for run in runs:
        # where the fewest numbers pass from one block to the next
        first = min(range(run.start, run.start + run.period), key=alive.__getitem__)
        borders |= set(range(first, run.start + run.period * run.repeats + 1, run.period))
    ordered = sorted(b for b in borders if alive[b] < _NO_TENSOR)
    pieces = []
    for start, stop in zip(ordered, ordered[1:], strict=False):
        inside = nodes[start:stop]
        members = set(inside)
        inputs = list(dict.fromkeys(n for node in inside for n in node.all_input_nodes if n not in members))
        outputs = [node for node in inside if any(user not in members for user in node.users)]
        pieces.append((kinds[start:stop], inside, inputs, outputs))
    found = []
    for piece, following in zip(pieces, [*pieces[1:], None], strict=True):
        kind, inside, inputs, outputs = piece
        layouts = ()
        if following is not None and np.array_equal(kind, following[0]) and len(inputs) == len(following[2]):
            layouts = tuple(_other_layouts(inputs, following[2], place))
        found.append(Part(extract(traced, inside, inputs, outputs), layouts))
    return found


def _other_layouts(
    inputs: Sequence[fx.Node], following: Sequence[fx.Node], place: dict[fx.Node, int]
) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Yield the inputs that the graph computes with other strides than those of the following block's, and the latter.

    Arguments of the graph, such as weights, are not copied.
    """
    for i, (one, other) in enumerate(zip(inputs, following, strict=True)):
        if one in place and other in place:
            a, b = one.meta["val"], other.meta["val"]
            if a.shape == b.shape and a.dtype == b.dtype and a.stride() != b.stride():
                yield i, b.stride()


def _runs(nodes: Sequence[fx.Node], place: dict[fx.Node, int], kinds: np.ndarray) -> Iterator[_Run]:
    """Yield the runs of equal blocks, the one that covers the most operations first, then those around it.

    place: the index of each node. kinds: what each does, as a number.
    """
    far = np.full((len(nodes), _SLOTS), 0)
    for i, node in enumerate(nodes):
        for slot, used in enumerate(node.all_input_nodes[:_SLOTS]):
            far[i, slot] = i - place[used] if used in place else 0
    waiting = [(0, len(nodes))]
    while waiting:
        start, stop = waiting.pop()
        run = _longest(kinds[start:stop], far[start:stop])
        if run is not None:
            yield _Run(start + run.start, run.period, run.repeats)
            waiting += [(start, start + run.start), (start + run.start + run.period * run.repeats, stop)]


def _kind(node: fx.Node, place: dict[fx.Node, int]) -> str:
    """What an operation does, whatever it is applied to: equal operations have equal kinds."""
    args = tree_map(
        lambda a: ("%" if a in place else "in") if isinstance(a, fx.Node) else a, (list(node.args), node.kwargs)
    )
    value = node.meta.get("val")
    return f"{node.target} {args} {tuple(value.shape) if isinstance(value, Tensor) else ''}"


def _longest(kind: np.ndarray, far: np.ndarray) -> _Run | None:
    """The run that covers the most operations; of those that cover as many, the one of the smallest blocks."""
    best, covered = None, 0
    for period in range(1, len(kind) // _REPEATS + 1):
        ahead, behind = far[period:], far[:-period]
        # an input is as far away as in the block before, or it is the same value, which all blocks use
        equal = (kind[period:] == kind[:-period]) & ((ahead == behind) | (ahead == behind + period)).all(1)
        edges = np.flatnonzero(np.diff(np.concatenate(([0], equal.astype(np.int8), [0]))))
        if not len(edges):
            continue
        lengths = edges[1::2] - edges[::2]
        longest = int(lengths.argmax())
        together = -(-_OPERATIONS // period)  # blocks in one part
        repeats = (int(lengths[longest]) // period + 1) // together
        if repeats >= _REPEATS and repeats * together * period > covered:
            best = _Run(int(edges[2 * longest]), period * together, repeats)
            covered = repeats * together * period
    return best


def _bytes_alive(nodes: Sequence[fx.Node], places: dict[fx.Node, int]) -> list[int]:
    """For each operation, the bytes of the values that were computed before it and are used by it or later."""
    changes = [0] * (len(nodes) + 2)
    for i, node in enumerate(nodes):
        last = max((places.get(user, len(nodes)) for user in node.users), default=i)
        value = node.meta.get("val")
        size = value.numel() * value.element_size() if isinstance(value, Tensor) else _NO_TENSOR
        changes[i + 1] += size
        changes[last + 1] -= size
    return np.cumsum(changes).tolist()


class Joined:
    """The compiled parts of a graph as one call. A value is let go once no later part needs it.

    calls: one for each part. own: the graph's own tensors by name. placeholders, outputs: the names of the graph's
    arguments and of what it returns.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        calls: Sequence[Callable[..., Sequence[Tensor]]],
        own: dict[str, Tensor],
        placeholders: Sequence[str],
        outputs: Sequence[str],
    ):
        place = {name: i for i, name in enumerate([*placeholders, *own])}
        for part in parts:
            for name in part.region.outputs:
                place[name] = len(place)
        self._own, self._blank = list(own.values()), [None] * (len(place) - len(placeholders) - len(own))
        self._outputs = [place[name] for name in outputs]
        needed = set(self._outputs)
        self._steps = []
        for part, call in reversed(list(zip(parts, calls, strict=True))):
            takes, gives = [place[n] for n in part.region.inputs], [place[n] for n in part.region.outputs]
            self._steps.append((part, call, takes, gives, [i for i in takes if i not in needed]))
            needed |= set(takes)
        self._steps.reverse()

    def __call__(self, *arguments: Tensor) -> list[Tensor]:
        values: list = [*arguments, *self._own, *self._blank]
        for part, call, takes, gives, last in self._steps:
            given = [values[i] for i in takes]
            for i in last:
                values[i] = None
            for i, value in zip(gives, call(*part.laid_out(given)), strict=True):
                values[i] = value
        return [values[i] for i in self._outputs]
