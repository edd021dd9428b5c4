"""The service in one process: what it takes, what it refuses and how, and that answers are the predictor's."""

import asyncio
import dataclasses
import gzip
import io
import json
import re
import threading
import time

import httpx
import numpy as np
import pyarrow as pa
import pytest
import torch
from starlette.testclient import TestClient

import vbdl
from vbdl.serve import Limits, Model, app
from vbdl.serve.app import ARROW, LOOPBACK

NPY = "application/x-npy"


def _ready(client):
    for _ in range(300):
        if client.get("/ready").status_code == 200:
            return client
        time.sleep(0.02)
    raise AssertionError("never ready")


def _arrow(table, **options):
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _npy(array, **options):
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


def _post(client, content, media="application/json", **headers):
    return client.post("/v1/predict", content=content, headers={"Content-Type": media, **headers})


@pytest.fixture(scope="module")
def arrays(arrays_model):
    with TestClient(app(Model(arrays_model))) as client:
        yield _ready(client)


@pytest.fixture(scope="module")
def table(table_model):
    with TestClient(app(Model(table_model))) as client:
        yield _ready(client)


# -- answers


def test_answers_are_the_predictors_in_every_format(arrays, arrays_model):
    x = torch.randn(70, 4, generator=torch.Generator().manual_seed(1))
    expected = vbdl.load(arrays_model)(x)
    as_table = pa.table({f"c{k}": x[:, k].numpy() for k in range(4)})
    bodies = [
        (json.dumps({"inputs": x.tolist()}), "application/json; charset=utf-8"),
        (_npy(x.numpy()), NPY),
        (_npy(np.asfortranarray(x.double().numpy())), NPY),
        (_arrow(as_table), ARROW),
    ]
    for content, media in bodies:
        found = _post(arrays, content, media)
        assert found.status_code == 200 and found.headers["content-type"] == "application/json"
        rows = found.json()["predictions"]
        assert torch.equal(torch.tensor([r["probs"] for r in rows]), expected.probs)
        for name in ("total", "aleatoric", "epistemic"):
            assert torch.equal(torch.tensor([r[name] for r in rows]), getattr(expected, name))
        assert [r["action"] for r in rows] == expected.action.tolist()
        assert [r["label"] for r in rows] == expected.label.tolist()
    assert 0 < sum(r["action"] == -1 for r in rows) < 70


def test_an_answer_as_arrow(table):
    row = {"age": 40, "income": 70.5, "city": "Porto", "member": True, "day": "2026-01-05"}
    as_json = table.post("/v1/predict", json={"rows": [row] * 3}).json()["predictions"]
    found = table.post("/v1/predict", json={"rows": [row] * 3}, headers={"Accept": ARROW})
    assert found.headers["content-type"] == ARROW
    columns = pa.ipc.open_stream(found.content).read_all()
    assert columns["prediction"].to_pylist() == [r["label"] for r in as_json]
    assert columns["probability_good"].to_pylist() == [r["probs"][1] for r in as_json]
    assert columns["epistemic"].to_pylist() == [r["epistemic"] for r in as_json]


def test_several_inputs_by_name(named_model, two):
    with pytest.raises(ValueError, match="module"):
        Model(named_model)
    model = Model(named_model, module=two())
    with TestClient(app(model)) as client:
        _ready(client)
        x = {"numbers": [[0.5, -1.0], [2.0, 3.0]], "code": [4, 0]}
        found = client.post("/v1/predict", json={"inputs": x}).json()["predictions"]
        inputs = {"numbers": torch.tensor(x["numbers"]), "code": torch.tensor(x["code"])}
        expected = model.predictor(inputs)
        assert torch.equal(torch.tensor([r["mean"] for r in found]), expected.mean.squeeze(1))
        for bad, said in (
            ({"numbers": x["numbers"]}, "inputs are"),
            ({**x, "code": [4]}, "different numbers of rows"),
            ({**x, "code": [4, 1.5]}, "Expected `int`"),
            ({**x, "code": [4, 2**70]}, "too large|int64|out of range"),
            ({**x, "code": [4, 99]}, ""),  # beyond the embedding: the network says so
        ):
            answer = client.post("/v1/predict", json={"inputs": bad})
            assert answer.status_code == 422, (bad, answer.text)
            assert any(word in answer.json()["error"]["message"] for word in said.split("|"))
        assert _post(client, _npy(np.zeros((1, 2))), NPY).status_code == 415


