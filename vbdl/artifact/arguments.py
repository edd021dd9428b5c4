"""A check of constructor arguments read from a file against the constructor's type annotations."""

import functools
import inspect
import typing
from collections.abc import Mapping

import msgspec


def check_arguments(kind: type, arguments: Mapping[str, object]) -> None:
    """Raise TypeError if an argument does not match its annotation in the constructor of `kind`.

    Arguments without an annotation, or with one that JSON cannot express (a tensor, a module), are not checked.
    """
    hints = _hints(kind)
    for name, value in arguments.items():
        if name not in hints:
            continue
        try:
            msgspec.convert(value, hints[name], strict=True)
        except msgspec.ValidationError as error:
            raise TypeError(f"{kind.__name__} does not accept {name}={str(value)[:60]!r}: {error}") from None


@functools.cache
def _hints(kind: type) -> dict[str, object]:
    """The constructor's annotations by argument name, as far as msgspec can check them."""
    try:
        annotations = typing.get_type_hints(kind.__init__)
    except (NameError, TypeError):
        return {}
    checkable = {}
    for name, parameter in inspect.signature(kind).parameters.items():
        if name in annotations and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            try:
                msgspec.json.Decoder(annotations[name])
            except TypeError:  # a tensor, a module
                continue
            checkable[name] = annotations[name]
    return checkable
