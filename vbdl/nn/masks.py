"""The dropout masks of one draw, a pure function of its key: call i of a forward draws from the counters of layer i.

In prediction a draw has one mask, shared by all rows of a batch; in training every row has its own. If not every row
calls the same dropouts, as in a mixture of experts, the counters are numbered by the module that calls instead.
"""

import math
import sys
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from vbdl_kernels import keep_mask

from vbdl.calling.traversing import modules_of
from vbdl.nn.part_of_batch import drawn_in_training
from vbdl.nn.value_reads import Followed


@dataclass(frozen=True)
class Site:
    """One call of a dropout function in a forward."""

    path: str  # name of the innermost module that makes the call; "" is the root
    kind: str  # name of the function
    p: float  # dropout rate, after any override
    shape: tuple[int, ...]  # shape of the masked tensor
    axis: int | None = 0  # the batch axis of that shape, or None if it has none
    multiple: int = 1  # entries of that axis per row of the batch
    at: int = field(default=0, compare=False)  # stands for the lines of code that make the call

    def __deepcopy__(self, memo: dict[int, object]) -> "Site":
        return self


_CALLS_OF_A_MODULE = 64  # more are numbered with the calls of the next module
_FIRST_BY_MODULE = 1 << 16  # number in the counters of the first call, above those of calls in their order


class UnknownCall(ValueError):
    """A random call or a dropout call that was not made when the module first ran, or one that is missing."""

    def __init__(self, call: str, missing: bool = False):
        """call: subject of the sentence, the call's function and its module."""
        also = " and is not for these rows" if missing else ""
        was = "was" if missing else "was not"
        super().__init__(
            f"{call} {was} called when the module first ran{also}: random calls that depend on the rows cannot be "
            f"drawn reproducibly. Make the same ones for all rows"
        )


class OtherLength(UnknownCall):
    """A dropout call whose batch axis does not hold as many entries for each row as when the module first ran."""


