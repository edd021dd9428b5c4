"""Bodies that nobody thought of, from a seed: every parser reads or refuses them, in one line, with the reason.

VBDL_FUZZ: how many times as many as by default.
"""

import io
import json
import os
import struct

import numpy as np
import pyarrow as pa
import pytest

from vbdl.serve import Model
from vbdl.serve.app import ARROW
from vbdl.serve.limits import Refused

JSON, NPY = "application/json", "application/x-npy"
BUDGET = 500 * int(os.environ.get("VBDL_FUZZ", "1"))  # inputs of one parser of one model
ROW = {"age": 40, "income": 70.5, "city": "Porto", "member": True, "day": "2026-01-05"}


@pytest.fixture(scope="module")
def readers(arrays_model, named_model, table_model, two):
    return {
        "arrays": Model(arrays_model, compile=False).bodies,
        "named": Model(named_model, compile=False, module=two()).bodies,
        "table": Model(table_model, compile=False).bodies,
    }


@pytest.fixture(autouse=True)
def foreseen(monkeypatch):
    """Whatever a parser raises is answered; here it is to be seen what was not thought of."""

    def unforeseen(error):
        raise AssertionError(f"not foreseen: {error!r}") from error

    monkeypatch.setattr("vbdl.serve.bodies._unforeseen", unforeseen)


def _arrow(table, **options):
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _npy(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def _header(text, payload=b"", version=1):
    text = text.encode("latin-1")
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", len(text)) + text + payload


NUMBERS = [b"0", b"-1", b"True", b"1e9", b"9" * 30, b"-0", b"2**9", b"None", b"1.5", b"0x7fffffffffffffff", b"1" * 5000]
LARGE = [0, 1, 2**31 - 1, 2**62, 2**64 - 1]
TOKENS = [b"[", b"]", b"{", b"}", b"(", b")", b",", b":", b'"', b"'", b"\\", b"\x00", b"\xff", b"null", b"NaN", b"\n"]


def _mutated(seed, generator):
    """A body changed in a few places: bits, cuts, repeats, numbers, brackets."""
    body = bytearray(seed)
    for _ in range(int(generator.integers(1, 5))):
        at = int(generator.integers(0, len(body) + 1))
        kind = int(generator.integers(0, 7))
        if kind == 0 and body:
            body[at % len(body)] = int(generator.integers(0, 256))
        elif kind == 1:
            del body[at : at + int(generator.integers(1, 30))]
        elif kind == 2:
            body[at:at] = body[at : at + int(generator.integers(1, 60))]
        elif kind == 3:
            body[at:at] = TOKENS[int(generator.integers(0, len(TOKENS)))] * int(generator.choice([1, 2, 1000]))
        elif kind == 4:
            digits = [k for k in range(len(body)) if 48 <= body[k] <= 57]
            if digits:
                at = digits[int(generator.integers(0, len(digits)))]
                body[at : at + 1] = NUMBERS[int(generator.integers(0, len(NUMBERS)))]
        elif kind == 5 and len(body) > 8:
            at = int(generator.integers(0, len(body) - 8))
            size = int(generator.choice([1, 2, 4, 8]))
            body[at : at + size] = LARGE[int(generator.integers(0, len(LARGE)))].to_bytes(8, "little")[:size]
        else:
            del body[at:]
    return bytes(body)


def _tables(model):
    if model == "arrays":
        plain = pa.table({f"c{k}": [1.0, 2.0] for k in range(4)})
        ints = pa.table({f"c{k}": pa.array([1, 2], pa.int8()) for k in range(4)})
        return [plain, ints, plain.set_column(0, "c0", pa.array([1.0, 1.0]).dictionary_encode())]
    plain = pa.table({name: [value] * 3 for name, value in ROW.items()})
    city = pa.array(["Porto", "a", "Porto"])
    runs = pa.RunEndEncodedArray.from_arrays(pa.array([1, 3], pa.int32()), pa.array(["Porto", "b"]))
    kinds = [city.dictionary_encode(), runs, city.cast(pa.string_view()), pa.array([[1], [2], []]), pa.nulls(3)]
    kinds += [pa.array([b"a", b"\xff", None]), pa.array([{"a": 1}] * 3), pa.array([1, 2, 3], pa.decimal128(5, 2))]
    at = plain.column_names.index("city")
    return [plain, *(plain.set_column(at, "city", kind) for kind in kinds)]


def _seeds(model, media):
    if media == ARROW:
        return [_arrow(table) for table in _tables(model)]
    if media == NPY:
        return [_npy(np.zeros((2, 4), kind)) for kind in ("f4", ">f8", "i1", "?", "u2", "c8", "U2", "M8[s]")]
    if model == "arrays":
        return [json.dumps({"inputs": [[1.5, -2, 3e5, 0], [1, 2, 3, 4]]}).encode()]
    if model == "named":
        return [json.dumps({"inputs": {"numbers": [[0.5, -1.0], [2.0, 3.0]], "code": [4, 0]}}).encode()]
    return [json.dumps({"rows": [ROW, {**ROW, "city": 'a:"\\é'}, {**ROW, "age": None}]}).encode()]


def _ended(reader, media, body):
    """The status of a body; what is refused says why, in one line."""
    try:
        return 200 if reader.read(media, body, 4096)[1] > 0 else 0
    except Refused as error:
        assert error.status in (400, 413, 415, 422), (error.status, error.message)
        assert error.message and "\n" not in error.message and len(error.message) <= 500, error.message
        assert "Traceback" not in error.message and ".py" not in error.message, error.message
        return error.status


@pytest.mark.parametrize(
    "model, media",
    [(m, JSON) for m in ("arrays", "named", "table")] + [("arrays", NPY), ("arrays", ARROW), ("table", ARROW)],
)
def test_any_body_is_read_or_refused(model, media, readers):
    generator = np.random.default_rng([len(model), len(media)])
    seeds, seen = _seeds(model, media), {}
    for seed in seeds:
        assert _ended(readers[model], media, seed) in (200, 422) or b"M8" in seed
    for k in range(BUDGET):
        body = _mutated(seeds[k % len(seeds)], generator)
        status = _ended(readers[model], media, body)
        seen[status] = seen.get(status, 0) + 1
    assert seen.get(400, 0) > BUDGET // 20 and sum(seen.values()) == BUDGET, seen


HEADERS = {
    "a good one": ("{'descr': '<f4', 'fortran_order': False, 'shape': (1, 4), }", 200),
    "in another order": ('{"shape": (1,4), "descr": "<f4", "fortran_order": False}', 200),
    "negative": ("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, -4), }", 400),
    "boolean": ("{'descr': '<f4', 'fortran_order': False, 'shape': (True, 4), }", 400),
    "huge": (f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({2**62}, 4), }}", 400),
    "huge and none": (f"{{'descr': '<f4', 'fortran_order': False, 'shape': (0, {10**17}), }}", 400),
    "beyond integers": ("{'descr': '<f4', 'fortran_order': False, 'shape': (%s, 4), }" % ("9" * 5000), 400),
    "none of huge rows": (f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({10**17}, 0), }}", 400),
    "a thousand axes": ("{'descr': '<f4', 'fortran_order': False, 'shape': (%s), }" % ("1," * 1000), 400),
    "four and a thousand axes": ("{'descr': '<f4', 'fortran_order': False, 'shape': (4, %s), }" % ("1," * 1000), 422),
    "brackets": ("{'descr': '<f4', 'fortran_order': False, 'shape': " + "(" * 5000, 400),
    "lists": ("{'descr': '<f4', 'fortran_order': False, 'shape': " + "[" * 200 + "]" * 200 + "}", 400),
    "braces": ("{" * 3000, 400),
    "nothing": ("", 400),
    "text": ("{'descr': '<f4", 400),
    "an order that is none": ("{'descr': '<f4', 'fortran_order': 1, 'shape': (1, 4), }", 400),
    "a key twice": ("{'descr': '<f4', 'descr': '<f4', 'fortran_order': False, 'shape': (1, 4), }", 400),
    "a call": ("{'descr': __import__('os'), 'fortran_order': False, 'shape': (1, 4), }", 400),
    "fields": ("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (4,), }", 400),
    "objects": ("{'descr': '|O', 'fortran_order': False, 'shape': (2, ), }", 400),
    "a dtype of no size": ("{'descr': '<f0', 'fortran_order': False, 'shape': (1, 4), }", 422),
    "a dtype that is none": ("{'descr': '<z9999', 'fortran_order': False, 'shape': (1, 4), }", 422),
    "no number": ("{'descr': '<f4', 'fortran_order': False, 'shape': (), }", 400),
}