def test_a_row_is_the_same_alone_in_a_batch_and_in_a_crowd(arrays):
    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(2)).tolist()
    together = arrays.post("/v1/predict", json={"inputs": x}).json()["predictions"]
    alone = [arrays.post("/v1/predict", json={"inputs": [row]}).json()["predictions"][0] for row in x[:20]]
    assert alone == together[:20]


def test_requests_are_computed_together_and_answered_apart(arrays_model):
    model = Model(arrays_model)
    service = app(model, Limits(batch_wait=10, batch_rows=48))  # together as soon as all are there
    x = torch.randn(48, 4, generator=torch.Generator().manual_seed(3))

    async def crowd():
        async with service.router.lifespan_context(service):
            transport = httpx.ASGITransport(app=service)
            async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
                while (await client.get("/ready")).status_code != 200:
                    await asyncio.sleep(0.02)
                ask = lambda k: client.post("/v1/predict", json={"inputs": x[k : k + 3].tolist()})
                answers = await asyncio.gather(*(ask(k) for k in range(0, 48, 3)))
                return [r for a in answers for r in a.json()["predictions"]], (await client.get("/metrics")).text

    found, metrics = asyncio.run(crowd())
    assert torch.equal(torch.tensor([r["probs"] for r in found]), model.predictor(x).probs)
    batches = next(line for line in metrics.splitlines() if line.startswith("vbdl_batch_rows_count"))
    assert int(batches.split()[-1]) <= 3  # sixteen requests, computed in a few calls


# -- refusals


def test_what_is_malformed_is_refused_with_the_reason(arrays):
    row = [1, 2, 3, 4]
    for content, status, said in (
        (b"", 400, "not JSON"),
        (b'{"inputs": [[1, 2', 400, "not JSON"),
        (b'{"inputs": [[1,2,3,NaN]]}', 400, "not JSON"),
        (b'{"inputs": [[1,2,3,1e999]]}', 422, "out of range"),
        (b'{"inputs": [[1,2,3,1e38]]}', 422, "beyond 1e+30"),
        (b'{"inputs": [[1,2,3,true]]}', 422, "bool"),
        (b'{"inputs": [[1,2,3,"4"]]}', 422, "str"),
        (b'{"inputs": [[1,2,3,null]]}', 422, "null"),
        (b'{"inputs": [[1,2,3]]}', 422, "shape [4], got [3]"),
        (b'{"inputs": [[1,2,3,4],[1]]}', 422, "ragged"),
        (b'{"inputs": [[[1,2,3,4]]]}', 422, "Expected `float`"),
        (b'{"inputs": [1,2,3,4]}', 422, "Expected `array`"),
        (b'{"inputs": []}', 422, "no rows"),
        (b'{"inputs": {}}', 422, "Expected `array`"),
        (b'{"rows": [{"a": 1}]}', 422, "unknown field"),
        (b"[]", 422, "Expected `object`"),
        (b'{"inputs": ' + b"[" * 100_000, 400, "recursion"),
        (b'{"inputs": [[1,2,3,"\xff"]]}', 422, "str"),
        (b'\xff{"inputs": [[1,2,3,4]]}', 400, "not JSON"),
        (json.dumps({"inputs": [row] * 5000}).encode(), 413, "at most 4096"),
        (b" " * (9 * 2**20), 413, "bytes"),
    ):
        begun = time.process_time()
        found = _post(arrays, content)
        assert found.status_code == status and said in found.json()["error"]["message"], (content[:60], found.text)
        assert time.process_time() - begun < 0.5
    assert _post(arrays, b"x", "text/plain").status_code == 415
    assert _post(arrays, gzip.compress(b"{}"), **{"Content-Encoding": "gzip"}).status_code == 415
    for deadline in ("0", "-1", "soon", "1e3", "９"):
        headers = {"X-Deadline-Ms": deadline.encode()}
        assert _post(arrays, json.dumps({"inputs": [row]}), **headers).status_code == 422


