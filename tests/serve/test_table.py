"""A model made from a table, asked by the names of its columns."""

import time

import pyarrow as pa
import torch
from starlette.testclient import TestClient

import vbdl
from vbdl.serve import Model, app
from vbdl.serve.app import ARROW
from vbdl.tabular import schema_of


def _arrow(table):
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def test_a_table_by_names(table_model):
    with TestClient(app(Model(table_model))) as table:
        while table.get("/ready").status_code != 200:
            time.sleep(0.02)
        _by_names(table, table_model)


def _by_names(table, table_model):
    predictor = vbdl.load(table_model)
    schema = schema_of(predictor.manifest.extras)
    rows = [
        {"age": 40, "income": 70.5, "city": "Porto", "member": True, "day": "2026-01-05"},
        {"age": 20, "income": None, "city": "Nowhere", "member": None, "day": None},
    ]
    expected = predictor(schema.tensor(rows))
    found = table.post("/v1/predict", json={"rows": rows}).json()
    assert found["classes"] == ["bad", "good"]
    assert torch.equal(torch.tensor([r["probs"] for r in found["predictions"]]), expected.probs)
    assert [r["label"] for r in found["predictions"]] == [["bad", "good"][k] for k in expected.label]
    for row, inside in zip(found["predictions"], expected.sets, strict=True):
        assert row["sets"] == [c for c, i in zip(["bad", "good"], inside, strict=True) if i]
    assert found["notes"]["unseen"] == {"city": 1} and set(found["notes"]["imputed"]) == {"income", "member", "day"}
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    columns["day"] = pa.array(columns["day"]).cast(pa.date32())
    again = table.post("/v1/predict", content=_arrow(pa.table(columns)), headers={"Content-Type": ARROW}).json()
    assert again["predictions"] == found["predictions"]
