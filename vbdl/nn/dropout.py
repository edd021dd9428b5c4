"""A network that keeps dropout on in evaluation mode: one mask per draw, shared by all rows of a batch.

Running the network finds its dropout calls and the batch axis of each. Where they depend on the row (a mixture of
experts) or fold the batch (attention over the edges of graphs), rows run one after the other.

Gal and Ghahramani, Dropout as a Bayesian Approximation, ICML 2016, https://arxiv.org/abs/1506.02142
"""

import contextlib
import functools
from collections.abc import Hashable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from vbdl.calling.attributes import Attributes
from vbdl.calling.autograd import with_gradients_if_needed
from vbdl.calling.inputs import another_row, arguments, flatten, map_inputs
from vbdl.calling.outputs import all_same, leaves
from vbdl.calling.stacking import call
from vbdl.calling.traversing import buffers_of, modules_of
from vbdl.nn.interception import CounterDropout
from vbdl.nn.keyed import KeyedNetwork
from vbdl.nn.masks import Masks, OtherLength, Site, UnknownCall, dropping, with_batch_axes
from vbdl.nn.may_drop import DROPOUT_LAYERS, is_part_of_torch, runs_code_of_others
from vbdl.nn.normalization import NORMALIZATION_LAYERS
from vbdl.nn.training_reads import EVERY, Place, Reads, places_of_dropout, returned_same
from vbdl.types import Inputs

_SAME = 1e-4  # relative to the largest output: above rounding errors, below the effect of another mask
_ROWS = 8  # of the inputs, at most so many are compared by the dropouts that they call