def test_what_is_malformed_in_arrays_and_tables(arrays, table):
    good = _npy(np.zeros((2, 4), np.float32))
    objects = _npy(np.array([{}, {}], dtype=object), allow_pickle=True)
    for content, status in (
        (good[:-1], 400),
        (good + b"0", 400),
        (b"\x93NUMPY", 400),
        (good.replace(b"(2, 4)", b"(9, 4)"), 400),
        (good.replace(b"(2, 4)", b"(2, 3)"), 400),
        (objects, 422),
        (_npy(np.zeros(4)), 422),
        (_npy(np.zeros((0, 4))), 422),
        (_npy(np.full((1, 4), np.nan)), 422),
        (_npy(np.zeros((1, 4), "U3")), 422),
        (_npy(np.zeros((5000, 4), "f2")), 413),
    ):
        assert _post(arrays, content, NPY).status_code == status
    numbers = pa.table({f"c{k}": [1.0, 2.0] for k in range(4)})
    for content, status in (
        (b"no arrow", 400),
        (_arrow(numbers)[:-30], 400),
        (_arrow(numbers, compression="zstd"), 415),
        (_arrow(numbers.select(["c0"])), 422),
        (_arrow(pa.table({f"c{k}": ["a"] for k in range(4)})), 422),
        (_arrow(numbers.slice(0, 0)), 422),
        (_arrow(pa.table({f"c{k}": np.zeros(5000) for k in range(4)})), 413),
        (_arrow(numbers.set_column(0, "c0", pa.array([None, 1.0]))), 422),
    ):
        assert _post(arrays, content, ARROW).status_code == status, status
    assert _post(table, good, NPY).status_code == 415
    row = {"age": 40, "income": 70.5, "city": "Porto", "member": True, "day": "2026-01-05"}
    for change, said in (
        ({"age": "40"}, "takes a number"),
        ({"age": True}, "takes a number"),
        ({"member": 1}, "takes a boolean"),
        ({"city": 1.5}, "takes a string"),
        ({"day": "yesterday"}, "not a date"),
        ({"day": 3}, "takes a string"),
        ({"income": 1e31}, "takes a number"),
        ({"other": 1}, "no column 'other'"),
    ):
        answer = table.post("/v1/predict", json={"rows": [row, {**row, **change}]})
        assert answer.status_code == 422, (change, answer.text)
        assert "row 1" in answer.json()["error"]["message"] and said in answer.json()["error"]["message"]
    del row["city"]
    assert "column 'city' is not given" in table.post("/v1/predict", json={"rows": [row]}).text


def test_run_end_encoded_rows_are_counted_before_they_are_unpacked(arrays):
    column = pa.RunEndEncodedArray.from_arrays(pa.array([2**31 - 1], pa.int32()), pa.array([1.0]))
    content = _arrow(pa.table({f"c{k}": column for k in range(4)}))
    assert len(content) < 5000 and _post(arrays, content, ARROW).status_code == 413


# -- who may ask


def test_a_token(arrays_model):
    with TestClient(app(Model(arrays_model), token="s3cret")) as client:
        _ready(client)
        body = {"inputs": [[1, 2, 3, 4]]}
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic s3cret"}):
            for path in ("/v1/model", "/metrics", "/openapi.json", "/nothing"):
                found = client.get(path, headers=headers)
                assert found.status_code == 401 and found.headers["www-authenticate"] == "Bearer"
            assert client.post("/v1/predict", json=body, headers=headers).status_code == 401
        right = {"Authorization": "bearer s3cret"}
        assert client.post("/v1/predict", json=body, headers=right).status_code == 200
        assert client.get("/openapi.json", headers=right).json()["security"] == [{"token": []}]
        for path in ("/", "/page.js", "/page.css", "/health", "/ready"):
            assert client.get(path).status_code == 200
        assert "unauthorised" in client.get("/metrics", headers=right).text


def test_pages_of_other_names_do_not_reach_it(arrays_model):
    service = app(Model(arrays_model), hosts=LOOPBACK)
    for host, status in (("127.0.0.1:8000", 200), ("localhost", 200), ("[::1]:1", 200), ("evil.example:8000", 421)):
        with TestClient(service) as client:
            assert client.get("/health", headers={"Host": host}).status_code == status


