"""The OpenAPI description and the service say the same: schemathesis asks for everything that it promises."""

import time

import numpy as np
import pyarrow as pa
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis.specs.openapi.checks import negative_data_rejection
from starlette.testclient import TestClient

from vbdl.serve import Limits, Model, app


def _arrow(columns):
    table = pa.table(columns)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _npy(array):
    import io

    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


numbers = st.lists(st.lists(st.floats(-1e30, 1e30), min_size=4, max_size=4), min_size=1, max_size=5).map(np.array)
schemathesis.openapi.media_type("application/x-npy", numbers.map(_npy))
schemathesis.openapi.media_type(
    "application/vnd.apache.arrow.stream", numbers.map(lambda x: _arrow({f"c{k}": x[:, k] for k in range(4)}))
)


@pytest.fixture(scope="module")
def service(arrays_model):
    yield from _running(arrays_model)


@pytest.fixture(scope="module")
def table_service(table_model):
    yield from _running(table_model)


def _running(folder):
    """An application whose lifespan runs in a loop of its own, for clients of any thread."""
    made = app(Model(folder), Limits(rows=50, queue_rows=500))
    with TestClient(made) as client:
        while client.get("/ready").status_code != 200:
            time.sleep(0.02)
        yield made


CALM = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def _operations(service):
    document = schemathesis.openapi.from_asgi("/openapi.json", service)
    return [found.ok() for found in document.get_all_operations()]


def _ask(operation, wanted=None):
    """Everything that schemathesis makes of an operation, each answer checked against the description."""
    media: dict[str | None, int] = {}
    statuses: dict[int, int] = {}
    for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):

        @CALM
        @given(case=operation.as_strategy(generation_mode=mode))
        def ask(case):
            if wanted is not None and case.media_type not in wanted:
                return
            answer = case.call()
            # too many rows are refused with 413, which schemathesis does not count as refusing
            excluded = [negative_data_rejection] if answer.status_code == 413 else []
            case.validate_response(answer, excluded_checks=excluded)
            media[case.media_type] = media.get(case.media_type, 0) + 1
            statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1

        try:
            ask()
        except Unsatisfiable:  # nothing can be wrong with a request that takes nothing
            assert mode == schemathesis.GenerationMode.NEGATIVE and operation.method == "get"
    return media, statuses


def test_arrays_as_described(service):
    found = {operation.label: _ask(operation) for operation in _operations(service)}
    media, statuses = found["POST /v1/predict"]
    assert set(media) >= {"application/json", "application/x-npy", "application/vnd.apache.arrow.stream"}
    assert statuses[200] > 20 and statuses[422] > 5, statuses
    assert len(found) == 5 and all(counts[200] for _, counts in found.values())


def test_tables_as_described(table_service):
    (operation,) = [o for o in _operations(table_service) if o.label == "POST /v1/predict"]
    _, statuses = _ask(operation, {"application/json"})  # the Arrow tables made above are the other model's
    assert statuses[200] > 10 and statuses[422] > 5, statuses
