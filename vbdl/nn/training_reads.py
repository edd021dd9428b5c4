"""Dropout on and nothing else: what `self.training` answers to each place in the code that asks.

A forward asks it for dropout (`F.dropout(x, p, self.training)`, `dropout_p=self.p if self.training else 0.0`) and for
other things: a gate that is soft in training, an auxiliary head, statistics of its own, noise. Prediction by Monte
Carlo dropout wants the first and none of the others. Which is which is found by running: a place is about dropout where
answering True makes units drop and, with all dropout at a rate of 0, changes nothing else.
"""

import sys
import types
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

Place = tuple[str, str, int]
"""File, function and instruction of a read of `self.training`."""

EVERY = None
"""All places of a module's own code are answered True, as in a module that does nothing but drop in training."""

_READS = "_reads_of_training"
_APART = 1e-4  # of the largest output: fused and plain attention differ by rounding


class Reads:
    """Answers to reads of `self.training` while a module runs.

    on: places that are answered True, or EVERY. Reads inside torch's own code get the flag of the module, which stands
    for its layer as a whole; so does every read of a module in `fixed`.
    """

    def __init__(self, on: Collection[Place] | None, fixed: Collection[int]):
        self.on, self._fixed = on, fixed
        self.seen: set[Place] = set()
        self.unlike_flag = False  # a read of a module's own code that its flag would answer otherwise

    def answer(self, module: nn.Module, frame: types.FrameType) -> bool:
        flag = vars(module)["training"]
        if frame.f_globals.get("__name__", "").partition(".")[0] == "torch" or id(module) in self._fixed:
            return flag
        place = (frame.f_code.co_filename, frame.f_code.co_qualname, frame.f_lasti)
        self.seen.add(place)
        answer = self.on is None or place in self.on
        self.unlike_flag |= answer is not flag
        return answer

    @contextmanager
    def of(self, root: nn.Module) -> Iterator[None]:
        """Inside, modules of `root` answer by these places."""
        watched = [m for m in root.modules() if not isinstance(m, torch.jit.ScriptModule)]
        for m in watched:
            vars(m)[_READS] = self
            m.__class__ = _watching(type(m))
        try:
            yield
        finally:
            for m in watched:
                m.__class__ = type(m).__bases__[0]
                del vars(m)[_READS]


@lru_cache(maxsize=1024)
def _watching(kind: type) -> type:
    def read(module: nn.Module) -> bool:
        return vars(module)[_READS].answer(module, sys._getframe(1))

    def write(module: nn.Module, value: bool) -> None:
        vars(module)["training"] = value

    body = {"training": property(read, write), "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind)(kind.__name__, (kind,), body)


@dataclass(frozen=True)
class Run:
    """What one run with every dropout at a rate of 0 has shown."""

    outputs: list[Any]
    structure: Any
    written: list[Tensor]  # buffers, as the run left them
    drops: int  # calls that would drop units
    error: str | None = None

    def computes_as(self, other: "Run") -> bool:
        """Whether both gave the same outputs and left the same buffers."""
        if self.error or other.error or self.structure != other.structure:
            return False
        pairs = zip([*self.outputs, *self.written], [*other.outputs, *other.written], strict=True)
        return all(_same(a, b) for a, b in pairs)


def _same(a: Any, b: Any) -> bool:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return type(a) is type(b) and bool(a == b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not (a.is_floating_point() or a.is_complex()):
        return torch.equal(a, b)
    scale = float(b.abs().nan_to_num(posinf=0.0).max()) if b.numel() else 0.0
    return torch.allclose(a, b, rtol=_APART, atol=_APART * scale, equal_nan=True)


def places_of_dropout(
    run: Callable[[Reads], tuple[Any, list[Tensor], int]], fixed: Collection[int]
) -> tuple[frozenset[Place] | None, list[str]]:
    """The places that are about dropout, EVERY where all are; and what was switched off on the way, in words.

    run: runs the module with these answers -> outputs, buffers as it left them, calls that would drop units.
    Raises ValueError where one read drops units and does something else too.
    """

    def look(on: Collection[Place] | None) -> tuple[Run, Reads]:
        reads = Reads(on, fixed)
        try:
            outputs, written, drops = run(reads)
        except Exception as error:  # in training a module may do what a prediction cannot
            return Run([], None, [], 0, (str(error).strip() or type(error).__name__).splitlines()[0]), reads
        leaves, structure = tree_flatten(outputs)
        return Run(leaves, structure, written, drops), reads

    every, reads = look(EVERY)
    nothing = Reads(frozenset(), fixed)
    outputs, written, drops = run(nothing)  # what fails here fails in prediction, and says why itself
    leaves, structure = tree_flatten(outputs)
    plain = Run(leaves, structure, written, drops)
    if every.computes_as(plain):
        return (frozenset(reads.seen) if reads.unlike_flag else EVERY), []
    on: set[Place] = set()
    off: list[str] = []
    current, waiting, decided = plain, set(nothing.seen), set()
    while waiting := waiting - decided:
        place = min(waiting)
        decided.add(place)
        found, reads = look(on | {place})
        waiting |= reads.seen
        if found.error is None and found.drops > current.drops:
            if not found.computes_as(current):
                raise ValueError(
                    f"{_where(place)} asks self.training once for dropout and for something else that changes the "
                    f"output, so that one cannot be on without the other: ask twice, or name the module in "
                    f"deterministic= to keep it in evaluation mode"
                )
            on.add(place)
            current = found
        elif found.error is not None or not found.computes_as(current):
            off.append(f"{_where(place)}: {found.error or 'other than dropout'}")
    return frozenset(on), off


def _where(place: Place) -> str:
    file, function, _ = place
    return f"{function} ({file.rpartition('/')[2]})"
