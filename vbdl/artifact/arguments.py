"""Arguments of a class, as a file gives them, against the types that its constructor names."""

import functools
import inspect
import typing
from collections.abc import Mapping
from typing import Any

import msgspec


def check_arguments(kind: type, arguments: Mapping[str, Any]) -> None:
    """TypeError for an argument of another type than the constructor of `kind` names, like a text for a number.

    What has no type there, or one that JSON does not know, is left to the constructor.
    """
    hints = _hints(kind)
    for name, value in arguments.items():
        if name not in hints:
            continue
        try:
            msgspec.convert(value, hints[name], strict=True)
        except msgspec.ValidationError as error:
            raise TypeError(f"{kind.__name__} takes no {name} of {str(value)[:60]!r}: {error}") from None


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    """The types that msgspec can check."""
    try:
        found = typing.get_type_hints(kind.__init__)
    except (NameError, TypeError):
        return {}
    taken = {}
    for name, parameter in inspect.signature(kind).parameters.items():
        if name in found and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            try:
                msgspec.json.Decoder(found[name])
            except TypeError:  # a tensor, a module
                continue
            taken[name] = found[name]
    return taken
