"""The strategy "plain": the network runs as it is, draw after draw, and nothing of it is traced.

It executes what cannot be traced (an `if` on values, packed sequences, a gradient inside the forward), answers while a
graph is still being compiled, and stays where it is faster than the graph. Draws and statistics are those of the other
strategies. Where only masks differ between draws, the rows are repeated once for each draw and all draws are one call.
"""

import dataclasses
import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from vbdl.calling.autograd import with_gradients_if_needed
from vbdl.calling.inputs import Flat, arguments
from vbdl.calling.stacking import places_of, select
from vbdl.engine.program import Ready, ended
from vbdl.engine.settings import PredictorSettings
from vbdl.model import Model
from vbdl.nn.keyed import KeyedNetwork
from vbdl.types import State

_ROWS = 4096  # the most rows in one call of repeated rows


@dataclass(frozen=True)
class PlainPlan:
    """The plan of an execution that runs the network as it is, with the reasons for it."""

    strategy: str  # "plain": one draw a call; "repeated rows": all draws in one call
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
        }[self.strategy]
        calls = -(-self.n_samples // self.chunk)
        lines = [f"strategy       {how}; {self.n_samples} draws in {calls} call(s), {self.tile} rows a tile"]
        return "\n".join(lines + [f"because        {reason}" for reason in self.reasons])


class Plain:
    """A model that runs as it is for tiles of one shape: one call at a time, in any thread.

    repeated: whether draws share a call with repeated rows.
    """

    def __init__(self, model: Model, tile: Flat, settings: PredictorSettings, n_samples: int):
        self.model, self.tile, self.n_samples = model, tile, n_samples
        self._seed = settings.seed
        self._twin = model.twin()
        first = model.entries(torch.arange(1), self._seed)
        places = places_of(self._twin)
        owners = dict(self._twin.named_modules())
        self._places = {n: [_slot(owners, place) for place in places[n]] for n in first}
        # a forward may write to buffers, and those of a draw are views of the stack
        self._written = {n for n, _ in self._twin.named_buffers() if n in first and n != "network.key"}
        self._buffers = {n: b for n, b in self._twin.named_buffers() if n not in first}
        self._originals = {n: b.clone() for n, b in self._buffers.items()}
        network = self._twin.network
        self._network = network if isinstance(network, KeyedNetwork) else None
        only_keys = list(first) == ["network.key"]
        self.repeated = only_keys and self._network is not None and self._network.takes_many_keys
        self._kept: dict[tuple[int, ...], dict] = {}
        self._budget: float = settings.memory_budget // 2
        self._lock = threading.Lock()

    @property
    def strategy(self) -> str:
        """The name of the strategy, as in `PlainPlan`."""
        return "repeated rows" if self.repeated else "plain"

    @property
    def most_draws(self) -> int:
        """The number of draws in one call: all of them, as long as repeated rows stay below a bound."""
        return min(self.n_samples, max(1, _ROWS // self.tile.rows)) if self.repeated else self.n_samples

    def entries(self, numbers: Tensor) -> State:
        """The entries of these draws, (samples, ...) each; numbers: (samples,) int64."""
        return self.model.entries(numbers, self._seed)

    def each(self, numbers: Tensor, tile: Flat) -> Tensor:
        """Compute the parameters of p(y | x) of these draws, (samples, rows, ...), with one call for each draw."""
        entries = self.entries(numbers)
        return torch.stack([self._run((int(n),), select(entries, i), tile) for i, n in enumerate(numbers)])

    def together(self, numbers: Tensor, tile: Flat) -> Tensor:
        """Compute what `each` does in one call, on the rows repeated once for each draw."""
        draws = len(numbers)
        repeated = tile.map(lambda t: t.repeat(draws, *[1] * (t.ndim - 1)))
        outputs = self._run(tuple(numbers.tolist()), self.entries(numbers), repeated)
        return outputs.unflatten(0, (draws, tile.rows))

    def _run(self, numbers: tuple[int, ...], entries: State, tile: Flat) -> Tensor:
        differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in tile.tensors)
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
            outputs = with_gradients_if_needed(lambda: self._twin(*args, **kwargs))
            if kept and numbers not in self._kept:
                self._budget -= sum(t.numel() * t.element_size() for t in kept.values())
                self._kept[numbers] = kept
            if versions != [b._version for b in self._buffers.values()]:
                self._restore()
            return outputs if differentiable else outputs.detach()

    def _restore(self) -> None:
        """Undo what a forward pass wrote into shared buffers, so that the next draw finds what this one found."""
        with torch.no_grad():
            for name, b in self._buffers.items():
                b.copy_(self._originals[name])


def _slot(owners: dict, place: str) -> tuple[dict, str]:
    """The dictionary of parameters or buffers that holds an entry, and its name there."""
    prefix, _, leaf = place.rpartition(".")
    owner = owners[prefix]
    return (owner._parameters if leaf in owner._parameters else owner._buffers), leaf


class PlainCalls:
    """All draws of an execution in plain calls, with the interface of `vbdl.engine.chunking.Chunking`.

    draws: the number of draws in one step.
    """

    def __init__(self, plain: Plain, draws: int):
        self._plain, n = plain, plain.n_samples
        self._numbers = [torch.arange(start, min(start + draws, n)) for start in range(0, n, draws)]

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
        run = self._plain.together if self._plain.repeated and len(numbers) > 1 else self._plain.each
        tile = Flat(tuple(inputs.values()), self._plain.tile.structure)
        return ended(self._plain.model.likelihood, end, run(numbers, tile), carried or {})

    def ready(self) -> Ready | None:
        """None: there is no compiled call."""
        return None
