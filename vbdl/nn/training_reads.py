"""Reads of `self.training` in a forward: True for those that switch dropout on, False for all others.

A forward reads `self.training` for dropout (`F.dropout(x, p, self.training)`, `dropout_p=self.p if self.training else
0.0`) and for other purposes: a gate that is soft in training, an auxiliary head, statistics, noise. Prediction by Monte
Carlo dropout needs the former on and the latter off. Running the module tells them apart: a read is about dropout if
True there makes units drop and, with all dropout at a rate of 0, changes no output.
"""

import sys
import types
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from vbdl.calling.outputs import are_same, leaves
from vbdl.calling.traversing import modules_of
from vbdl.nn.may_drop import runs_code_of_others

Place = tuple[str, str, int]
"""A place in the code that reads `self.training`: (file, function, instruction)."""

EVERY = None
"""Stands for all places of the user's code, as for a module whose training mode only adds dropout."""

_READS = "_reads_of_training"
_APART = 1e-4  # tolerance relative to the largest output, above the rounding of fused against plain attention


class Reads:
    """The answers to reads of `self.training` while a module runs.

    on: places that read True, or EVERY. Reads in torch's own code, and all reads of the modules with ids in `fixed`,
    get the module's flag.
    """

    def __init__(self, on: Collection[Place] | None, fixed: Collection[int]):
        self.on, self._fixed = on, fixed
        self.seen: set[Place] = set()
        self.unlike_flag = False  # whether any answer differed from the module's flag

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
        """Inside this context, `training` of the modules of `root` reads as `answer` says."""
        watched = [m for _, m in modules_of(root) if not isinstance(m, torch.jit.ScriptModule)]
        if not runs_code_of_others(root):  # whose reads get the module's flag
            watched = []
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
    """The results of one run with every dropout at a rate of 0."""

    outputs: dict[tuple, object]  # tensors and other objects by their place in the outputs
    written: list[Tensor]  # buffers after the run
    drops: int  # number of calls that would drop units
    error: str | None = None

    def computes_as(self, other: "Run") -> bool:
        """Whether both runs have the same outputs and buffers, up to rounding."""
        if self.error or other.error or list(self.outputs) != list(other.outputs):
            return False
        mine, others = ([*run.outputs.values(), *run.written] for run in (self, other))
        pairs = zip(mine, others, strict=True)
        return all(returned_same(a, b) for a, b in pairs)


def returned_same(a: object, b: object) -> bool:
    """Whether two parts of what forwards returned are equal, numbers up to rounding."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        # an object that has no equality, such as a cache of keys, says nothing
        return type(a) is type(b) and (type(a).__eq__ is object.__eq__ or bool(a == b))
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not (a.is_floating_point() or a.is_complex()):
        return torch.equal(a, b)
    return are_same(a, b, _APART)


def places_of_dropout(
    run: Callable[[Reads], tuple[object, list[Tensor], int]], fixed: Collection[int]
) -> tuple[frozenset[Place] | None, list[str]]:
    """The places that read `training` for dropout, or EVERY, and descriptions of the places that are switched off.

    run: runs the module with these answers and returns its outputs, its buffers after the run, and the number of calls
        that would drop units.
    fixed: ids of the modules whose reads get their flag.
    Raises ValueError if one read both drops units and changes something else.
    """

    def look(on: Collection[Place] | None) -> tuple[Run, Reads]:
        reads = Reads(on, fixed)
        try:
            outputs, written, drops = run(reads)
        except Exception as error:  # in training mode a module may do what a prediction cannot
            return Run({}, [], 0, (str(error).strip() or type(error).__name__).splitlines()[0]), reads
        return Run(leaves(outputs), written, drops), reads

    every, reads = look(EVERY)
    if every.error is None and not reads.seen:  # nothing reads `training`, so that another run would be the same
        return EVERY, []
    nothing = Reads(frozenset(), fixed)
    outputs, written, drops = run(nothing)  # an error here is one of prediction too, so it is raised
    plain = Run(leaves(outputs), written, drops)
    if every.computes_as(plain):
        return (frozenset(reads.seen) if reads.unlike_flag else EVERY), []
    on: set[Place] = set()
    off: list[str] = []
    current, waiting, decided = plain, set(nothing.seen), set()
    while waiting := waiting - decided:
        place = min(waiting)
        decided.add(place)
        tried, reads = look(on | {place})
        waiting |= reads.seen
        if tried.error is None and tried.drops > current.drops:
            if not tried.computes_as(current):
                raise ValueError(
                    f"{_where(place)} reads self.training once both for dropout and for something else that changes "
                    f"the output, so one cannot be on without the other: read it twice, or name the module in "
                    f"deterministic= to keep it in evaluation mode"
                )
            on.add(place)
            current = tried
        elif tried.error is not None or not tried.computes_as(current):
            off.append(f"{_where(place)}: {tried.error or 'other than dropout'}")
    return frozenset(on), off


def _where(place: Place) -> str:
    file, function, _ = place
    return f"{function} ({file.rpartition('/')[2]})"