@pytest.mark.parametrize(
    "name", ["Host", "Authorization", "Content-Type", "Content-Length", "Content-Encoding", "X-Deadline-Ms"]
)
def test_a_header_that_decides_is_given_once(name, arrays):
    """Of two a proxy may have believed the other one; what may be given twice is taken twice."""
    given = arrays.get("/health").request.headers
    value = given.get(name, "1")
    for path in ("/health", "/v1/model"):
        found = arrays.get(path, headers=[(name, value), (name, value)])
        assert found.status_code == 400 and name.lower() in found.json()["error"]["message"], found.text
        assert arrays.get(path, headers=[("Accept", "a/b"), ("Accept", "c/d")]).status_code == 200


@pytest.mark.parametrize("kind", ["classes", "mean"])
def test_outputs_beyond_float32_are_an_error_with_the_row(kind, arrays_model, named_model, two):
    """And the rows of others that are computed with it are answered."""
    if kind == "classes":
        model, good = Model(arrays_model, compile=False), {"inputs": [[1, 2, 3, 4]]}
        bad = {"inputs": [[1, 2, 3, 4], [0, 0, 0, 0], [1e30, -1e30, 1e30, 1e30]]}
        size = 1e5
    else:
        model, good = Model(named_model, compile=False, module=two()), {"inputs": {"numbers": [[1, 2]], "code": [1]}}
        bad = {"inputs": {"numbers": [[1, 2], [0, 0], [1e30, 1e30]], "code": [1, 1, 1]}}
        size = 1e10
    with torch.no_grad():
        for name, weights in model.predictor.posterior.named_parameters():
            if weights.ndim > 2 and "code" not in name:  # of linear layers, members first
                weights.mul_(size)

    async def ask(client):
        answers = await asyncio.gather(*(client.post("/v1/predict", json=b) for b in (good, bad, good)))
        assert [a.status_code for a in answers] == [200, 422, 200], answers[1].text
        assert "row 2:" in answers[1].json()["error"]["message"]
        assert "1 of 3 rows" in answers[1].json()["error"]["message"]
        assert "nan" not in (await client.get("/metrics")).text

    _crowd(app(model, Limits(batch_wait=0.1)), ask)


def test_what_it_says_of_itself(arrays, table, arrays_model):
    card = arrays.get("/v1/model").json()
    assert card["name"] == "signs" and card["inputs"][0]["minItems"] == 4 and "signs" in card["card"] or card["card"]
    row = table.get("/v1/model").json()["row"]
    assert row["required"] == ["age", "income", "city", "member", "day"]
    assert "Porto" in row["properties"]["city"]["examples"]
    assert arrays.get("/nothing").status_code == 404
    put = arrays.put("/v1/predict")
    assert put.status_code == 405 and put.headers["allow"] == "POST"
    page = arrays.get("/")
    assert "http://" not in page.text and "https://" not in page.text  # nothing from elsewhere
    assert "default-src 'none'" in page.headers["content-security-policy"]
    metrics = arrays.get("/metrics").text
    assert 'route="predict",status="200"' in metrics and metrics.endswith("\n")
    names = {line.split()[2] for line in metrics.splitlines() if line.startswith("# TYPE")}
    for line in metrics.splitlines():
        name = line.split("{")[0]
        assert line.startswith("#") or any(name.startswith(n) for n in names)
        assert line.startswith("#") or float(line.rsplit(" ", 1)[1]) >= 0


# -- when it is late, full, or broken


class _Slow:
    """A predictor that takes its time."""

    def __init__(self, inner, seconds):
        self.inner, self.seconds, self.calls = inner, seconds, 0

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __call__(self, x):
        self.calls += len(x)
        time.sleep(self.seconds)
        return self.inner(x)


class _Held(_Slow):
    """A predictor that is at it until it is let go."""

    def __init__(self, inner):
        super().__init__(inner, 0.0)
        self.free = threading.Event()

    def __call__(self, x):
        self.calls += len(x)
        self.free.wait(30)
        return self.inner(x)


