"""Chunking: the draws of an execution divided into calls of one size, with the graph and compiled calls of that size.

An execution has the chunking that its plan chose, and makes others on demand, for instance for the steps of few draws
of an adaptive prediction. All of them read the same shared weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vbdl.calling.inputs import TENSOR, Flat
from vbdl.compiling.graph import BODY, DRAWN, ONCE, PREFIX, Cut
from vbdl.engine.program import Program, Ready
from vbdl.engine.traced import Traced
from vbdl.types import State


@dataclass
class _Chunk:
    """The draws of one call. The last chunk is filled up by repeating its last draw; the repeats do not count."""

    numbers: Tensor  # (chunk,) int64, the numbers of the draws
    count: int  # how many of them count
    kept: dict[str, Tensor] | None = None  # values that do not depend on the input, such as masks, if they are kept


class Calls(Protocol):
    """All draws of an execution, divided into calls of a fixed number of draws."""

    def __len__(self) -> int:
        """The number of calls."""
        ...

    def of(self, draws: int) -> "Calls":
        """The same draws in calls of at most `draws` each."""
        ...

    def count(self, index: int) -> int:
        """The number of draws that count in the call with this index."""
        ...

    def inputs(self, tile: Flat) -> dict[str, Tensor]:
        """What `run` needs of a tile, by name."""
        ...

    def run(self, index: int, end: str, inputs: dict[str, Tensor], carried: State | None = None) -> State:
        """Run the call with this index; end: what it returns, as in `vbdl.engine.program.ended`."""
        ...

    def ready(self) -> Ready | None:
        """The compiled call as a function of the tile alone, or None if there is none (yet)."""
        ...


class Chunking:
    """All draws of an execution, divided into calls of `draws` draws each.

    keep: keep values that do not depend on the input, such as masks and drawn weights, instead of computing them again
        in every call.
    cut: the cut graph for `draws` draws, if it exists; otherwise it is traced when it is first needed.
    compile: whether to compile the calls.
    """

    def __init__(self, traced: Traced, draws: int, keep: bool, cut: Cut | None = None, compile: bool = False):
        self._traced, self._keep, self._cut_once, self._compile = traced, keep, cut, compile
        n_samples = traced.n_samples
        self._chunks = [
            _Chunk(torch.arange(start, start + draws).clamp_max(n_samples - 1), min(draws, n_samples - start))
            for start in range(0, n_samples, draws)
        ]
        self._programs: dict[tuple[int, str], Program] = {}
        self._once: dict[str, Tensor] | None = None  # values that depend on neither draw nor input, for all chunks

    def __len__(self) -> int:
        """The number of calls."""
        return len(self._chunks)

    def of(self, draws: int) -> "Chunking":
        """The same draws in calls of at most `draws` each."""
        return Chunking(self._traced, draws, self._keep, compile=self._compile)

    def uncompiled(self) -> "Chunking":
        """The same calls, run operation by operation."""
        return Chunking(self._traced, len(self._chunks[0].numbers), self._keep, self.cut)

    def count(self, index: int) -> int:
        """The number of draws that count in the call with this index."""
        return self._chunks[index].count

    @property
    def cut(self) -> Cut:
        """The graph of one call, cut into regions."""
        if self._cut_once is None:
            self._cut_once = self._traced.cut(self._chunks[0].numbers)
        return self._cut_once

    def inputs(self, tile: Flat) -> dict[str, Tensor]:
        """The tile's tensors by placeholder name, to pass to `run`.

        With several calls, the layers before the first random one run here, once, and their outputs are added.
        """
        names = self.cut.placeholders[-len(tile.tensors) :]
        values = dict(zip(names, tile.tensors, strict=True))
        if len(self) > 1 and not self.cut.regions[PREFIX].empty:
            program = self._program(0, "prefix")
            values.update(program({**self._drawn(self._chunks[0]), **values}, {}))
        return values

    def run(self, index: int, end: str, inputs: dict[str, Tensor], carried: State | None = None) -> State:
        """Run the call with this index on `inputs`.

        end: what it returns: "parameters", the parameters of p(y | x) of each draw; "sums", the running sums `carried`
        with its draws added; or "fields", the prediction's fields, if one call holds all draws.
        """
        chunk = self._chunks[index]
        program = self._program(chunk.count, end, list(carried or {}))
        return program({**self._drawn(chunk), **inputs}, carried or {})

    def ready(self) -> Ready | None:
        """The compiled call as a function of the tile alone, or None before it is compiled or if draws are not kept."""
        program, kept = self._programs.get((self.count(0), "fields")), self._chunks[0].kept
        if program is None or kept is None or self._traced.tile.structure != TENSOR:
            return None
        return program.ready(kept, self.cut.placeholders[-1])

    def _program(self, count: int, end: str, carried: Sequence[str] = ()) -> Program:
        """The program for a call in which `count` draws count, made once.

        end: as in `run`, or "prefix" for just the layers before the first random one.
        """
        key = (count, end)
        if key not in self._programs:
            traced = self._traced
            regions = (PREFIX,) if end == "prefix" else (PREFIX, BODY) if len(self) == 1 else (BODY,)
            program = Program(
                self.cut, regions, self._compile, traced.aligned, traced.settings.keeps_bits, traced.handwritten
            )
            if end != "prefix":
                program.finish(traced.called.likelihood, end, count, carried)
            if end == "fields" and traced.tile.structure == TENSOR:
                program.checked = [self.cut.placeholders[-1]]
            self._programs[key] = program
        return self._programs[key]

    def _drawn(self, chunk: _Chunk) -> dict[str, Tensor]:
        """The chunk's values that do not depend on the input, by name; computed once if the plan keeps them."""
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
        """Run one region of the graph on these values, and return its outputs by name."""
        region = self.cut.regions[which]
        if region.empty:
            return {}
        with torch.no_grad():
            return dict(zip(region.outputs, region.graph(*[values[n] for n in region.inputs]), strict=True))
