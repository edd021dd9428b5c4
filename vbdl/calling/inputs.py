"""The inputs of a call as a flat list of tensors, and the structure that a module is called with.

    x                          one tensor: module(x)
    (a, b), [a, b]             positional arguments: module(a, b)
    {"a": a, "b": b}           keyword arguments, of a dict or any Mapping: module(a=a, b=b)

What is nested in these is passed on as it is: dicts in dicts, tuples, lists, None, True, False and texts. The first
axis of every tensor is the batch. Arrays are taken as tensors.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vbdl.types import Inputs


@dataclass(frozen=True)
class _TensorPlace:
    """The place of one tensor in a structure."""


TENSOR = _TensorPlace()


@dataclass(frozen=True)
class Container:
    """A Mapping, list or tuple in a structure; names: the keys of a Mapping, None otherwise."""

    kind: type
    names: tuple[Any, ...] | None
    parts: tuple["Structure", ...]


Structure = Container | _TensorPlace | None | bool | str
"""How tensors are nested, and what is nested with them. Hashable, and equal for inputs that are nested alike."""


@dataclass(frozen=True)
class Flat:
    """The tensors of a call in order, and the structure they came in."""

    tensors: tuple[Tensor, ...]
    structure: Structure

    @property
    def rows(self) -> int:
        """The number of rows."""
        return self.tensors[0].shape[0]

    @property
    def nested(self) -> Any:
        """The tensors in their structure, as a module is called with them."""
        return rebuilt(self.structure, self.tensors)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Flat":
        """The function of every tensor, in the same structure."""
        return Flat(tuple(function(t) for t in self.tensors), self.structure)


def flatten(inputs: Any) -> Flat:
    """The inputs of a call, flat. Raises TypeError for what is no tensor and cannot be passed on."""
    found: list[Tensor] = []
    structure = _structure(inputs, found)
    return Flat(tuple(found), structure)


def _structure(value: Any, found: list[Tensor]) -> Structure:
    """The structure of a value, whose tensors are appended to `found`."""
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, Tensor):
        found.append(value)
        return TENSOR
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Mapping):
        return Container(type(value), tuple(value), tuple(_structure(part, found) for part in value.values()))
    if isinstance(value, Sequence):
        kind = type(value) if isinstance(value, tuple | list) else tuple
        return Container(kind, None, tuple(_structure(part, found) for part in value))
    raise TypeError(
        f"inputs are tensors or arrays: one, a tuple of them, or a dict by argument name, also nested; got "
        f"{type(value).__name__}"
    )


def rebuilt(structure: Structure, tensors: Sequence[Tensor]) -> Any:
    """These tensors in a structure."""
    return _filled(structure, iter(tensors))


def _filled(structure: Structure, tensors: Any) -> Any:
    if isinstance(structure, _TensorPlace):
        return next(tensors)
    if not isinstance(structure, Container):
        return structure
    parts = [_filled(part, tensors) for part in structure.parts]
    kind = structure.kind
    if structure.names is not None:
        entries = dict(zip(structure.names, parts, strict=True))
        return entries if kind is dict else _mapping(kind, entries)
    if kind is list:
        return parts
    return tuple(parts) if kind is tuple else kind(*parts)  # a named tuple


def _mapping(kind: type, entries: dict[Any, Any]) -> Any:
    """A Mapping of this class, or the dict where the class is made in another way (`collections.defaultdict`)."""
    try:
        return kind(entries)
    except TypeError:
        return entries


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a call."""
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return tuple(inputs), {}


def tensors(inputs: Inputs) -> list[Tensor]:
    """Every tensor of the inputs, in order."""
    return list(flatten(inputs).tensors)


def map_inputs(function: Callable[[Tensor], Tensor], inputs: Inputs) -> Any:
    """The function of every tensor, in the same structure."""
    return flatten(inputs).map(function).nested


def rebuild(like: Inputs, tensors: Sequence[Tensor]) -> Any:
    """These tensors in the structure of `like`."""
    return rebuilt(flatten(like).structure, tensors)
