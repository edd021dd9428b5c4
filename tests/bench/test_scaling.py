"""The cost of a prediction against sizes."""

import json

import pytest

from vbdl.bench import scaling
from vbdl.methods import building


def test_every_cell_is_measured_once(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "SIZES", {"draws": (2, 64), "members": (2,), "rows": (64, 256)})
    monkeypatch.setattr(scaling, "MEMORY_DRAWS", ())
    out = tmp_path / "scaling.jsonl"
    found = scaling.measure(out, compile=False, seconds=0.0, say=lambda text: None)
    assert {(r["axis"], r["method"]) for r in found} == {
        ("draws", "mc-dropout"),
        ("draws", "mean-field"),
        ("draws", "ivon"),
        ("draws", "swag"),
        ("members", "deep-ensemble"),
        ("members", "snapshots"),
        ("members", "batch-ensemble"),
        ("members", "masksembles"),
        ("draws", "laplace"),
        *(("rows", m) for m in building()),
    }
    assert [json.loads(text) for text in out.read_text().splitlines()] == found
    assert all(r["value"] > 0 and r["machine"] and r["versions"] for r in found)
    assert scaling.measure(out, compile=False, say=lambda text: None) == found, "nothing is measured twice"


@pytest.mark.skipif(not scaling._STATUS.is_file(), reason="the system does not tell the peak of the memory")
def test_memory_is_that_of_the_prediction_alone():
    held = bytearray(b"x" * 2**29)  # the parent's peak is not the child's
    few, many = (scaling._peak_in_a_process("mean-field", draws) for draws in (8, 512))
    weights = 512 * 4 * (33 * 128 + 129 * 128 + 129 * 10)  # what 512 draws kept would take
    assert 0 <= few < 2**26 and few < many < 4 * weights and len(held)
