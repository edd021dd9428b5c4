"""The noise of one draw, a pure function of its key: random call i of a forward draws from the counters of layer i.

Noise without a batch axis, like that of a weight, is one draw for all rows. Noise with a batch axis is one draw that
all rows share or, with `per_row`, one draw for each row. In training each element is drawn.
"""

import contextlib
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from vbdl_kernels import normal, words
from vbdl_kernels.philox import BIAS, UNIFORM, WEIGHT

from vbdl.nn.masks import Masks, Site, UnknownCall, described
from vbdl.nn.part_of_batch import drawn_in_training
from vbdl.nn.value_reads import Followed

# bits of a uniform number, as many as the dtype's fraction holds exactly
_BITS = {torch.float64: 32, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}
_functorch: Any = torch._C._functorch  # type: ignore[attr-defined]


@dataclass(frozen=True)
class RandomCall:
    """One call of a random function in a forward."""

    path: str  # name of the innermost module that makes the call; "" is the root
    kind: str  # name of the function
    shape: tuple[int, ...]  # shape of the noise
    axis: int | None = None  # the batch axis of that shape, or None if it has none
    multiple: int = 1  # entries of that axis per row of the batch
    at: int = field(default=0, compare=False)  # stands for the lines of code that make the call

    def is_again(self, path: str, at: int, shape: tuple[int, ...]) -> bool:
        """Whether a call by this code with noise of this shape has the same batch axis, in another batch perhaps."""
        like = list(self.shape)
        if self.axis is not None and len(shape) == len(like):
            like[self.axis] = shape[self.axis]
        return (path, at, shape) == (self.path, self.at, tuple(like))


@dataclass(frozen=True)
class Known:
    """The random calls and the dropout calls of a forward in their order, with their batch axes.

    strict: whether another forward makes them by the same code, so that each has the same batch axis.
    """

    calls: tuple[RandomCall, ...]
    sites: tuple[Site, ...]
    strict: bool = True


