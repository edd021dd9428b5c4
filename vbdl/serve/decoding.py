"""Decoding of JSON in the body of a request, which is refused with the reason if it is malformed."""

from typing import TypeVar

import msgspec

from vbdl.serve.limits import Refused

T = TypeVar("T")


def decode(raw: msgspec.Raw | bytes, kind: "type[T] | msgspec.json.Decoder[T]", name: str = "") -> T:
    """Decode JSON to this type. Raises Refused, with `name` before the reason, for JSON of another type.

    kind: the type, or a decoder of it, which is faster.
    """
    try:
        return kind.decode(raw) if isinstance(kind, msgspec.json.Decoder) else msgspec.json.decode(raw, type=kind)
    except msgspec.ValidationError as error:
        raise Refused(422, "bad_body", f"{name}{error}") from None
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise Refused(400, "bad_json", f"the body is not JSON: {error}") from None


def check_rows(rows: int, max_rows: int) -> None:
    if rows == 0:
        raise Refused(422, "no_rows", "there are no rows to predict")
    if rows > max_rows:
        raise Refused(413, "too_many_rows", f"{rows} rows, at most {max_rows} are taken")