class Masks:
    """The masks of the dropout calls in one forward of `root`, in their order.

    key: (2,) int64, (seed, draw); or (draws, 2) for inputs that repeat the batch once for each draw.
    rate: overrides dropout rates, all of them or by module name.
    sites: the dropout calls in their order, from `DropoutNetwork.locate`; if None, axis 0 is taken for the batch in all
        of them. Only those that drop something have to be called again, in the same order.
    per_row: one mask per row, as in training.
    by_module: number the calls by the module that makes them, for forwards in which rows call different ones.
    alone: the batch is one row, so that a mask has the shape of what it masks.
    rows: the rows of the batch (all repeats of it), or None if they are unknown.
    silent: record the dropout calls in `calls`, but drop nothing.
    kept: masks by number of the call and shape, which are read from it and added to it; None: every mask is made anew.
    steps: (number of the first step, number of steps) of a part of longer sequences: a mask whose first axis without
        the batch is that of time is the part of the longer mask.
    """

    def __init__(
        self,
        key: Tensor,
        root: nn.Module,
        rate: float | Mapping[str, float] | None = None,
        sites: tuple[Site, ...] | None = None,
        per_row: bool = False,
        silent: bool = False,
        kept: dict[Hashable, Tensor] | None = None,
        by_module: bool = False,
        alone: bool = False,
        rows: int | None = None,
        steps: tuple[int, int] | None = None,
    ):
        self._kept, self._by_module, self._alone, self._rows, self.steps = kept, by_module, alone, rows, steps
        self.key, self.rate, self.per_row, self.silent = key, rate, per_row, silent
        # the known calls that are still to come, each with its number: a call that drops nothing may be left out
        self._to_come = None if sites is None else ((i, site) for i, site in enumerate(sites) if site.p > 0)
        self._root = root
        self.strict = False  # whether a known call is made by the same code, and not only by the same module
        self.at = 0  # stands for the lines of code that made the latest call, up to the method of its module
        # which rows keep all entries of an axis that folds the batch, in place of drawn masks; the others keep none
        self.rows_kept: Sequence[bool] | None = None
        self.places: dict[int, tuple[str, int]] | None = None  # name and number of each module of `root`, by its id
        self.calls: list[Site] = []
        self.sizes: list[int] = []  # bytes of what each function of torch returned, if silent
        self.followed = Followed() if silent else None  # what follows from what would be dropped
        self.written: dict[int, tuple[Tensor, Tensor]] = {}  # tensors to drop in place, and what they are then, by id

    def place(self) -> str:
        """The name of the innermost module of `root` whose method is running."""
        if self.places is None:
            self.places = {id(m): (name, number) for number, (name, m) in enumerate(modules_of(self._root))}
        frame, self.at = sys._getframe(1), 0
        while frame is not None:
            owner = frame.f_locals.get("self")
            if not frame.f_globals.get("__name__", "").startswith("vbdl."):
                self.at = hash((self.at, id(frame.f_code), frame.f_lasti))
            if isinstance(owner, nn.Module) and id(owner) in self.places:
                return self.places[id(owner)][0]
            frame = frame.f_back
        return ""

    def p(self, p: float, path: str) -> float:
        """The dropout rate in a module: an override for all, for this module or one around it, or else p."""
        if isinstance(self.rate, Mapping):
            names = [n for n in self.rate if path == n or path.startswith(f"{n}.") or n == ""]
            p = self.rate[max(names, key=len)] if names else p
        elif self.rate is not None:
            p = self.rate
        return float(p)

    def keep(
        self, kind: str, shape: tuple[int, ...], p: float, device: torch.device, axis: int | None = 0
    ) -> Tensor | None:
        """The mask of the next dropout call, broadcastable to `shape`, or None if nothing is dropped.

        axis: the batch axis of `shape`, None if it has none, or -1 to look it up in `sites` (axis 0 without them).
        """
        index, path = len(self.calls), ""
        if self.per_row:
            axis = None
        if not self.per_row or self._by_module or isinstance(self.rate, Mapping):
            path = self.place()  # which takes longer than the operations of a small layer
        p, multiple = self.p(p, path), 1
        known = None if self._to_come is None or p == 0.0 else next(self._to_come, (index, None))
        if known is not None:
            index, site = known
            if site is None or (site.kind, site.path) != (kind, path) or (self.strict and site.at != self.at):
                raise UnknownCall(f"{kind} in {described(path)}")
        if self._alone:
            axis = None
        elif axis == -1:
            axis = 0
            if known is not None and known[1] is not None:
                axis, multiple = known[1].axis, known[1].multiple
                if axis is not None and self._rows is not None and shape[axis] != self._rows * multiple:
                    raise OtherLength(f"{kind} in {described(path)}")
        self.calls.append(Site(path, kind, p, tuple(shape), axis, multiple, self.at))
        if p == 0.0 or self.silent:
            return None
        first = self._first_row(shape, axis, multiple, path)
        if self._by_module:
            index = self._number_by_module(path)
        if self._kept is None or first:
            return self._made(index, shape, p, device, axis, multiple, first)
        of_all_rows = multiple == 1 and self.key.ndim == 1  # one mask that is broadcast, however many rows there are
        sizes = (1 if place == axis and of_all_rows else size for place, size in enumerate(shape))
        this = (index, tuple(sizes))  # the shape, because a sequence may have another length in the next call
        if this not in self._kept:
            self._kept[this] = self._made(index, shape, p, device, axis, multiple)
        return self._kept[this]

    def _number_by_module(self, path: str) -> int:
        """The number in the counters of the latest call, which is in the module `path`."""
        assert self.places is not None  # it was asked for the path
        module = next(number for name, number in self.places.values() if name == path)
        before = sum(call.path == path for call in self.calls) - 1
        return _FIRST_BY_MODULE + module * _CALLS_OF_A_MODULE + before

    def _first_row(self, shape: tuple[int, ...], axis: int | None, multiple: int, path: str) -> int:
        """The number of the counters' first row: that of the first step, if the mask has an axis of time."""
        inner = [size for place, size in enumerate(shape) if place != axis]
        if self.steps is None or len(inner) < 2 or inner[0] != self.steps[1]:
            return 0
        if multiple > 1:
            raise ValueError(
                f"dropout in {described(path)} folds other axes into the batch, so its masks cannot go on from one "
                f"part of a sequence to the next: predict the whole sequence instead"
            )
        return self.steps[0] * math.prod(inner[1:-1])

    def _made(
        self,
        index: int,
        shape: tuple[int, ...],
        p: float,
        device: torch.device,
        axis: int | None,
        multiple: int,
        first: int = 0,
    ) -> Tensor:
        """The mask of a dropout call, broadcastable to `shape`, whose batch axis has `multiple` entries for a row.

        first: the number of the counters' first row.
        """
        if self.per_row:

            def one_long_row(sizes: tuple[int, ...]) -> Tensor:  # which wastes no random words
                columns = math.prod(sizes)
                return keep_mask(self.key.to(device), index, min(columns, 1), columns, p).view(sizes)

            return drawn_in_training(("dropout", index), shape, one_long_row)
        sizes = list(shape)
        if axis is not None:
            sizes[axis] = multiple
        # the counters of a draw index rows and columns, so that the mask of a longer sequence begins with that of a
        # shorter one; training does not need this
        columns = sizes[-1] if len(sizes) > 1 else math.prod(sizes)
        rows = math.prod(sizes) // max(columns, 1)
        key = self.key.to(device)
        if key.ndim == 2:
            if axis is None:
                raise ValueError(f"call {index} of dropout masks no batch, so several draws cannot share one call")
            keep = keep_mask(key, index, rows, columns, p, first=first).view(len(key), *sizes)
            keep = keep.movedim(0, axis).unsqueeze(axis + 1)  # (..., draws, 1, multiple, ...)
            each = shape[axis] // (len(key) * multiple)
            keep = keep.expand(*keep.shape[: axis + 1], each, *keep.shape[axis + 2 :])
            return keep.flatten(axis, axis + 2)  # the axis runs over (draws, batch, multiple)
        keep = keep_mask(key, index, rows, columns, p, first=first).view(sizes)
        if axis is not None and multiple > 1:  # the axis runs over (batch, multiple)
            if self.rows_kept is not None:
                entries = torch.tensor(self.rows_kept, device=device).repeat_interleave(multiple)
                return entries.view([-1 if place == axis else 1 for place in range(len(shape))]).expand(shape)
            repeats = [1] * len(sizes)
            repeats[axis] = shape[axis] // multiple
            keep = keep.repeat(repeats)
        return keep

    def drop(self, x: Tensor, p: float, kind: str, axis: int | None = -1) -> Tensor:
        """x with units dropped and the rest scaled by 1 / (1 - p)."""
        keep = self.keep(kind, tuple(x.shape), p, x.device, axis)
        return x if keep is None else self.scale(x, keep)

    def write(self, into: Tensor, dropped: Tensor) -> None:
        """Let a tensor be read as `dropped` from now on, as if it had been dropped in place.

        Its own memory stays as it is: draws that are mapped together share it.
        """
        if dropped is not into:
            self.written[id(into)] = into, dropped

    def now(self, value: Any) -> Any:
        """A value in which tensors that were dropped in place are what they are now, however deep in lists and tuples.

        Raises ValueError for a tensor that reads the memory of one without being it.
        """
        if not self.written:
            return value
        if isinstance(value, Tensor):
            while (written := self.written.get(id(value))) is not None:  # it may have been dropped in place again
                value = written[1]
            if any(_share_memory(value, into) for into, _ in self.written.values()):
                raise ValueError(
                    f"dropout in {described(self.calls[-1].path)} writes into a tensor in place, of which a view is "
                    f"read afterwards: go on with the tensor that dropout returns"
                )
            return value
        if isinstance(value, dict):
            return value if type(value) is not dict else {name: self.now(part) for name, part in value.items()}
        return type(value)(map(self.now, value)) if type(value) in (list, tuple) else value

    def returned(self, outputs: Any) -> Any:
        """What a network returned, however deep, as it is now."""
        return tree_map(self.now, outputs) if self.written else outputs

    def drop_steps(self, data: Tensor, batch_sizes: Tensor, p: float, kind: str) -> Tensor:
        """Units dropped in a packed sequence, with the masks of the padded one, (steps, features) for a draw.

        data: (entries, features), step by step. batch_sizes: (steps,) int64, the number of rows that have each step.
        """
        if self.per_row:
            return self.drop(data, p, kind)
        keep = self.keep(kind, (len(batch_sizes), data.shape[-1]), p, data.device, axis=None)
        if keep is None:
            return data
        step_of = torch.repeat_interleave(torch.arange(len(batch_sizes)), batch_sizes).to(data.device)
        return self.scale(data, keep.index_select(0, step_of))

    def scale(self, x: Tensor, keep: Tensor) -> Tensor:
        """x times the mask of the latest dropout call, times 1 / (1 - p) of that call."""
        p = self.calls[-1].p
        return x * (keep.to(x.dtype) * (1.0 / (1.0 - p) if p < 1.0 else 0.0))


