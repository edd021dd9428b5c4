"""Arrow IPC streams in requests: sizes are checked before anything is unpacked, and offsets before they are used."""

import struct
from typing import TYPE_CHECKING

import numpy as np

from vbdl.serve.limits import Refused
from vbdl.tabular.reading import compute

if TYPE_CHECKING:
    import pyarrow

_VIEWS = ("string_view", "binary_view")
UNPACKED = 32 * 2**20  # largest size in bytes of shared values after they are copied to each row


def read(body: bytes, max_rows: int) -> "pyarrow.Table":
    """Read a stream as a table. Raises Refused if it is damaged, compressed, or has too many rows."""
    import pyarrow as pa

    try:
        for message in pa.ipc.MessageReader.open_stream(pa.BufferReader(body)):
            if message.type in ("record batch", "dictionary"):
                rows, compressed = _header(message.metadata.to_pybytes(), message.type == "dictionary")
                if compressed:
                    # a few compressed bytes could unpack to gigabytes
                    raise Refused(
                        415, "compressed", "compressed Arrow buffers are not taken: write without compression"
                    )
                # a dictionary may be no longer than the rows allowed
                if rows > max_rows:
                    raise Refused(413, "too_many_rows", f"{rows} rows in a batch, at most {max_rows} are taken")
        with pa.ipc.open_stream(pa.BufferReader(body)) as reader:
            table = reader.read_all()
        if table.num_rows <= max_rows:
            table.validate()
            for name, column in zip(table.column_names, table.columns, strict=True):
                if (longest := max(map(_longest, column.chunks), default=0)) * len(column) > UNPACKED:
                    message = f"column {name[:60]!r} shares a value of {longest} bytes, which could unpack to gigabytes"
                    raise Refused(413, "too_large", message)
            table.validate(full=True)
    except Refused:
        raise
    except Exception as error:  # damaged bytes make Arrow raise errors of many kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise Refused(400, "bad_arrow", f"the body is no Arrow IPC stream: {reason[:200]}") from None
    if table.num_rows > max_rows:
        raise Refused(413, "too_many_rows", f"{table.num_rows} rows, at most {max_rows} are taken")
    return table


def write(columns: "dict[str, pyarrow.Array]") -> bytes:
    """Write Arrow arrays by name as an IPC stream."""
    import pyarrow as pa

    table = pa.table(columns)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _longest(array: "pyarrow.Array") -> int:
    """The bytes of the longest value that several rows of an array may share; 0 if each row has its own."""
    import pyarrow as pa

    kind = array.type
    if pa.types.is_dictionary(kind):
        return _bytes(array.dictionary)
    if pa.types.is_run_end_encoded(kind):
        return _bytes(array.values)
    if str(kind) in _VIEWS:
        place = 16 * array.offset  # each starts with an int32 length
        return int(np.frombuffer(array.buffers()[1], "<i4")[place // 4 :: 4][: len(array)].max(initial=0))
    if pa.types.is_nested(kind):
        return UNPACKED + 1 if "view" in str(kind) else 0
    return 0


def _bytes(array: "pyarrow.Array") -> int:
    """The bytes of the longest value of an array."""
    import pyarrow as pa

    kind = array.type
    if any(test(kind) for test in (pa.types.is_binary, pa.types.is_string)) or str(kind).startswith("large_"):
        return compute().max(compute().binary_length(array)).as_py() or 0
    # of a fixed width, or shared themselves; one value of a nested array may hold all inner values
    return max(_longest(array), array.nbytes if pa.types.is_nested(kind) else 0)


def _header(metadata: bytes, dictionary: bool) -> tuple[int, bool]:
    """(rows, whether buffers are compressed), read from the flatbuffer of a message (format/Message.fbs of Arrow)."""
    message = struct.unpack_from("<I", metadata, 0)[0]
    batch = _field(metadata, message, 2)
    if batch is None:
        raise ValueError("a message has no header")
    batch = batch + struct.unpack_from("<I", metadata, batch)[0]
    if dictionary:
        data = _field(metadata, batch, 1)
        if data is None:
            raise ValueError("a dictionary has no data")
        batch = data + struct.unpack_from("<I", metadata, data)[0]
    length = _field(metadata, batch, 0)
    rows = 0 if length is None else struct.unpack_from("<q", metadata, length)[0]
    return rows, _field(metadata, batch, 3) is not None


def _field(data: bytes, table: int, number: int) -> int | None:
    """The byte offset of a field in a table of a flatbuffer, or None if the field is not set."""
    vtable = table - struct.unpack_from("<i", data, table)[0]
    size = struct.unpack_from("<H", data, vtable)[0]
    place = 4 + 2 * number
    if vtable < 0 or place + 2 > size:
        return None
    offset = struct.unpack_from("<H", data, vtable + place)[0]
    return table + offset if offset else None
