"""The strategy "plain": the network runs as it is, draw after draw, and nothing of it is traced.

It executes what cannot be traced (an `if` on values, packed sequences, a gradient inside the forward), answers while a
graph is still being compiled, and stays where it is faster than the graph. Draws and statistics are those of the other
strategies. Where only masks differ between draws, the rows are repeated once for each draw and all draws are one call.
Recurrent networks that cannot be traced, because they pack their sequences, are mapped without a trace.
"""

import contextlib
import dataclasses
import threading
import time
import warnings
from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vbdl.calling.attributes import Attributes
from vbdl.calling.autograd import with_gradients_if_needed
from vbdl.calling.inputs import Flat, arguments
from vbdl.calling.mappable import Mappable
from vbdl.calling.outputs import are_same
from vbdl.calling.stacking import call_stacked, select, slots_of
from vbdl.calling.traversing import buffers_of
from vbdl.engine.program import Ready, ended
from vbdl.engine.settings import PredictorSettings
from vbdl.model import Model
from vbdl.nn.drawn import draws_together
from vbdl.nn.keyed import KeyedNetwork
from vbdl.nn.members import StackedPosterior
from vbdl.nn.recurrent import WholeLayers, runs_whole_layers
from vbdl.types import State

_MASKS = 16 * 2**20  # bytes of masks that are kept: drawing more again takes a small share of a large network's time
_ROWS = 4096  # the most rows in one call of repeated rows
_CACHED = 2**21  # bytes of the largest value of one call, which the cache of a core holds
_LAST = torch.channels_last
_LARGE = 2**20  # bytes of a draw's entries; larger ones are made for one draw at a time
_ROUNDS, _FEW = 3, 8  # the times that a way to run all draws is timed, and the draws that run for it in turn
_APART = 1e-3  # relative to the largest output: far above rounding errors, far below the effect of a wrong rule