class DropoutNetwork(KeyedNetwork):
    """A module whose evaluation mode keeps dropout on, with the masks of the draw in `key`.

    In training mode it runs the module as it is (`Objective` draws the masks, one per row). In evaluation mode dropout
    is on and everything else is in evaluation mode: normalization, modules named in `deterministic`, and whatever else
    a user's module does in training only (`vbdl/nn/training_reads.py`).

    by_module: number masks by the module that drops, because not every row calls the same dropouts.
    row_by_row: run one row after the other, because the batch axis of each mask is not known.
    together: whether rows may run together all the same, each dropout with one mask for the entries of its first axis;
        None: if that computes the same as one row after the other, as for the experts of a mixture.
    """

    numbers_places = False
    together: bool | None = False
    _per_row: Fraction | None = None  # the entries of dropout calls for each row, when rows were the same together
    _places: dict[int, tuple[str, int]] | None = None  # of the modules of `inner`, as in `Masks`

    found_by_running = (
        "sites",
        "on",
        "off",
        "by_module",
        "row_by_row",
        "row_bytes",
        "keeps_apart",
        "reads_values",
    )  # not part of the architecture: running the network finds them again

    def __init__(
        self,
        inner: nn.Module,
        rate: float | Mapping[str, float] | None = None,
        deterministic: tuple[str | type[nn.Module], ...] = (),
    ):
        super().__init__()
        self.inner, self.rate, self.deterministic = inner, rate, deterministic
        self.sites: tuple[Site, ...] | None = None
        self.on: frozenset[Place] | None = EVERY
        self.by_module, self.row_by_row = False, False
        self.off: list[str] | None = None  # places that read `training` for other than dropout; None: unknown
        self.register_buffer("key", torch.zeros(2, dtype=torch.int64), persistent=False)
        self.train(inner.training)

    def train(self, mode: bool = True) -> "DropoutNetwork":
        super().train(mode)
        if not mode:
            for name, module in modules_of(self.inner):
                module.training = not self._stays_deterministic(name, module)
        return self

    def _stays_deterministic(self, name: str, module: nn.Module) -> bool:
        if isinstance(module, (*NORMALIZATION_LAYERS, nn.RReLU)):
            return True
        if is_part_of_torch(module) and not isinstance(module, DROPOUT_LAYERS) and not hasattr(module, "dropout"):
            return True  # it drops nothing, but e.g. a spectral norm must not iterate
        return self._is_named_deterministic(name, module)

    def _is_named_deterministic(self, name: str, module: nn.Module) -> bool:
        for chosen in self.deterministic:
            if isinstance(chosen, str):
                if name == chosen or name.startswith(f"{chosen}."):
                    return True
            elif isinstance(module, chosen):
                return True
        return False

    def _fixed(self) -> set[int]:
        """The ids of the modules that `deterministic` names, whose reads of `training` get the module's flag."""
        if not self.deterministic:
            return set()
        return {id(m) for name, m in modules_of(self.inner) if self._is_named_deterministic(name, m)}

    def _masks(self, rows: int | None = None) -> Masks:
        options = {"kept": self.kept, "by_module": self.by_module, "rows": rows, "steps": self.steps}
        return Masks(self.key, self.inner, self.rate, self.sites, **options)

    def _masks_alone(self, key: Tensor, kept: dict[Hashable, Tensor] | None) -> Masks:
        """The masks of a batch of one row."""
        return Masks(key, self.inner, self.rate, kept=kept, by_module=self.by_module, alone=True, steps=self.steps)

    @property
    def takes_many_keys(self) -> bool:
        if self.sites is None or self.row_by_row or self.reads_values:
            return False
        return all(site.axis is not None for site in self.sites if site.p > 0)

    def forward(self, *args, **kwargs):
        if self.training:
            return self.inner(*args, **kwargs)
        inputs = kwargs if kwargs else args
        if not self.row_by_row:
            try:
                return self._run(inputs, self._masks(flatten(inputs).rows))
            except UnknownCall as error:
                if not (self.by_module or isinstance(error, OtherLength)):
                    raise
                self.row_by_row = True  # with the same masks, whose numbers and sizes are those of single rows
        return self._run_row_by_row(inputs)

    def _run_row_by_row(self, inputs: Inputs) -> Any:
        """Run the network on one row after the other; `key` may hold several draws, as in `takes_many_keys`."""
        rows = flatten(inputs).rows
        many = self.key.ndim == 2
        keys = self.key.repeat_interleave(rows // len(self.key), 0) if many else self.key.expand(rows, 2)
        may = self.together is not False and rows > 1 and not many and self.steps is None
        whole = self._run_together(inputs) if may and self.together else None
        if whole is not None and whole[1] == self._per_row:
            return whole[0]
        masks = [self._masks_alone(key, None if many else self.kept) for key in keys]
        each = [self._run(map_inputs(lambda t, i=i: t[i : i + 1], inputs), masks[i]) for i in range(rows)]
        outputs = tree_map(lambda *parts: torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0], *each)
        if may:
            whole = whole or self._run_together(inputs)
            self.together = whole is not None and all_same(whole[0], outputs, _SAME)
            self._per_row = None if whole is None else whole[1]
        return outputs

    def _run_together(self, inputs: Inputs) -> tuple[Any, Fraction] | None:
        """Run the network on all rows, with masks of single rows; None if it does not take them.

        Returns its outputs, and the entries of all dropout calls for each row: there are fewer where an expert has no
        place for some rows, and the batch is compared anew. A call with more entries than rows may have several for one
        of them, each with a mask of its own.
        """
        masks = Masks(self.key, self.inner, self.rate, kept=self.kept, by_module=self.by_module)
        masks.places = self._places
        try:
            outputs = self._run(inputs, masks)
        except Exception:  # of the user's network
            return None
        self._places, rows = masks.places, flatten(inputs).rows
        entries = [site.shape[0] if site.shape else 1 for site in masks.calls]
        return (outputs, Fraction(sum(entries), rows)) if max(entries, default=0) <= rows else None

    def _run(self, inputs: Inputs, masks: Masks) -> Any:
        """Run the network under these masks."""
        args, kwargs = arguments(inputs)
        with CounterDropout(masks) as dropout, self._reads():
            return dropout.returned(self.inner(*args, **kwargs))

    def _reads(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self.on is EVERY else Reads(self.on, self._fixed()).of(self.inner)

    def _find_reads(self, inputs: Inputs) -> tuple[Masks, Any] | None:
        """Find out which reads of `self.training` are about dropout, by running two different rows.

        Returns what a prediction of the two rows masks, and its outputs with nothing dropped, if a run was one.
        """

        def two_rows(t: Tensor) -> Tensor:
            return torch.cat([t[:1], another_row(t[:1]) if t.is_floating_point() else t[:1]]).contiguous()

        inputs, runs = map_inputs(two_rows, inputs), []
        # each run begins alike, also of a network that counts its steps in training
        alike = Attributes(self.inner).kept if runs_code_of_others(self.inner) else contextlib.nullcontext

        def run(reads: Reads) -> tuple[object, list[Tensor], int]:
            buffers = {n: b.clone() for n, b in buffers_of(self.inner).items()}
            silent = Masks(self.key, self.inner, self.rate, silent=True)
            with alike(), torch.random.fork_rng(devices=[]), reads.of(self.inner), CounterDropout(silent):
                outputs = call(self.inner, buffers, inputs)
            runs.append((silent, outputs))
            return outputs, list(buffers.values()), sum(site.p > 0 for site in silent.calls)

        self.on, self.off = places_of_dropout(run, self._fixed())
        # the first run has every place on; the places that are on now are all, or those that it read
        return runs[0] if self.on is EVERY or (self.on and len(runs) <= 2 and not self.off) else None

    def adopt(self, other: KeyedNetwork) -> None:
        assert isinstance(other, DropoutNetwork)
        self.sites, self.on, self.off = other.sites, other.on, other.off
        self.by_module, self.row_by_row = other.by_module, other.row_by_row
        self.row_bytes, self.keeps_apart, self.reads_values = other.row_bytes, other.keeps_apart, other.reads_values

    @torch.no_grad()
    def locate(self, inputs: Inputs) -> tuple[Site, ...]:
        """The dropout calls of a forward and the batch axis of each, found by running two batch sizes.

        Raises NotImplementedError for noise that is not dropout.
        """
        two = self._find_reads(inputs) if self.off is None else None
        self.sites, self.by_module, self.row_by_row, self.keeps_apart = None, False, False, False
        if two is None or not self._is_located_by(inputs, *two):
            self._locate_by_three(inputs)
        if self.row_by_row:
            masks = self._masks_alone(self.key, None)
            with_gradients_if_needed(functools.partial(self._run, _repeated(inputs, 1), masks))
            self.sites = tuple(masks.calls)
        assert self.sites is not None
        return self.sites

    def _is_located_by(self, inputs: Inputs, two: Masks, outputs_of_two: Any) -> bool:
        """Whether a run of the first row and `two`, one of it and another, show the batch axis of each dropout call.

        Sets `sites`. That is so for most networks; others are run on more rows.
        """
        try:
            one, outputs = self._located(_repeated(inputs, 1))
            if _functions(one.calls) != _functions(two.calls) or self._leaves_out_dropout(two.calls):
                return False
            sites = with_batch_axes(one.calls, two.calls, (1, 2))
        except Exception:  # of the user's network too, which may not take a single row
            return False
        if any(site.multiple > 1 for site in sites):
            return False
        self.sites, self.row_bytes = sites, _growth(one.sizes, two.sizes)
        self.reads_values = _reads_values(one, two)
        self.keeps_apart = all(t.is_floating_point() for t in flatten(inputs).tensors) and _begins_with(
            leaves(outputs_of_two), leaves(outputs)
        )
        return True

    def _locate_by_three(self, inputs: Inputs) -> None:
        """Find the dropout calls and their batch axes by running two and three rows; sets `sites` and how to number."""
        of_two, of_three = (self._located(_repeated(inputs, rows))[0] for rows in (2, 3))
        self.row_bytes, self.reads_values = _growth(of_two.sizes, of_three.sizes), _reads_values(of_two, of_three)
        self.by_module = self._leaves_out_dropout(of_two.calls)
        if self.by_module:
            self.row_by_row = self._depends_on_rows(inputs)
        if not self.row_by_row:
            try:
                self.sites = with_batch_axes(of_two.calls, of_three.calls, (2, 3))
            except ValueError:  # not every call has the batch as one axis
                self.row_by_row = True
            else:
                self.row_by_row = any(s.multiple > 1 for s in self.sites) and not self._keeps_rows_apart(inputs)

    def _located(self, inputs: Inputs) -> tuple[Masks, Any]:
        """The masks of a forward that drops nothing, with its dropout calls, and its outputs."""
        silent = Masks(self.key, self.inner, self.rate, silent=True)
        outputs = with_gradients_if_needed(functools.partial(self._run, inputs, silent))
        return silent, outputs

    def _leaves_out_dropout(self, calls: Sequence[Site]) -> bool:
        """Whether a forward with these calls uses not all of the network's dropout layers; another row's may."""
        called, fixed = {site.path for site in calls}, self._fixed()
        return any(
            isinstance(m, DROPOUT_LAYERS) and m.p > 0 and path not in called and id(m) not in fixed
            for path, m in modules_of(self.inner)
        )

    def _depends_on_rows(self, inputs: Inputs) -> bool:
        """Whether rows of these inputs call other dropouts than the first one."""
        rows = [map_inputs(lambda t, i=i: t[i : i + 1], inputs) for i in range(min(flatten(inputs).rows, _ROWS))]
        each = [_functions(self._located(row)[0].calls) for row in rows]
        return any(calls != each[0] for calls in each)

    def _keeps_rows_apart(self, inputs: Inputs) -> bool:
        """Return whether a row stays the same under other masks of another row: its entries are then in one block."""
        # masks that are equal for all rows would not show it: a network that sums over the entries of a row may give
        # each row every part of the mask, for some numbers of rows and not for others
        each = []
        for rows_kept in ((True, True), (True, False)):
            masks = Masks(self.key, self.inner, self.rate, self.sites)
            masks.rows_kept = rows_kept
            outputs = with_gradients_if_needed(functools.partial(self._run, _repeated(inputs, 2), masks))
            each.append([t[:1] for t in leaves(outputs).values() if isinstance(t, Tensor) and t.ndim])
        return all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(*each, strict=True))


