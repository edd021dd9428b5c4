"""The inputs of a module's call: a flat list of tensors, and the structure in which they are passed.

    x                          one tensor: module(x)
    (a, b), [a, b]             positional arguments: module(a, b)
    {"a": a, "b": b}           keyword arguments, from a dict or any Mapping: module(a=a, b=b)

Arguments may be nested: dicts, tuples, lists, None, True, False and strings are passed on unchanged. The first axis of
every tensor is the batch. NumPy arrays become tensors.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from vbdl.types import Inputs, Nested


@dataclass(frozen=True)
class _TensorPlace:
    """The mark for a tensor in a structure."""


TENSOR = _TensorPlace()


@dataclass(frozen=True)
class Container:
    """A Mapping, list or tuple in a structure."""

    kind: type  # the class of the container
    names: tuple[str, ...] | None  # the keys of a Mapping, None for a list or a tuple
    parts: tuple["Structure", ...]


Structure = Container | _TensorPlace | None | bool | str
"""The nesting of inputs with the values that are not tensors. Hashable; equal for inputs that are nested alike."""


@dataclass(frozen=True)
class Flat:
    """The inputs of a call as a flat tuple of tensors and the structure that they came in.

    not_finite: the numbers of the rows that are not finite, (n,) int64, if there are any and the network takes them.
    """

    tensors: tuple[Tensor, ...]
    structure: Structure
    not_finite: Tensor | None = None

    @property
    def rows(self) -> int:
        """The number of rows of the batch."""
        return self.tensors[0].shape[0]

    @property
    def nested(self) -> Inputs:
        """The tensors in their structure, as a module takes them."""
        if self.structure is TENSOR:
            return self.tensors[0]
        return rebuilt(self.structure, self.tensors)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Flat":
        """Apply a function to every tensor, and keep the structure."""
        return Flat(tuple(function(t) for t in self.tensors), self.structure)


def flatten(inputs: object) -> Flat:
    """Flatten the inputs of a call. Raises TypeError for a value that no structure can hold, such as a number."""
    if isinstance(inputs, Tensor):
        return Flat((inputs,), TENSOR)
    flat: list[Tensor] = []
    structure = _structure(inputs, flat)
    return Flat(tuple(flat), structure)


def _structure(value: object, flat: list[Tensor]) -> Structure:
    """The structure of a value; its tensors are appended to `flat`."""
    if isinstance(value, np.ndarray):
        value = tensor_of(value)
    if isinstance(value, Tensor):
        flat.append(value)
        return TENSOR
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, PackedSequence):
        raise TypeError(
            "a packed sequence has no batch axis: pass the padded rows and their lengths, and pack them in the forward"
        )
    if isinstance(value, Mapping):
        return Container(type(value), tuple(value), tuple(_structure(part, flat) for part in value.values()))
    if isinstance(value, Sequence):
        kind = type(value) if isinstance(value, tuple | list) else tuple
        return Container(kind, None, tuple(_structure(part, flat) for part in value))
    raise TypeError(
        f"inputs are tensors or arrays: pass one, a tuple of them, or a dict by argument name, also nested; got "
        f"{type(value).__name__}"
    )


class _Writable:
    """An array's memory without its mark as read-only, of which torch warns; vbdl does not write into inputs."""

    def __init__(self, array: np.ndarray):
        self.array = array  # which keeps the memory
        self.__array_interface__ = {**array.__array_interface__, "data": (array.ctypes.data, False)}


def tensor_of(array: np.ndarray) -> Tensor:
    """A tensor of an array's memory. A memory-mapped array is not read; others are made contiguous."""
    if not isinstance(array, np.memmap) or min(array.strides, default=0) < 0:
        array = np.ascontiguousarray(array)
    return torch.from_numpy(array if array.flags.writeable else np.asarray(_Writable(array)))


def rebuilt(structure: Structure, tensors: Sequence[Tensor]) -> Any:  # of the kind that the structure says
    """Put these tensors into a structure."""
    return _filled(structure, iter(tensors))


def _filled(structure: Structure, tensors: Iterator[Tensor]) -> Nested:
    if isinstance(structure, _TensorPlace):
        return next(tensors)
    if not isinstance(structure, Container):
        return structure
    parts = [_filled(part, tensors) for part in structure.parts]
    kind = structure.kind
    if structure.names is not None:
        entries = dict(zip(structure.names, parts, strict=True))
        return entries if kind is dict else mapping(kind, entries)
    if kind is list:
        return parts
    return tuple(parts) if kind is tuple else kind(*parts)  # a named tuple


def mapping(kind: type, entries: dict[str, Nested]) -> Mapping[str, Nested]:
    """A Mapping of this class, or the dict if its constructor takes no dict (`collections.defaultdict`)."""
    try:
        return kind(entries)
    except TypeError:
        return entries


def arguments(inputs: Inputs) -> tuple[tuple[Nested, ...], dict[str, Nested]]:
    """The positional and the keyword arguments that a module is called with."""
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return tuple(inputs), {}


def tensors(inputs: Inputs) -> list[Tensor]:
    """All tensors of the inputs, in order."""
    return list(flatten(inputs).tensors)


def map_inputs(function: Callable[[Tensor], Tensor], inputs: Inputs) -> Inputs:
    """Apply a function to every tensor of the inputs, and keep the structure."""
    return flatten(inputs).map(function).nested


def rebuild(like: Inputs, tensors: Sequence[Tensor]) -> Inputs:
    """Put these tensors into the structure of `like`."""
    return rebuilt(flatten(like).structure, tensors)


def another_row(row: Tensor) -> Tensor:
    """Make up a different row, (1, ...), that a network accepts too: other numbers, or the same ids and flags reversed.

    Each number is changed by another factor: normalization would undo one factor for all of them.
    """
    if not row.is_floating_point():
        return row.flip(-1) if row.ndim > 1 else row
    factors = torch.linspace(0.25, 0.75, row.numel(), dtype=row.dtype, device=row.device).view(row.shape)
    return row * factors + 0.2 * (1 - factors)
