"""The values that are passed around: states, inputs, arguments and JSON objects."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

State = dict[str, Tensor]
"""Parameters and buffers by name; stacked when every entry has a leading samples axis."""

Json = dict[str, Any]
"""An object as JSON holds it: texts, numbers, None, lists and objects, by name."""

Arguments = Sequence[Any]
"""Positional arguments of a call, which checks them."""

Keywords = dict[str, Any]
"""Keyword arguments of a call, which checks them."""

Nested = Tensor | Sequence["Nested"] | Mapping[str, "Nested"] | str | bool | None
"""A value that a module is called with: tensors, and what they are nested in and with."""

Inputs = Tensor | Sequence["Nested"] | Mapping[str, "Nested"]
"""The inputs of a module: one tensor, or positional or keyword arguments. Arguments are tensors or nested structures of
tensors (`vbdl.calling.inputs`), each with the batch axis first."""

Output = str | int | Callable[[Any], Tensor] | None
"""The choice of one tensor among a network's outputs: a name, an index, a function of the outputs, or None to find it
(`vbdl.calling.outputs`)."""
