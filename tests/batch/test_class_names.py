"""Files of predictions have the names of classes that a model was saved with."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

import vbdl


def test_files_have_the_names_of_classes(tmp_path):
    torch.manual_seed(0)
    predict = vbdl.Predictor(vbdl.DeepEnsemble(nn.Linear(4, 3), 2), vbdl.Categorical(), compile=False)
    x = torch.randn(6, 4)
    decide = vbdl.with_decision(predict, vbdl.decision.AnyOf([vbdl.decision.Referral("total", 1.0)]))
    p = decide(x)
    np.save(tmp_path / "rows.npy", x.numpy())
    decide.save(tmp_path / "model", classes=["a", "b", "c"])
    vbdl.predict_table(tmp_path / "model", tmp_path / "rows.npy", tmp_path / "out")
    (file,) = (tmp_path / "out").glob("*.parquet")
    table = pq.read_table(file)
    assert table["prediction"].to_pylist() == ["abc"[k] for k in p.label.tolist()]
    assert {"probability_a", "probability_b", "probability_c"} <= set(table.column_names)
    assert table["reason"].to_pylist() == p.reason.tolist() and table["action"].to_pylist() == p.action.tolist()
    decide.save(tmp_path / "wrong", classes=["a", "b"])
    with pytest.raises(ValueError, match="names 2 classes, but predicts 3"):
        vbdl.predict_table(tmp_path / "wrong", tmp_path / "rows.npy", tmp_path / "out_of_wrong")
