"""Large bodies: counted before anything is built, read as small ones are, one at a time and beside the event loop."""

import asyncio
import gc
import json
import threading
import time
import tracemalloc

import httpx
import msgspec
import numpy as np
import pytest
import torch

from vbdl.serve import Limits, Model, app, counted, serving
from vbdl.serve.bodies import Bodies
from vbdl.serve.limits import Refused

MIB = 2**20
CAP = 8 * MIB
ROW = {"age": 40, "income": 70.5, "city": "a:b", "member": True, "day": "2026-01-05"}
JSON = "application/json"


@pytest.fixture(scope="module")
def readers(arrays_model, named_model, table_model, two):
    return {
        "arrays": Model(arrays_model, compile=False).bodies,
        "named": Model(named_model, compile=False, module=two()).bodies,
        "table": Model(table_model, compile=False).bodies,
    }


def _wide(width):
    """A model of rows of this width, where the number of values alone refuses nothing."""
    from vbdl.artifact.manifest import InputEntry, Inputs

    entry = InputEntry(name=None, shape=[width], dtype="F32")
    return Bodies(None, Inputs(layout="tensor", tensors=[entry]))


def _filled(pattern, before, after):
    return before + b",".join([pattern] * ((CAP - len(before) - len(after)) // (len(pattern) + 1))) + after


HOSTILE = {
    "empty lists": ("arrays", _filled(b"[]", b'{"inputs":[', b"]}"), 413),
    "empty lists of a wide model": ("wide", _filled(b"[]", b'{"inputs":[', b"]}"), 413),
    "numbers": ("arrays", _filled(b"1", b'{"inputs":[', b"]}"), 413),
    "numbers of a wide model": ("wide", _filled(b"1", b'{"inputs":[', b"]}"), 422),
    "one row of numbers": ("wide", _filled(b"1", b'{"inputs":[[', b"]]}"), 422),
    "objects": ("arrays", _filled(b"{}", b'{"inputs":[', b"]}"), 413),
    "text": ("arrays", _filled(b'""', b'{"inputs":[', b"]}"), 413),
    "keys": ("arrays", _filled(b'"a":1', b'{"inputs":{', b"}}"), 422),
    "names": ("named", b'{"inputs":{' + b",".join(b'"%d":1' % k for k in range(700_000)) + b"}}", 422),
    "nested": ("arrays", b'{"inputs":' + b"[" * 5_000_000, 400),
    "rows": ("table", _filled(b"{}", b'{"rows":[', b"]}"), 413),
    "cells that are no rows": ("table", _filled(b"1", b'{"rows":[', b"]}"), 422),
    "lists for rows": ("table", _filled(b"[]", b'{"rows":[', b"]}"), 422),
    "one row of many cells": ("table", b'{"rows":[{' + b",".join(b'"%d":1' % k for k in range(700_000)) + b"}]}", 422),
    "one cell": ("table", b'{"rows":[{"city":"' + b"a" * (CAP - 2000) + '\U0001f600"}]}'.encode(), 422),
    "lists in a cell": ("table", _filled(b"[]", b'{"rows":[{"age":[', b"]}]}"), 422),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_body_costs_at_most_five_times_its_cap_and_builds_next_to_nothing(kind, readers):
    model, body, status = HOSTILE[kind]
    assert len(body) > 4 * MIB
    reader = {**readers, "wide": _wide(4096)}[model]
    gc.collect()
    tracemalloc.start()
    try:
        with pytest.raises(Refused) as refused:
            reader.read(JSON, body, 4096)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert refused.value.status == status, refused.value.message
    assert len(body) + peak <= 5 * CAP, peak / MIB
    assert "\n" not in refused.value.message and len(refused.value.message) < 600


def test_a_good_body_of_the_largest_size_costs_at_most_five_times_its_cap():
    rows = 4096
    reader = _wide(1000)
    body = b'{"inputs":[' + b",".join([b"[" + b",".join([b"1"] * 1000) + b"]"] * rows) + b"]}"
    tracemalloc.start()
    try:
        inputs, count, _ = reader.read(JSON, body, rows)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == rows and torch.equal(inputs, torch.ones(rows, 1000))
    assert len(body) > 7 * MIB and len(body) + peak <= 5 * CAP, peak / MIB


def test_no_piece_of_a_large_body_is_built_at_once(monkeypatch):
    """What a hostile structure has built when it is refused: nothing; and a good one is built in small pieces."""
    built = []
    decode = msgspec.json.decode

    def noting(raw, *, type):
        found = decode(raw, type=type)
        built.append(len(found))
        return found

    reader = _wide(1000)
    monkeypatch.setattr(msgspec.json, "decode", noting)
    with pytest.raises(Refused):
        reader.read(JSON, HOSTILE["empty lists"][1], 4096)
    assert not built
    good = b'{"inputs":[' + b",".join([b"[" + b",".join([b"1"] * 1000) + b"]"] * 500) + b"]}"
    assert reader.read(JSON, good, 4096)[1] == 500
    assert sum(built) == 500_000 and max(built) <= counted.PIECE


def _found(reader, body):
    try:
        inputs, rows, notes = reader.read(JSON, body, 4096)
        return rows, notes, [t.tolist() for t in (inputs.values() if isinstance(inputs, dict) else [inputs])]
    except Refused as error:
        return error.status


def _cases(model, generator):
    """Good and bad bodies as JSON has them, spaces and exponents and escapes among them."""
    number = lambda: generator.choice(["1", "-2.5", "1e3", "0.1", "-0.0", "123456789.123456789", "1E-30", "1e30"])
    space = lambda: generator.choice(["", "", " ", "\n\t"])
    rows = int(generator.integers(1, 6))
    if model == "arrays":
        row = lambda: "[" + ",".join(space() + number() + space() for _ in range(4)) + "]"
        text = "[" + ("," + space()).join(row() for _ in range(rows)) + "]"
        text = '{"inputs":' + space() + text + space() + "}"
    elif model == "named":
        numbers = "[" + ",".join(f"[{number()},{number()}]" for _ in range(rows)) + "]"
        code = "[" + ",".join(str(generator.integers(0, 5)) for _ in range(rows)) + "]"
        text = f'{{"inputs":{{"numbers":{numbers}, "code":{code}}}}}'
    else:
        city = lambda: generator.choice(['"Porto"', '"a:b"', r'"\"{:,["', r'"\\"', '"é"', "null", '"Faro\\u003a"'])
        row = lambda: f'{{"age": 4, "income": 7{space()}, "city": {city()}, "member": true, "day": "2026-01-05"}}'
        text = '{"rows": [' + ("," + space()).join(row() for _ in range(rows)) + "]}"
    if generator.random() < 0.6:  # changed somewhere
        at = int(generator.integers(0, len(text)))
        new = generator.choice(["", "[", "]", ",", "{", "}", '"', ":", "\\", "1", "null", "true", "NaN", "[]", " "])
        text = text[:at] + str(new) + text[at + int(generator.integers(0, 3)) :]
    return text.encode()


@pytest.mark.parametrize("model", ["arrays", "named", "table"])
def test_a_body_is_read_the_same_whether_it_is_large_or_small(model, readers, monkeypatch):
    generator = np.random.default_rng(0)
    good = 0
    for _ in range(400):
        body = _cases(model, generator)
        small = _found(readers[model], body)
        with monkeypatch.context() as patch:
            patch.setattr("vbdl.serve.bodies.LARGE", 0)
            patch.setattr("vbdl.serve.counted.PIECE", 6)
            patch.setattr("vbdl.serve.counted.ROWS", 2)
            patch.setattr("vbdl.serve.counted._BLOCK", 7)
            large = _found(readers[model], body)
        good += not isinstance(small, int)
        # a duplicate key may be refused as bad JSON or as too many keys
        assert small == large or {small, large} <= {400, 413, 422}, (body, small, large)
    assert good > 100


@pytest.mark.parametrize(
    "model, body, name",
    [
        ("arrays", b'{"inputs": [[1,2,3,4]], "inputs": [[1,2,3,5]]}', "inputs"),
        ("arrays", b'{"inputs": [[1,2,3,4]], "\\u0069nputs": [[1,2,3,5]]}', "inputs"),
        ("named", b'{"inputs": {"numbers": [[1,2]], "code": [1], "code": [2]}}', "code"),
        ("table", b'{"rows": [{"age":1,"age":2,"income":1,"city":"a:b","member":true,"day":null}]}', "age"),
        ("table", b'{"rows": [{"age":1,"income":1,"city":"a:","member":true,"day":null}], "rows": []}', ""),
        ("table", b'{"rows": [%s], "rows": [%s]}' % ((json.dumps(ROW).encode(),) * 2), "rows"),
        ("table", b'{"rows": [{"age":1,"income":1,"city":"\\"a:","member":true,"day":null,"day":null}]}', "day"),
    ],
)
def test_a_key_given_twice_is_refused(model, body, name, readers, monkeypatch):
    for large in (False, True):
        if large:
            monkeypatch.setattr("vbdl.serve.bodies.LARGE", 0)
        with pytest.raises(Refused) as refused:
            readers[model].read(JSON, body, 4096)
        assert refused.value.status in (400, 422)
        assert large or name in refused.value.message


def test_colons_in_cells_are_no_keys(readers):
    row = {"age": 40, "income": 70.5, "city": 'a:b\\:"::{', "member": True, "day": "2026-01-05"}
    for rows in ([row], [row] * 2000):  # small and large
        assert readers["table"].read(JSON, json.dumps({"rows": rows}).encode(), 4096)[1] == len(rows)


def test_large_bodies_are_read_one_at_a_time_beside_the_loop_without_the_collector(arrays_model):
    model = Model(arrays_model, compile=False)
    read, seen, inside, most = model.bodies.read, [], [0], [0]

    def noting(media, body, rows):
        seen.append((len(body), threading.current_thread() is threading.main_thread(), gc.isenabled()))
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.02 if len(body) > counted.LARGE else 0.0)
        inside[0] -= 1
        return read(media, body, rows)

    model.bodies.read = noting
    service = app(model, Limits(queue_rows=4 * 3000 + 1))  # all may be read before any is computed

    async def crowd():
        async with service.router.lifespan_context(service):
            transport = httpx.ASGITransport(app=service)
            async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
                while (await client.get("/ready")).status_code != 200:
                    await asyncio.sleep(0.02)
                large = json.dumps({"inputs": [[0.123456789] * 4] * 3000}).encode()
                post = lambda content: client.post("/v1/predict", content=content, headers={"Content-Type": JSON})
                answers = await asyncio.gather(*(post(large) for _ in range(4)))
                assert [a.status_code for a in answers] == [200] * 4
                assert (await post(b'{"inputs": [[1,2,3,4]]}')).status_code == 200
                # while one is read, the next may be too late
                first = asyncio.create_task(post(large))
                late = await client.post(
                    "/v1/predict", content=large, headers={"Content-Type": JSON, "X-Deadline-Ms": "10"}
                )
                assert late.status_code == 504
                assert (await first).status_code == 200

    asyncio.run(crowd())
    assert most[0] == 1 and gc.isenabled()
    for size, main, collecting in seen:
        assert (main, collecting) == ((False, False) if size > counted.LARGE else (True, True))
    assert serving.LARGE == counted.LARGE
