"""The draws of an execution in calls of one size: the graph cut for that many draws, and its compiled calls.

An execution has one chunking that its plan chose, and may be asked for others, like steps of few draws. All of them
read the same weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vbdl.calling.inputs import TENSOR, Flat
from vbdl.compiling.graph import BODY, DRAWN, ONCE, PREFIX, Cut
from vbdl.engine.program import Program, Ready
from vbdl.engine.traced import Traced
from vbdl.types import State


@dataclass
class _Chunk:
    """Some draws: their numbers, how many of them count (the last chunk repeats its last draw up to full size), and
    what of theirs does not depend on the input, where it is kept."""

    numbers: Tensor
    count: int
    kept: dict[str, Tensor] | None = None


class Chunking:
    """All draws of an execution, `draws` in a call.

    keep: hold what does not depend on the input, like masks and drawn weights, instead of making it in every call.
    cut: the graph for as many draws, if it is there already; otherwise it is traced when it is first needed.
    """

    def __init__(self, traced: Traced, draws: int, keep: bool, cut: Cut | None = None):
        self._traced, self._keep, self._cut_once = traced, keep, cut
        n_samples = traced.n_samples
        self._chunks = [
            _Chunk(torch.arange(start, start + draws).clamp_max(n_samples - 1), min(draws, n_samples - start))
            for start in range(0, n_samples, draws)
        ]
        self._programs: dict[tuple[int, str], Program] = {}
        self._once: dict[str, Tensor] | None = None  # what depends on neither draw nor input, one for all chunks

    def __len__(self) -> int:
        """The number of calls."""
        return len(self._chunks)

    def count(self, index: int) -> int:
        """The number of draws in one of the calls."""
        return self._chunks[index].count

    @property
    def cut(self) -> Cut:
        """The regions of the graph of one call."""
        if self._cut_once is None:
            self._cut_once = self._traced.cut(self._chunks[0].numbers)
        return self._cut_once

    def parameters_like(self) -> tuple[torch.Size, torch.dtype]:
        """Shape of the parameters of p(y | x) for one draw and one tile, and their dtype."""
        parameters = self.cut.values[self.cut.outputs[0]].meta["val"]
        return parameters.shape[1:], parameters.dtype

    def inputs(self, tile: Flat) -> dict[str, Tensor]:
        """The tile by placeholder; with several calls, also what the layers before the first random one make of it."""
        names = self.cut.placeholders[-len(tile.tensors) :]
        values = dict(zip(names, tile.tensors, strict=True))
        if len(self) > 1 and not self.cut.regions[PREFIX].empty:
            program = self._program(0, "prefix")
            values.update(program({**self._drawn(self._chunks[0]), **values}, {}))
        return values

    def run(self, index: int, end: str, inputs: dict[str, Tensor], carried: State | None = None) -> State:
        """One of the calls on these `inputs`, to its end: "parameters" of its draws, "sums" of them added to `carried`,
        or "fields" of the prediction where all draws are in one call."""
        chunk = self._chunks[index]
        program = self._program(chunk.count, end, list(carried or {}))
        return program({**self._drawn(chunk), **inputs}, carried or {})

    def ready(self) -> Ready | None:
        """The compiled call of one tile alone, if it has been made and all that it needs besides the tile is kept."""
        program, kept = self._programs.get((self.count(0), "fields")), self._chunks[0].kept
        if program is None or kept is None or self._traced.tile.structure != TENSOR:
            return None
        return program.ready(kept, self.cut.placeholders[-1])

    def _program(self, count: int, end: str, carried: Sequence[str] = ()) -> Program:
        """The call of this many draws that has this end; "prefix" is the layers before the first random one alone."""
        key = (count, end)
        if key not in self._programs:
            traced = self._traced
            regions = (PREFIX,) if end == "prefix" else (PREFIX, BODY) if len(self) == 1 else (BODY,)
            program = Program(self.cut, regions, traced.settings.compile, traced.aligned, traced.handwritten)
            if end != "prefix":
                program.finish(traced.model.likelihood, end, count, carried)
            if end == "fields" and traced.tile.structure == TENSOR:
                program.checked = [self.cut.placeholders[-1]]
            self._programs[key] = program
        return self._programs[key]

    def _drawn(self, chunk: _Chunk) -> dict[str, Tensor]:
        """What of a chunk does not depend on the input: made once where the plan keeps it."""
        if chunk.kept is not None:
            return chunk.kept
        cut, arguments = self.cut, self._traced.arguments(chunk.numbers)
        values = dict(zip(cut.placeholders, arguments, strict=False))
        if self._once is None:
            self._once = self._region(ONCE, values)
        values |= self._once
        values |= self._region(DRAWN, values)
        needed = {*cut.regions[PREFIX].inputs, *cut.regions[BODY].inputs}
        values = {n: t for n, t in values.items() if n in needed}
        if self._keep:
            chunk.kept = values
        return values

    def _region(self, which: int, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """What a region of the graph makes of these values."""
        region = self.cut.regions[which]
        if region.empty:
            return {}
        with torch.no_grad():
            return dict(zip(region.outputs, region.graph(*[values[n] for n in region.inputs]), strict=True))