@pytest.mark.parametrize("kind", HEADERS)
@pytest.mark.parametrize("version", [1, 2])
def test_a_header_of_an_array(kind, version, readers):
    text, status = HEADERS[kind]
    payload = np.ones((1, 4), "<f4").tobytes()
    found = _ended(readers["arrays"], NPY, _header(text, payload, version))
    assert found == status or (kind == "objects" and found == 422)
    if "none" in kind or "thousand" in kind:
        assert _ended(readers["arrays"], NPY, _header(text, b"", version)) in (400, 413, 422)


def test_what_nobody_thought_of_is_refused_and_logged_in_a_line(readers, monkeypatch, caplog):
    monkeypatch.undo()
    monkeypatch.setattr("vbdl.serve.arrow.read", lambda body, rows: {}[f"{rows}\nsecond line"])
    with pytest.raises(Refused) as refused:
        readers["table"].read(ARROW, b"", 7)
    assert refused.value.status == 400 and "\n" not in refused.value.message
    [record] = caplog.records
    assert record.exc_info is None and "\n" not in record.getMessage()


@pytest.mark.parametrize("kind", ["dictionary", "runs", "views"])
def test_a_value_that_rows_share_is_not_unpacked_for_each_of_them(kind, readers):
    """Four MiB that stand for sixteen GiB."""
    n, large = 4096, "x" * 2**22
    if kind == "dictionary":
        city = pa.DictionaryArray.from_arrays(pa.array(np.zeros(n, "i4")), pa.array([large]))
    elif kind == "runs":
        city = pa.RunEndEncodedArray.from_arrays(pa.array([n], pa.int32()), pa.array([large]))
    else:
        views = np.array([len(large), 0x78787878, 0, 0], "<i4").tobytes() * n
        city = pa.StringViewArray.from_buffers(
            pa.string_view(), n, [None, pa.py_buffer(views), pa.py_buffer(large.encode())]
        )
    table = pa.table({name: [value] * n if name != "city" else city for name, value in ROW.items()})
    before = pa.default_memory_pool().max_memory()
    with pytest.raises(Refused) as refused:
        readers["table"].read(ARROW, _arrow(table), n)
    assert refused.value.status == 413 and "shares a value" in refused.value.message
    assert pa.default_memory_pool().max_memory() - before < 40 * 2**20
    short = table.set_column(2, "city", pa.array(["Porto"] * n).dictionary_encode())
    assert readers["table"].read(ARROW, _arrow(short), n)[1] == n