class Noise:
    """The noise of the random calls in one forward of `root`, in their order, and the masks of its dropout.

    key: (2,) int64, (seed, draw).
    root: the network, for the names of its modules.
    known: the calls that the forward makes; None: not known yet, so all noise has its full shape.
    per_row: one draw for each row in noise that has a batch axis.
    training: one draw for each element of all noise and dropout, and normalization as in training.
    first: number of the first random call in the counters.
    kept: noise and masks by call and shape, which are read from it and added to it; None: all are made anew.
    constants: normal numbers of random calls, by the call's number, in place of drawn ones.
    """

    def __init__(
        self,
        key: Tensor,
        root: nn.Module,
        known: Known | None = None,
        *,
        per_row: bool = False,
        training: bool = False,
        first: int = 0,
        kept: dict[Hashable, Tensor] | None = None,
        constants: Mapping[int, float] | None = None,
    ):
        self.followed: Followed | None = None  # what follows from floating-point tensors, if it is to be found
        self.masks = Masks(key, root, sites=None if known is None else known.sites, per_row=training, kept=kept)
        self.masks.strict = known is not None and known.strict
        self._kept, self._constants = kept, constants or {}
        self.normals: dict[int, Tensor] | None = None  # the normal numbers by the call's number, if they are collected
        self.key, self.known, self._each_row, self._first = key, known, per_row, first
        self.calls: list[RandomCall] = []
        self.watched: dict[int, str] = {}  # addresses of tensors that must not be drawn into, and what they are
        # the addresses of tensors that may be drawn into, or None for all; in training, a draw must not change what the
        # gradient of the draw before needs
        self.writable: set[int] | None = set() if training else None
        # by id: the tensor, so that its id is not reused, and what was drawn into it or what it is an alias of
        self._values: dict[int, tuple[Tensor, Tensor]] = {}
        self._origins: dict[int, tuple[Tensor, Tensor]] = {}

    def refuse(
        self,
        name: str,
        instead: str = "compute it from torch.rand, torch.randn or torch.bernoulli, whose draws can be",
    ) -> None:
        """Raise NotImplementedError for a random function that cannot be drawn from counters; instead: what to do."""
        raise NotImplementedError(
            f"{name} is called in {described(self.masks.place())} and cannot be drawn from counters, so a draw would "
            f"not be reproducible: {instead}"
        )

    def check_all_made(self) -> None:
        """Raise UnknownCall if the forward made fewer random calls than are known."""
        if self.known is not None and len(self.calls) < len(self.known.calls):
            missing = self.known.calls[len(self.calls)]
            raise UnknownCall(f"{missing.kind} in {described(missing.path)}", missing=True)

    # -- noise

    def normal(self, kind: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Standard normal noise of this shape."""
        self._check_dtype(kind, dtype)

        def draw(key: Tensor, number: int, vector: bool, rows: int, columns: int) -> Tensor:
            return normal(key, number, BIAS if vector else WEIGHT, rows, columns)

        number = len(self.calls)
        constant = self._constants.get(number)
        if constant is not None:
            self._made(kind, shape, device, self.key.new_empty(0))
            return torch.full(tuple(shape), constant, dtype=dtype, device=device)
        numbers = self._noise(kind, shape, device, draw).to(dtype)
        if self.normals is not None:
            self.normals[number] = numbers.clone()
        return numbers

    def words(self, kind: str, shape: Sequence[int], device: torch.device) -> Tensor:
        """Uniform 32-bit words, int64, of this shape."""

        def draw(key: Tensor, number: int, vector: bool, rows: int, columns: int) -> Tensor:
            return words(key, number, UNIFORM, rows, columns)

        return self._noise(kind, shape, device, draw)

    def uniform(self, kind: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Noise uniform in [0, 1)."""
        self._check_dtype(kind, dtype)
        bits = _BITS[dtype]
        return (self.words(kind, shape, device) >> (32 - bits)).to(dtype) * 2.0**-bits

    def exponential(self, kind: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Noise of the exponential distribution with rate 1, finite."""
        self._check_dtype(kind, dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return -((self.words(kind, shape, device).to(wide) + 0.5) * 2.0**-32).log().to(dtype)

    def bernoulli(self, kind: str, shape: Sequence[int], p: Tensor | float, device: torch.device) -> Tensor:
        """True with probability p, bool."""
        if isinstance(p, Tensor):
            return self.uniform(kind, shape, torch.float32, device) < p.detach()
        return self.words(kind, shape, device) < round(p * 2**32)

    def _check_dtype(self, kind: str, dtype: torch.dtype) -> None:
        if dtype not in _BITS:
            self.refuse(f"{kind} of {dtype}")

    def _noise(
        self,
        kind: str,
        shape: Sequence[int],
        device: torch.device,
        draw: Callable[[Tensor, int, bool, int, int], Tensor],
    ) -> Tensor:
        """The noise of the next random call, kept if noise is; see `_made`."""
        if self._kept is None:
            return self._made(kind, shape, device, draw)
        this = (kind, len(self.calls), tuple(shape))
        made = self._made(kind, shape, device, self._kept.get(this, draw))
        self._kept.setdefault(this, made)
        return made.clone()  # the network may write into it

    def _made(
        self,
        kind: str,
        shape: Sequence[int],
        device: torch.device,
        draw: Callable[[Tensor, int, bool, int, int], Tensor] | Tensor,
    ) -> Tensor:
        """The noise of the next random call.

        draw: draw(key, number, whether it is a vector, rows, columns) -> (rows, columns), or the noise if it was kept.
        """
        shape, axis, multiple, number = tuple(shape), None, 1, len(self.calls)
        path = self.masks.place()
        if self.known is not None and not self.masks.per_row:
            call = self.known.calls[number] if number < len(self.known.calls) else None
            if (
                call is None
                or call.kind != kind
                or (self.known.strict and not call.is_again(path, self.masks.at, shape))
            ):
                raise UnknownCall(f"{kind} in {described(path)}")
            axis, multiple = call.axis, call.multiple
        self.calls.append(RandomCall(path, kind, shape, axis, multiple, self.masks.at))
        if isinstance(draw, Tensor):
            return draw
        key, number = self.key.to(device), self._first + number
        if axis is None:  # as the noise of a parameter: the row is its first axis

            def of_parameter(shape: tuple[int, ...]) -> Tensor:
                vector = len(shape) < 2
                rows = 1 if vector else shape[0]
                return draw(key, number, vector, rows, math.prod(shape) // max(rows, 1)).view(shape)

            if self.masks.per_row:
                return drawn_in_training(("noise", number), shape, of_parameter)
            return of_parameter(shape)
        # the batch first, so that a row's noise does not depend on the rows after it
        sizes = [shape[axis] if self._each_row else multiple, *shape[:axis], *shape[axis + 1 :]]
        columns = sizes[-1] if len(sizes) > 1 else 1
        rows = math.prod(sizes) // max(columns, 1)
        noise = draw(key, number, False, rows, columns).view(sizes).movedim(0, axis)
        if self._each_row:
            return noise
        repeats = [1] * len(shape)
        repeats[axis] = shape[axis] // multiple
        if multiple == 1 and _without_mutations():
            return noise.expand(shape)
        return noise.repeat(repeats)

    # -- tensors that are drawn into

    def draw_into(self, target: Tensor, value: Tensor) -> Tensor:
        """Write drawn values into a tensor, or remember them in its place where a transform cannot write to it."""
        if self.watched:
            address = target.untyped_storage().data_ptr()
            if address in self.watched:
                raise ValueError(
                    f"{self.calls[-1].kind} in {described(self.calls[-1].path)} draws into "
                    f"{self.watched[address]} in place, so the next draw would find it changed: draw into a new "
                    f"tensor, e.g. torch.randn_like(x), or into a buffer"
                )
        if self.writable is None:  # inside vmap and functionalize, only a tensor of their level can be written to
            can_write = _functorch.maybe_get_level(target) >= _functorch.maybe_get_level(value)
        else:
            can_write = bool(self.writable) and target.untyped_storage().data_ptr() in self.writable
        if can_write:
            with torch.no_grad() if target.is_leaf else contextlib.nullcontext():
                return target.copy_(value)
        value = value.to(target.dtype)
        alias: Tensor | None = target
        while alias is not None:
            self._values[id(alias)] = (alias, value)
            alias = self._origins[id(alias)][1] if id(alias) in self._origins else None
        return value

    def alias(self, t: Tensor) -> Tensor:
        """The tensor detached, as another name of it: what is drawn into one is drawn into both."""
        alias = t.detach()
        self._origins[id(alias)] = (alias, t)
        return alias

    def as_drawn(self, arguments: Any) -> Any:
        """Arguments of a function, with what was drawn into a tensor in its place."""
        return tree_map_only(Tensor, self._as_drawn, arguments) if self._values else arguments

    def _as_drawn(self, t: Tensor) -> Tensor:
        while id(t) in self._values:  # what was drawn may have been drawn into again
            t = self._values[id(t)][1]
        return t


def _without_mutations() -> bool:
    """Whether a trace removes mutations, so that a tensor whose elements share memory may be written to."""
    stack = _functorch.get_interpreter_stack() or ()
    return any(i.key() == _functorch.TransformType.Functionalize for i in stack)