def _holding(arrays_model, limits):
    held = []
    _, service = _with(arrays_model, lambda p: held.append(_Held(p)) or held[0], limits)
    return held[0], service


async def _begun(held):
    while held.calls == 0:
        await asyncio.sleep(0.01)


def _with(arrays_model, predictor, limits):
    model = Model(arrays_model)
    model.predictor = predictor(model.predictor)
    return model, app(model, limits)


def _crowd(service, work):
    async def run():
        async with service.router.lifespan_context(service):
            transport = httpx.ASGITransport(app=service)
            async with httpx.AsyncClient(transport=transport, base_url="http://here", timeout=30) as client:
                while (await client.get("/ready")).status_code != 200:
                    await asyncio.sleep(0.02)
                return await work(client)

    return asyncio.run(run())


BODY = {"inputs": [[1.0, 2.0, 3.0, 4.0]]}


def test_a_burst_of_ten_times_what_fits_is_refused_politely_and_it_recovers(arrays_model):
    held, service = _holding(arrays_model, Limits(queue_rows=8, batch_rows=4, rows=8))

    async def burst(client):
        asked = [asyncio.create_task(client.post("/v1/predict", json=BODY)) for _ in range(80)]
        while sum(task.done() for task in asked) < 41:  # more than half are refused while nothing is computed
            await asyncio.sleep(0.01)
        held.free.set()
        answers = await asyncio.gather(*asked)
        served = [a for a in answers if a.status_code == 200]
        refused = [a for a in answers if a.status_code == 503]
        assert len(served) >= 8 and len(served) + len(refused) == 80 and len(refused) > 40
        assert all(int(a.headers["retry-after"]) >= 1 and a.json()["error"]["code"] == "busy" for a in refused)
        for _ in range(20):  # and afterwards all is well
            assert (await client.post("/v1/predict", json=BODY)).status_code == 200
        text = (await client.get("/metrics")).text
        assert 'code="busy"' in text and "vbdl_waiting_rows{" in text
        assert float(next(l for l in text.splitlines() if l.startswith("vbdl_waiting_rows{")).split()[-1]) == 0

    _crowd(service, burst)


def test_a_deadline_is_kept_and_what_is_late_is_not_computed(arrays_model):
    held, service = _holding(arrays_model, Limits(batch_rows=1, rows=1))

    async def late(client):
        first = asyncio.create_task(client.post("/v1/predict", json=BODY, headers={"X-Deadline-Ms": "1000"}))
        await _begun(held)
        headers = {"X-Deadline-Ms": "100"}
        answers = await asyncio.gather(*(client.post("/v1/predict", json=BODY, headers=headers) for _ in range(4)))
        assert [a.status_code for a in (await first, *answers)] == [504] * 5  # while the first is still computed
        assert held.calls == 1
        held.free.set()
        assert (await client.post("/v1/predict", json=BODY)).status_code == 200
        assert held.calls == 2  # the four that waited were dropped

    _crowd(service, late)


def test_a_client_that_leaves_is_not_computed_for(arrays_model):
    held, service = _holding(arrays_model, Limits(batch_rows=1, rows=1))

    async def leave(client):
        first = asyncio.create_task(client.post("/v1/predict", json=BODY))
        await _begun(held)
        others = [asyncio.create_task(client.post("/v1/predict", json=BODY)) for _ in range(5)]
        await asyncio.sleep(0.05)
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        held.free.set()
        assert (await first).status_code == 200
        assert (await client.post("/v1/predict", json=BODY)).status_code == 200
        assert held.calls == 2

    _crowd(service, leave)


def test_one_row_that_breaks_the_model_does_not_break_its_neighbors(arrays_model):
    class Broken:
        def __init__(self, inner):
            self.inner = inner

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def __call__(self, x):
            if bool((x == 13).any()):
                raise RuntimeError("secret path /root/model")
            return self.inner(x)

    _, service = _with(arrays_model, Broken, Limits(batch_wait=0.1))

    async def mixed(client):
        bodies = [BODY] * 3 + [{"inputs": [[13.0, 0.0, 0.0, 0.0]]}] + [BODY] * 3
        answers = await asyncio.gather(*(client.post("/v1/predict", json=b) for b in bodies))
        assert [a.status_code for a in answers] == [200] * 3 + [503] + [200] * 3
        assert "secret" not in answers[3].text and answers[3].json()["error"]["code"] == "failed"

    _crowd(service, mixed)