def _share_memory(t: Tensor, other: Tensor) -> bool:
    """Whether two tensors, of which one may be a view of the other or both of one, have a number in common."""
    if (t._base if t._is_view() else t) is not (other._base if other._is_view() else other):
        return False
    (first, last), (start, end) = _interval(t), _interval(other)
    if last < start or end < first:
        return False
    return t.is_contiguous() or bool(np.isin(_places(t), _places(other)).any())


def _interval(t: Tensor) -> tuple[int, int]:
    """The first and the last place of a tensor's numbers in its memory."""
    first = int(t.storage_offset())
    return first, first + sum((int(size) - 1) * int(by) for size, by in zip(t.shape, t.stride(), strict=True))


def _places(t: Tensor) -> np.ndarray:
    """The places of a tensor's numbers in its memory, in NumPy, because a trace may run."""
    places = np.array([t.storage_offset()])
    for size, stride in zip(t.shape, t.stride(), strict=True):
        places = np.add.outer(places, np.arange(size) * stride).reshape(-1)
    return places


def batch_axis(
    few: tuple[int, ...], more: tuple[int, ...], what: str, rows: tuple[int, int] = (2, 3)
) -> tuple[int | None, int]:
    """The axis in which the shapes of calls on batches of two sizes differ, or None, and its entries per row.

    rows: the sizes of the batches. what: subject and verb of the error for shapes that differ otherwise.
    """
    grown = [axis for axis, (a, b) in enumerate(zip(few, more, strict=False)) if a != b]
    if not grown and len(few) == len(more):
        return None, 1
    axis = grown[0] if grown else 0
    multiple = few[axis] // rows[0] if grown else 0
    expected = (rows[0] * multiple, rows[1] * multiple)
    if len(few) != len(more) or len(grown) > 1 or (few[axis], more[axis]) != expected:
        raise ValueError(
            f"{what} {few} for {rows[0]} rows and {more} for {rows[1]}, so vbdl cannot tell which part belongs to "
            f"which row of the batch: use tensors with the batch as one axis"
        )
    return axis, multiple


