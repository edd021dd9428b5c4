"""Damaged tables are a line that names the file, for `vbdl fit` and `evaluate` as for `predict`."""

import random
import struct

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from vbdl.tabular.reading import read_table

TABLE = pa.table({"id": [f"name {i}" for i in range(200)], "x": [i / 7 for i in range(200)], "y": list(range(200))})


def write(path):
    if path.name.endswith(".parquet"):
        pa.parquet.write_table(TABLE, path)
    elif path.name.endswith(".csv"):
        pa.csv.write_csv(TABLE, path)
    elif path.name.endswith(".csv.gz"):
        with pa.CompressedOutputStream(str(path), "gzip") as sink:
            pa.csv.write_csv(TABLE, sink)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, TABLE.schema) as writer:
            writer.write_table(TABLE)


def damaged(data, at):
    data, place = bytearray(data), at.randrange(len(data))
    kind = at.randrange(4)
    if kind == 0:
        for _ in range(at.randrange(1, 9)):
            data[at.randrange(len(data))] = at.randrange(256)
    elif kind == 1:
        del data[place:]
    elif kind == 2:
        del data[place : place + at.randrange(1, 100)]
    else:
        data[place:place] = at.randbytes(at.randrange(1, 100))
    return bytes(data)


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz", "t.parquet", "t.arrow"])
def test_a_damaged_file_is_a_line_or_a_table(name, tmp_path):
    write(tmp_path / name)
    whole, at, refused = (tmp_path / name).read_bytes(), random.Random(f"{name} 1"), 0
    for _ in range(150):
        (tmp_path / name).write_bytes(damaged(whole, at))
        try:
            table = read_table(tmp_path / name)
        except ValueError as error:
            refused += 1
            assert name in str(error) and "\n" not in str(error), error
        else:
            table.validate(full=True)
    assert refused > 0


def test_cells_outside_of_the_file_are_not_read(tmp_path):
    offsets = pa.py_buffer(struct.pack("<3i", 0, 2**30, 3))
    text = pa.StringArray.from_buffers(2, offsets, pa.py_buffer(b"abc"))
    batch = pa.RecordBatch.from_arrays([text, pa.array([1.0, 2.0])], ["id", "x"])
    with pa.OSFile(str(tmp_path / "t.arrow"), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    with pytest.raises(ValueError, match="t.arrow cannot be read as ipc"):
        read_table(tmp_path / "t.arrow")