class _Watch:
    """A clock that goes on by half a second whenever somebody looks."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 0.5
        return self.now


def test_a_short_deadline_is_met_with_fewer_draws_and_the_answer_says_how_many(draws_model):
    model = Model(draws_model)
    assert model.anytime and model.predictor.n_samples == 64
    with TestClient(app(model)) as client:
        _ready(client)
        clock = model.predictor.clock = _Watch()
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(5))
        body = {"inputs": x.tolist()}
        short = client.post("/v1/predict", json=body, headers={"X-Deadline-Ms": "4000"})
        looked = clock.now
        assert short.status_code == 200, short.text
        n = short.json()["n_samples"]
        assert n in (8, 16, 24, 32) and looked > 0
        fewer = vbdl.load(draws_model).replace(n_samples=n)(x)
        found = torch.tensor([row["probs"] for row in short.json()["predictions"]])
        torch.testing.assert_close(found, fewer.probs, rtol=0, atol=1e-6)
        headers = {"X-Deadline-Ms": "4000", "Accept": ARROW}
        table = pa.ipc.open_stream(client.post("/v1/predict", json=body, headers=headers).content).read_all()
        assert set(table["n_samples"].to_pylist()) == {n}
        # time for all draws, and no deadline at all: the predictor's own numbers
        clock.now = -1e9
        model.predictor.clock = time.perf_counter
        for headers in ({"X-Deadline-Ms": "20000"}, {}):
            whole = client.post("/v1/predict", json=body, headers=headers).json()
            assert whole["n_samples"] == 64
            found = torch.tensor([row["probs"] for row in whole["predictions"]])
            torch.testing.assert_close(found, vbdl.load(draws_model)(x).probs, rtol=0, atol=1e-6)


def test_rows_of_one_request_may_have_different_numbers_of_draws(draws_model):
    """Tiles that the last step did not reach any more."""
    model = Model(draws_model, tiles=(2,))
    with TestClient(app(model)) as client:
        _ready(client)
        model.predictor.clock = _Watch()
        body = {"inputs": [[0.1 * k, 1.0, -1.0, 0.5] for k in range(5)]}
        answer = client.post("/v1/predict", json=body, headers={"X-Deadline-Ms": "9000"}).json()
        counts = answer["n_samples"]
        assert len(counts) == 5 and len(set(counts)) == 2 and counts == sorted(counts, reverse=True)
        for row, n in zip(answer["predictions"], counts, strict=True):
            alone = vbdl.load(draws_model).replace(n_samples=n, tiles=(2,))
            x = torch.tensor([body["inputs"][answer["predictions"].index(row)]])
            torch.testing.assert_close(torch.tensor([row["probs"]]), alone(x).probs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("quick", [10.0, 0.0])
def test_a_quick_model_is_computed_on_the_event_loop_and_a_slow_one_beside_it(quick, arrays_model, monkeypatch):
    monkeypatch.setattr("vbdl.serve.batching.QUICK", quick)
    threads = []

    class Noting(_Slow):
        def __call__(self, x):
            threads.append(threading.get_ident())
            return super().__call__(x)

    _, service = _with(arrays_model, lambda p: Noting(p, 0.0), Limits())
    x = torch.randn(150, 4, generator=torch.Generator().manual_seed(8))

    async def ask(client):
        one = lambda k: client.post("/v1/predict", json={"inputs": x[k : k + 1].tolist()})
        for k in range(10):
            assert (await one(k)).status_code == 200
        at_once = len(threads)
        answers = await asyncio.gather(*(one(k) for k in range(150)))  # more than a tile
        found = torch.tensor([a.json()["predictions"][0]["probs"] for a in answers])
        return threading.get_ident(), at_once, found

    loop, at_once, found = _crowd(service, ask)
    assert torch.equal(found, vbdl.load(arrays_model)(x).probs)
    assert at_once == 10 and threads[:10].count(loop) == (10 if quick else 0)
    assert len(threads) < 100 and loop in threads if quick else loop not in threads


def test_a_service_below_a_prefix(arrays_model):
    from starlette.applications import Starlette
    from starlette.routing import Mount

    service = app(Model(arrays_model))
    outer = Starlette(routes=[Mount("/models/signs", service)], lifespan=service.router.lifespan_context)
    with TestClient(outer) as client:
        while client.get("/models/signs/ready").status_code != 200:
            time.sleep(0.02)
        assert len(client.post("/models/signs/v1/predict", json=BODY).json()["predictions"]) == 1
        assert client.post("/models/signs/v1/predict", json={}).status_code == 422


def test_bodies_together_are_bounded(arrays_model):
    service = app(Model(arrays_model), Limits(total_bytes=1000))

    async def large(client):
        post = lambda size: client.post(
            "/v1/predict", content=b" " * size, headers={"Content-Type": "application/json"}
        )
        answer = await post(70_000)
        assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
        assert (await post(2000)).status_code == 400  # small ones are not kept out by large ones
        assert (await client.post("/v1/predict", json=BODY)).status_code == 200  # what was held is free again

    _crowd(service, large)


def test_a_model_that_does_not_warm_up_is_never_ready(arrays_model, monkeypatch, caplog):
    model = Model(arrays_model)
    monkeypatch.setattr(model, "warm_up", lambda: 1 / 0)
    with TestClient(app(model)) as client:
        while "warming up failed" not in caplog.text:
            time.sleep(0.02)
        assert client.get("/ready").status_code == 503 and client.get("/health").status_code == 503
        answer = client.post("/v1/predict", json=BODY)
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "not_ready"
        assert "division" not in answer.text


@pytest.mark.parametrize("compiled, said", [(True, "being compiled"), (False, "being made ready")])
def test_a_model_that_is_not_ready_says_what_it_is_doing(arrays_model, monkeypatch, compiled, said):
    model = Model(arrays_model, compile=compiled)
    released = threading.Event()
    monkeypatch.setattr(model, "warm_up", lambda: released.wait(30))
    with TestClient(app(model)) as client:
        answer = client.post("/v1/predict", json=BODY)
        released.set()
    assert answer.status_code == 503 and said in answer.json()["error"]["message"]


def test_the_date_on_the_page_is_of_the_training_rows(table_model):
    model = Model(table_model, compile=False)
    [day] = model.about()["row"]["properties"]["day"]["examples"]
    column = next(c for c in model.schema.columns if c.name == "day")
    assert day == str(np.datetime64("1970-01-01") + round(column.fill)) and day.startswith("2026-01-")
    assert not model.schema.encode_rows([{**dict.fromkeys(model.schema.names), "day": day}]).rejected


def test_links_of_the_page_can_be_followed_with_a_token(arrays_model):
    """A link itself sends none: the page asks for what it points to, and has a place to show it."""
    with TestClient(app(Model(arrays_model, compile=False), token="secret")) as client:
        page, script = client.get("/").text, client.get("/page.js").text
        links = re.findall(r"<footer.*?</footer>", page, re.DOTALL)[0]
        for path in re.findall(r'href="([^"]+)"', links):
            assert client.get(path).status_code == 401
            assert client.get(path, headers={"Authorization": "Bearer secret"}).status_code == 200
    assert 'querySelectorAll("footer a")' in script and 'id="linked"' in page and '$("linked")' in script


def test_limits_are_positive():
    for field in dataclasses.fields(Limits):
        with pytest.raises(ValueError, match=field.name):
            Limits(**{field.name: -1})
    with pytest.raises(ValueError, match="raise queue_rows"):
        Limits(rows=10, queue_rows=5)


def test_an_artifact_that_does_not_know_its_rows_is_refused(tmp_path):
    torch.manual_seed(0)
    members = [torch.nn.Linear(4, 3) for _ in range(2)]
    predictor = vbdl.Predictor(vbdl.DeepEnsemble(members), vbdl.Categorical(), compile=False)
    predictor.save(tmp_path / "m")
    with pytest.raises(ValueError, match="what a row looks like"):
        Model(tmp_path / "m")