def with_batch_axes(few: Sequence[Site], more: Sequence[Site], rows: tuple[int, int]) -> tuple[Site, ...]:
    """The dropout calls on the first of two batches, with the batch axes of those that drop something.

    rows: the sizes of the batches. Raises ValueError if the calls on the other batch do not fit.
    """
    others = iter(dropping(more))
    if [site.kind for site in dropping(few)] != [site.kind for site in dropping(more)]:
        raise ValueError("the module calls other dropouts for another batch size")
    return tuple(
        site if site.p == 0.0 else _with_batch_axis(site, next(others), rows)  # masks nothing, so rows share it
        for site in few
    )


def dropping(calls: Sequence[Site]) -> list[Site]:
    """The dropout calls that drop something."""
    return [site for site in calls if site.p > 0]


def _with_batch_axis(few: Site, more: Site, rows: tuple[int, int]) -> Site:
    """The dropout call with its batch axis."""
    axis, multiple = batch_axis(few.shape, more.shape, f"{few.kind} in {described(few.path)} masks", rows)
    return Site(few.path, few.kind, few.p, few.shape if rows[0] == 2 else more.shape, axis, multiple, few.at)


def described(path: str) -> str:
    """The module of this name in the words of an error message."""
    return f"module '{path}'" if path else "the module itself"
