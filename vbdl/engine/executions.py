"""The executions of one posterior by the shape of the tile, each made when it is first needed."""

import contextlib
import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from vbdl.calling.inputs import Flat, Structure
from vbdl.data.rows import cannot_take
from vbdl.engine.execution import Execution
from vbdl.engine.moments import MomentExecution
from vbdl.engine.settings import PredictorSettings
from vbdl.model import Model
from vbdl.nn.gaussian import CannotLinearize
from vbdl.types import Likelihood, Posterior

Key = tuple[Structure, tuple[tuple[tuple[int, ...], torch.dtype], ...]]  # of a tile: its structure, each tensor's shape
Row = Key  # the same of a single row, without the axis of rows
Made = Sequence[Execution] | Sequence[MomentExecution]


class Executions:
    """A table of executions: for each shape of tile, one for every part (architecture) of the posterior.

    The parts of a posterior share the draws. sealed: if True, nothing more is traced or compiled, and a call that would
    need it raises RuntimeError. Threads may use one table; one thread at a time traces and compiles.
    """

    def __init__(self, posterior: Posterior, likelihood: Likelihood, settings: PredictorSettings, device: torch.device):
        self.posterior, self.likelihood, self.settings, self.device = posterior, likelihood, settings, device
        self.by_shape: dict[Key, Made] = {}
        self.sealed = False
        self.waiting = False  # whether graphs are waited for that are compiled in the background
        self._lock = threading.RLock()

    def of(self, tile: Flat) -> Made:
        """The executions, one for each part, for tiles of this tile's shapes and dtypes; made if there are none yet."""
        key = _key(tile)
        executions = self.by_shape.get(key)
        if executions is not None:
            return self._in_time(executions)
        if self.sealed:
            shapes = [(list(t.shape[1:]), str(t.dtype)) for t in tile.tensors]
            raise RuntimeError(
                f"rows of shape {shapes} in tiles of {tile.rows} were not warmed up, and compiling "
                f"after warm_up is refused: call warm_up with such an example and batch size"
            )
        with self._lock:
            if key not in self.by_shape:
                made = self.make(tile)
                for execution in made:
                    if isinstance(execution, Execution):
                        execution.belongs_to(self)
                self.by_shape[key] = made
        return self._in_time(self.by_shape[key])

    def _in_time(self, executions: Made) -> Made:
        """Return the executions, once they are compiled in the background if `waiting`."""
        for execution in executions:
            execution.check(self.waiting)
        return executions

    def sizes(self, flat: Flat) -> set[int]:
        """The numbers of rows of the tiles for rows like these that there are executions for."""
        row = row_of(flat)
        return {key[1][0][0][0] for key in list(self.by_shape) if _row(key) == row}

    def make_behind(self, tile: Flat) -> None:
        """Make executions for such tiles, and compile them in this thread; they are kept in the table when ready.

        Raises what was found wrong with them, and RuntimeError if nothing may be compiled any more.
        """
        with self._lock:
            made = self.make(tile)
        for execution in made:
            if isinstance(execution, Execution):
                execution.check(wait=True, here=True)
        if self.sealed:
            raise RuntimeError("the predictor was warmed up meanwhile")
        self.by_shape[_key(tile)] = made

    def forget(self, tile: Flat) -> None:
        """Let go of the executions for such tiles."""
        self.by_shape.pop(_key(tile), None)

    def drawing(self, tile: Flat) -> list[Execution]:
        """Those of `of` that draw: all of them, unless moments stand in for draws."""
        return [e for e in self.of(tile) if isinstance(e, Execution)]

    def make(self, tile: Flat) -> Made:
        """Make new executions for tiles like this one by tracing with it; they are not kept in the table."""
        executions = []
        start = 0
        kind = MomentExecution if self.settings.estimator == "moments" else Execution
        tile = tile.map(_as_usual)
        for part in self.posterior.parts:
            count = min(part.n_draws or self.settings.n_samples, self.settings.n_samples - start)
            if count <= 0:
                break
            model = Model(part, self.likelihood, self.settings.autocast, first_member=start)
            try:
                with outside_autocast(self.device):
                    executions.append(kind(model, tile, self.settings, count))
            except CannotLinearize as error:
                raise ValueError(str(error)) from error
            except (RuntimeError, IndexError, AssertionError) as error:
                raise cannot_take(tile.tensors, error, part.module) from error
            start += count
        if len(shapes := {e.parameter_shape for e in executions}) > 1:
            raise ValueError(
                f"members return different shapes for a tile of rows: {sorted(map(tuple, shapes))}. Give all members "
                f"the same output shape"
            )
        return executions

    @contextlib.contextmanager
    def compiling(self, executions: Made, *calls: str) -> Iterator[None]:
        """A context to run these calls in: under a lock as long as they are not compiled, and without one afterwards.

        calls: names such as "sums" or "parameters". Compiled calls share no data that they write to.
        """
        compiled = executions[0].compiled
        if compiled.issuperset(calls) or all(isinstance(e, Execution) and e.answers_as_it_is for e in executions):
            with outside_autocast(self.device):
                yield
            return
        if self.sealed:
            raise RuntimeError(
                "the parameters of each draw, a tolerance or a deadline were not warmed up, and compiling after "
                "warm_up is refused: call warm_up(..., samples=True) for the parameters of each draw, "
                "warm_up(..., adaptive=True) for a tolerance or a deadline"
            )
        with self._lock, outside_autocast(self.device):
            yield
        if not any(isinstance(e, Execution) and e.compiling for e in executions):
            compiled.update(calls)

    def __getstate__(self) -> dict[str, object]:
        """The state to copy or pickle, without the lock and the executions: a copy traces and compiles again."""
        return {**vars(self), "by_shape": {}, "sealed": False, "waiting": False, "_lock": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update({**state, "_lock": threading.RLock()})


def row_of(flat: Flat) -> Row:
    """What rows must have in common to share a tile."""
    return _row(_key(flat))


def _row(key: Key) -> Row:
    structure, shapes = key
    return structure, tuple((shape[1:], dtype) for shape, dtype in shapes)


def _key(tile: Flat) -> Key:
    return tile.structure, tuple((tuple(t.shape), t.dtype) for t in tile.tensors)


def outside_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """A context that switches autocast off, so that a user's autocast around the first call is not compiled in."""
    if not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()  # entering torch.autocast takes 10 us
    return torch.autocast(device.type, enabled=False)


def _as_usual(t: Tensor) -> Tensor:
    """A tensor without gradient, and not of torch's inference mode, whose tensors count no changes."""
    return t.clone() if t.is_inference() else t.detach() if t.requires_grad else t