def _repeated(inputs: Inputs, rows: int) -> Inputs:
    """A batch of so many copies of the first row."""
    return map_inputs(lambda t: t[:1].expand(rows, *t.shape[1:]).contiguous(), inputs)


def _functions(calls: Sequence[Site]) -> list[tuple[str, str]]:
    """The dropout functions of the calls that drop something, each with the module that called it."""
    return [(site.path, site.kind) for site in dropping(calls)]


def _begins_with(two: Mapping[tuple, object], one: Mapping[tuple, object]) -> bool:
    """Whether outputs of two rows begin with those of the first one alone, tensors by their place in the outputs."""
    if list(two) != list(one):
        return False
    for a, b in zip(two.values(), one.values(), strict=True):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.shape[:1] != (2,) or b.shape[:1] != (1,):
            return False
        if not returned_same(a[:1], b):
            return False
    return True


def _reads_values(*runs: Masks) -> bool:
    """Whether these silent runs read a number that follows from what is dropped."""
    return any(run.followed is not None and run.followed.read for run in runs)


def _growth(few: Sequence[int], more: Sequence[int]) -> int:
    """Return by how many bytes the value that grows most grows with a row; few, more: bytes of a forward's values."""
    if len(few) != len(more):
        return 0
    return max((b - a for a, b in zip(few, more, strict=True)), default=0)