@dataclass(frozen=True)
class PlainPlan:
    """The plan of an execution that runs the network as it is, with the reasons for it."""

    strategy: str  # "plain": one draw a call; "repeated rows" and "mapped": all draws in one call
    n_samples: int
    chunk: int  # draws in one call
    tile: int  # rows of the batch in one call
    reasons: tuple[str, ...]

    def because(self, reason: str) -> "PlainPlan":
        """The same plan with one more reason."""
        return dataclasses.replace(self, reasons=(*self.reasons, reason))

    def explain(self) -> str:
        """Describe the plan in words, one line for each."""
        how = {
            "plain": "plain: the network as it is, one draw after the other",
            "repeated rows": "repeated rows: the network as it is, the batch repeated once for each draw",
            "mapped": "mapped: the network as it is, all draws in one scan over time",
        }[self.strategy]
        calls = -(-self.n_samples // self.chunk)
        lines = [f"strategy       {how}; {self.n_samples} draws in {calls} call(s), {self.tile} rows a tile"]
        return "\n".join(lines + [f"because        {reason}" for reason in self.reasons])


@dataclass(frozen=True)
class Run:
    """A run of the first draws before the first answer: the twin of the model that ran, its tile, and its outputs."""

    twin: Model
    tile: Flat
    outputs: Tensor  # (draws, rows, ...)
    sizes: Mapping[str, int]  # the bytes of each entry of a draw
    kept: dict[Hashable, Tensor]  # what a network with a key keeps of these draws, as `KeyedNetwork.kept`
    attributes: Attributes | None  # the twin's before it ran, if a forward changes them
    is_draw: bool  # whether the outputs are those of draw 0; layers may draw other ones, or keep what they drew

    def is_on(self, tile: Flat) -> bool:
        """Whether it ran on these very tensors, or on them with padding; every call of a predictor makes new tensors.

        It ran without gradients, and is no part of an answer with a gradient.
        """
        if wants_gradient(tile):
            return False
        return all(a is b or a._base is b for a, b in zip(tile.tensors, self.tile.tensors, strict=True))


class Plain:
    """A model that runs as it is for tiles of one shape: one call at a time, in any thread.

    local: the layers that draw their outputs, as the network's attribute `local` has them.
    before: the run that checked the network. It is a part of the answer on the very tile it ran on.
    written: the names of the parameters that the forward writes to, of which every draw gets its own.
    repeated: whether draws share a call with repeated rows. mapped: whether they share one under `vmap`.
    """

    def __init__(
        self,
        model: Model,
        tile: Flat,
        settings: PredictorSettings,
        n_samples: int,
        local: Any = None,
        before: Run | None = None,
        written: Collection[str] = (),
    ):
        self.model, self.tile, self.n_samples = model, tile, n_samples
        self._seed = settings.seed
        self._twin = model.twin() if before is None else before.twin
        self._before = before
        self._expected = None if before is None else before.outputs[0]  # of draw 0 on `tile`
        if local:
            network: Any = self._twin.network
            network.local = local
        if before is None:
            first: Mapping[str, int] = {n: t.nbytes for n, t in model.one_draw(0, self._seed).items()}
        else:
            first = before.sizes
        self._large = sum(first.values()) > _LARGE
        slots: dict[str, list[tuple[dict, str]]] = {}
        for tensors, leaf, name in slots_of(self._twin):
            slots.setdefault(name, []).append((tensors, leaf))
        self._places = {n: slots[n] for n in first}
        self._empty = [(slots, leaf, slots[leaf]) for n in first for slots, leaf in self._places[n]]
        self._convolutions: list[str] = []  # the names of weights that are laid out with channels last
        self._holds_members = False
        self._members: dict[int, State] = {}
        # a forward may write to buffers, and those of a draw are views of the stack
        buffers = buffers_of(self._twin)
        self._written = {n for n in buffers if n in first and n != "network.key"}
        self._written |= {n for n in written if n in first}
        self._attributes = Attributes(self._twin) if before is None else before.attributes
        self._buffers = {n: b for n, b in buffers.items() if n not in first}
        for name in set(written) - set(first):
            tensors, leaf = slots[name][0]
            self._buffers[name] = own = tensors[leaf].detach().clone()
            for tensors, leaf in slots[name]:
                tensors[leaf] = own
        self._originals = {n: b.clone() for n, b in self._buffers.items()}
        network = self._twin.network
        self._network = network if isinstance(network, KeyedNetwork) else None
        self._only_keys = list(first) == ["network.key"]
        self.repeated = self._only_keys and self._network is not None and self._network.takes_many_keys
        self.mapped = False
        if self._network is not None and self._network.row_by_row and not settings.keeps_bits:
            self._network.together = None
        self._kept: dict[tuple[int, ...], dict] = {}
        self._budget: float = settings.memory_budget // 2
        self._masks = 0  # bytes of masks that are kept
        if before is not None and before.kept and self._budget > 0:
            self._keep(tuple(range(len(before.outputs))), before.kept)
        self._lock = threading.RLock()

    @property
    def any_rows(self) -> bool:
        """Whether it takes other numbers of rows than a tile's: unless it may keep what it drew for each row."""
        return self._network is None or self.repeated or self._network.row_by_row

    @property
    def network(self) -> nn.Module:
        """The network that runs, a copy of the posterior's with the same tensors."""
        return self._twin.network

    @property
    def strategy(self) -> str:
        """The name of the strategy, as in `PlainPlan`."""
        return "repeated rows" if self.repeated else "mapped" if self.mapped else "plain"

    @property
    def most_draws(self) -> int:
        """The number of draws in one call: all of them, as long as their rows stay below a bound."""
        together = self.repeated or self.mapped
        return min(self.n_samples, max(1, _ROWS // self.tile.rows)) if together else self.n_samples

    def entries(self, numbers: range) -> State:
        """The entries of these draws, (samples, ...) each."""
        return self.model.entries(torch.arange(numbers.start, numbers.stop), self._seed)

    def each(self, numbers: range, tile: Flat) -> Tensor:
        """Compute the parameters of p(y | x) of these draws, (samples, rows, ...), with one call for each draw."""
        with draws_together() if self._only_keys else contextlib.nullcontext():
            return self._each(numbers, tile)

    def _each(self, numbers: range, tile: Flat) -> Tensor:
        before, self._before = self._before, None
        posterior, one_by_one = self.model.posterior, self._large or self._holds_members
        one_by_one = one_by_one or (isinstance(posterior, StackedPosterior) and posterior.is_apart)
        entries = {} if one_by_one else self.entries(numbers)
        outputs = []
        for i, n in enumerate(numbers):
            if n == 0 and before is not None and before.is_draw and before.is_on(tile):
                outputs.append(before.outputs[0, : tile.rows])
            else:
                with self._lock:
                    own = self._entries_of(n) if one_by_one else select(entries, i)
                    try:
                        outputs.append(self._run((n,), own, tile))
                    except Exception:  # of the user's network, which may want a view that this layout does not have
                        if not self._convolutions:
                            raise
                        own |= {name: own[name].contiguous() for name in self._convolutions}
                        outputs.append(self._run((n,), own, tile))  # otherwise it is another error, which stays
                        self._lay_back()
                    del own
        return torch.stack(outputs)

    def _entries_of(self, number: int) -> State:
        """The entries of one draw, (...) each."""
        if (own := self._members.get(number)) is not None:
            return own
        if not self._convolutions:
            own = self.model.one_draw(number, self._seed)
        else:
            posterior: Any = self.model.posterior
            own = self.model.with_likelihood(posterior.draw_as_laid_out(number), number)
            own |= {name: own[name].contiguous(memory_format=_LAST) for name in self._convolutions}
        if self._holds_members:
            self._members[number] = own
        return own

    def hold_members(self, lay_out: bool) -> bool:
        """Hold the entries of members, which are parts of the posterior's tensors, from now on.

        lay_out: whether to lay out the weights of convolutions of images with channels last, with which torch's
        convolutions are faster, if nobody else holds those of members, so that it takes no memory, and if the network
        computes the same with them: it may ask for a view that there is not then. Returns whether it did.
        """
        posterior = self.model.posterior
        if not isinstance(posterior, StackedPosterior) or posterior.n_draws != posterior.n_members:
            return False
        layers = [name for name, m in self._twin.named_modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
        own = [f"{name}.weight" for name in layers if f"{name}.weight" in self._places]
        names = [name.removeprefix("network.") for name in own]
        with self._lock, torch.no_grad():
            expected = self._expected if lay_out else None
            if lay_out and expected is None:
                expected = self._run((0,), self._entries_of(0), self.tile)
            self._expected = None
            if expected is not None and posterior.lay_out(names, _LAST):
                self._convolutions = own
                try:
                    same = are_same(self._run((0,), self._entries_of(0), self.tile), expected, _APART)
                except Exception:  # of the user's network
                    same = False
                if not same:
                    self._lay_back()
            self._holds_members = True
        return bool(self._convolutions)

    def _lay_back(self) -> None:
        """Give the weights of convolutions the layout that the networks had."""
        posterior: Any = self.model.posterior
        names = [name.removeprefix("network.") for name in self._convolutions]
        self._convolutions = []
        self._members.clear()
        posterior.lay_out(names, torch.contiguous_format, copying=True)

    def together(self, numbers: range, tile: Flat) -> Tensor:
        """Compute what `each` does on the rows repeated once for each draw, in calls whose values fit into a cache."""
        before, self._before = self._before, None
        if before is not None and len(before.outputs) == len(numbers) and before.is_on(tile):
            return before.outputs[:, : tile.rows]
        most = draws_in_a_call(self._network, tile)
        if most < len(numbers):
            size = -(-len(numbers) // -(-len(numbers) // most))  # so that blocks are as equal as possible
            blocks = [numbers[start : start + size] for start in range(0, len(numbers), size)]
            run = self._together if most > 1 else self.each
            return torch.cat([run(block, tile) for block in blocks])
        return self._together(numbers, tile)

    def _together(self, numbers: range, tile: Flat) -> Tensor:
        """Compute what `each` does in one call, on the rows repeated once for each draw."""
        draws = len(numbers)
        outputs = self._run(tuple(numbers), self.entries(numbers), repeated(tile, draws))
        return outputs.unflatten(0, (draws, tile.rows))

    def map_if_faster(self) -> str:
        """Map the draws together from now on if that computes the same in less time; return the reason, or ""."""
        model = self._twin
        if self.repeated or self.n_samples == 1 or not runs_whole_layers(model.network, model.device):
            return ""
        if any(name in self._written or name in self._buffers for name, _ in model.named_parameters()):
            return ""  # mapped, a forward would write to those of all draws
        numbers, times = range(min(self.most_draws, max(1, _ROWS // self.tile.rows))), []
        versions = [b._version for b in self._buffers.values()]
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", ".*batching rule.*")  # otherwise torch warns, and loops inside vmap
                mapped = self.under_vmap(numbers, self.tile)
        except Exception:  # vmap raises errors of many types
            mapped = None
        if versions != [b._version for b in self._buffers.values()]:
            self._restore()
            return ""
        if mapped is None:
            return ""
        few = numbers[:_FEW]  # of hundreds, the first answer would wait for seconds
        if not are_same(mapped[: len(few)], self.each(few, self.tile), _APART):
            return ""
        for run, of in ((self.each, few), (self.under_vmap, numbers)):
            each = []
            for _ in range(_ROUNDS):
                start = time.perf_counter()
                run(of, self.tile)
                each.append(1e3 * (time.perf_counter() - start))
            times.append(min(each) * len(numbers) / len(of))
        self.mapped = times[1] < times[0]
        return f"both ways to run all draws were timed: {times[0]:.3g} ms in turn, {times[1]:.3g} ms mapped together"

    def under_vmap(self, numbers: range, tile: Flat) -> Tensor:
        """Compute what `each` does in one call under `vmap`, each recurrent layer one operator; without gradients."""
        entries = self.entries(numbers)
        with self._lock, torch.no_grad(), WholeLayers(), Mappable():
            if self._network is not None:
                self._network.kept = None  # it would keep values of the trace
            try:
                return call_stacked(self._twin, entries, self.model.shared(entries), tile.map(Tensor.detach).nested)
            finally:
                if self._attributes is not None:
                    self._attributes.restore()

    def _run(self, numbers: tuple[int, ...], entries: State, tile: Flat) -> Tensor:
        differentiable = wants_gradient(tile)
        if not differentiable:
            tile = tile.map(Tensor.detach)
        args, kwargs = arguments(tile.nested)
        with self._lock, torch.set_grad_enabled(differentiable):
            for name, t in entries.items():
                for slots, leaf in self._places[name]:
                    slots[leaf] = t.clone() if name in self._written else t
            kept = None
            if self._network is not None:
                kept = self._kept.get(numbers, {} if self._budget > 0 else None)
                self._network.kept = kept
            versions = [b._version for b in self._buffers.values()]
            try:
                outputs = with_gradients_if_needed(lambda: self._twin(*args, **kwargs))
            finally:
                for slots, leaf, empty in self._empty:  # a draw's weights must not be kept
                    slots[leaf] = empty
                if self._attributes is not None:
                    self._attributes.restore()
            if kept and numbers not in self._kept:
                self._keep(numbers, kept)
            if versions != [b._version for b in self._buffers.values()]:
                self._restore()
            return outputs if differentiable else outputs.detach()

    def _keep(self, numbers: tuple[int, ...], kept: dict[Hashable, Tensor]) -> None:
        """Keep what the network drew for these draws, unless it is many masks."""
        if self._budget <= 0:  # a graph has taken over meanwhile
            return
        size = sum(t.nbytes for t in kept.values())
        if all(t.dtype == torch.bool for t in kept.values()):
            self._masks += size
            if self._masks > _MASKS:
                return
        self._budget -= size
        self._kept[numbers] = kept

    def let_go(self) -> None:
        """Keep nothing any more of what the network drew, because a graph takes over."""
        self._budget = 0
        self._kept = {}

    def _restore(self) -> None:
        """Undo what a forward pass wrote into shared buffers, so that the next draw finds what this one found."""
        with torch.no_grad():
            for name, b in self._buffers.items():
                b.copy_(self._originals[name])


def draws_in_a_call(network: nn.Module | None, tile: Flat) -> int:
    """The number of draws whose largest value fits into a cache, if a network runs a tile repeated once for each."""
    row_bytes = network.row_bytes if isinstance(network, KeyedNetwork) else 0
    return max(1, min(_ROWS, _CACHED // max(1, row_bytes)) // tile.rows)


def repeated(tile: Flat, draws: int) -> Flat:
    """A tile with its rows repeated once for each draw."""
    return tile.map(lambda t: t.repeat(draws, *[1] * (t.ndim - 1)))


def wants_gradient(tile: Flat) -> bool:
    """Whether a prediction on this tile has a gradient with respect to it."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tile.tensors)


class PlainCalls:
    """All draws of an execution in plain calls, with the interface of `vbdl.engine.chunking.Chunking`.

    draws: the number of draws in one step.
    """

    def __init__(self, plain: Plain, draws: int):
        self._plain, n = plain, plain.n_samples
        self._numbers = [range(start, min(start + draws, n)) for start in range(0, n, draws)]

    @property
    def any_rows(self) -> bool:
        """Whether calls take any number of rows."""
        return self._plain.any_rows

    def of(self, draws: int) -> "PlainCalls":
        """The same draws in steps of at most `draws` each."""
        return PlainCalls(self._plain, draws)

    def __len__(self) -> int:
        """The number of steps."""
        return len(self._numbers)

    def count(self, index: int) -> int:
        """The number of draws in the step with this index."""
        return len(self._numbers[index])

    def inputs(self, tile: Flat) -> dict[str, Tensor]:
        """The tile's tensors by position, to pass to `run`."""
        return {str(i): t for i, t in enumerate(tile.tensors)}

    def run(self, index: int, end: str, inputs: dict[str, Tensor], carried: State | None = None) -> State:
        """Run the step with this index on a tile; end: as in `vbdl.engine.program.ended`."""
        numbers = self._numbers[index]
        tile = Flat(tuple(inputs.values()), self._plain.tile.structure)
        run = self._plain.each
        if len(numbers) > 1 and self._plain.repeated:
            run = self._plain.together
        elif len(numbers) > 1 and self._plain.mapped and not wants_gradient(tile):
            run = self._plain.under_vmap
        return ended(self._plain.model.likelihood, end, run(numbers, tile), carried or {})

    def ready(self) -> Ready | None:
        """None: there is no compiled call."""
        return None
