"""The rows of a batch that one of several processes computes, with the masks and the noise that they have in the whole.

Masks and noise of training are numbered by their place in the tensor of the whole batch. Inside `part_of_batch` the
tensor of a part gets its part of them: those of the whole batch are made, and narrowed along the batch axis, which
compiled code fuses into making the part alone.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

Call = tuple[str, int]
"""A random call of a training step: what it draws and its number in the counters."""


@dataclass(frozen=True)
class PartOfBatch:
    """Rows `first, first + 1, ...` of a batch of `total` rows; equal parts have equal masks of equal calls.

    axes: the batch axis of what each random call draws, or None where it draws the same for all rows.
    """

    first: int
    rows: int
    total: int
    axes: Mapping[Call, int | None] = field(compare=False, repr=False)

    def drawn(self, call: Call, shape: tuple[int, ...], draw: Callable[[tuple[int, ...]], Tensor]) -> Tensor:
        """The part, of this shape, of what a random call draws for the whole batch; draw: makes a shape of it."""
        if call not in self.axes:
            raise RuntimeError(
                f"{call[0]} number {call[1]} was not drawn for the first batch: a forward whose random calls depend on "
                f"the rows cannot be shared out over processes; make the same calls each time"
            )
        if (axis := self.axes[call]) is None:
            return draw(shape)
        multiple, rest = divmod(shape[axis], self.rows)
        if rest:
            raise RuntimeError(
                f"{call[0]} number {call[1]} draws {shape} for {self.rows} rows, not as much for each row: such rows "
                f"cannot be shared out over processes"
            )
        whole = draw((*shape[:axis], multiple * self.total, *shape[axis + 1 :]))
        return whole.narrow(axis, multiple * self.first, shape[axis])


_part: contextvars.ContextVar[PartOfBatch | None] = contextvars.ContextVar("part", default=None)
_shapes: contextvars.ContextVar[dict[Call, tuple[int, ...]] | None] = contextvars.ContextVar("shapes", default=None)


@contextlib.contextmanager
def part_of_batch(part: PartOfBatch) -> Iterator[None]:
    """A context in which the rows of a training step are this part of a batch."""
    token = _part.set(part)
    try:
        yield
    finally:
        _part.reset(token)


@contextlib.contextmanager
def recorded_shapes() -> Iterator[dict[Call, tuple[int, ...]]]:
    """A context that records the shape that each random call of a training step draws."""
    shapes: dict[Call, tuple[int, ...]] = {}
    token = _shapes.set(shapes)
    try:
        yield shapes
    finally:
        _shapes.reset(token)


def current_part() -> PartOfBatch | None:
    """The part of a batch that is being computed, or None for a whole batch."""
    return _part.get()


def drawn_in_training(call: Call, shape: tuple[int, ...], draw: Callable[[tuple[int, ...]], Tensor]) -> Tensor:
    """What a random call of a training step draws, of this shape; draw: makes a shape of it for a whole batch."""
    if (shapes := _shapes.get()) is not None:
        shapes[call] = shape
    part = _part.get()
    return draw(shape) if part is None else part.drawn(call, shape, draw)
