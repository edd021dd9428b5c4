import types

import pytest


@pytest.fixture
def untrained(monkeypatch):
    """fit_table reads the table, and makes its schema and its notes: nothing is trained, calibrated or scored."""
    monkeypatch.setattr("vbdl.tabular.fitting.fit", lambda *args, **settings: None)
    monkeypatch.setattr(
        "vbdl.tabular.fitting.calibrate_by_default",
        lambda predictor, *args: types.SimpleNamespace(predictor=predictor, notes=[]),
    )
    monkeypatch.setattr("vbdl.tabular.fitting.evaluate", lambda *args: None)
