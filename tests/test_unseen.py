"""Rows that training has seen: named by number, and dropped by vbdl.unseen."""

import ast
import traceback
from pathlib import Path

import pytest
import torch
from torch import nn

import vbdl

PACKAGE = Path(vbdl.__file__).parent


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    x, y = torch.randn(40, 4), torch.randint(3, (40,))
    q, likelihood = vbdl.DeepEnsemble(nn.Linear(4, 3), 2), vbdl.Categorical()
    vbdl.fit(q, (x[:30], y[:30]), likelihood, epochs=1, progress=False, compile=False)
    return vbdl.Predictor(q, likelihood, compile=False), x, y


def test_calibrate_names_the_rows_and_unseen_drops_them(trained):
    predict, x, y = trained
    order = [35, 3, 36, 37, 12, 38, 39, 30]
    with pytest.raises(
        ValueError, match=r"2 of 8 calibration rows were trained on \(rows 1, 4\).*vbdl.unseen"
    ) as error:
        vbdl.calibrate(predict, (x[order], y[order]), vbdl.Temperature())
    assert error.value.__context__ is None, "the error begins with another one"
    assert "TypeError" not in "".join(traceback.format_exception(error.value))
    rows = vbdl.unseen(predict, x[order])
    assert rows.tolist() == [0, 2, 3, 5, 6, 7]
    calibrated = vbdl.calibrate(predict, (x[order][rows], y[order][rows]), vbdl.calibration.Dirichlet())
    assert int(calibrated.likelihood.n_overlap) == 0
    with pytest.raises(ValueError, match=r"30 of 30 .*\(rows 0, 1, 2, 3, 4, \.\.\.\)"):
        vbdl.calibrate(predict, (x[:30], y[:30]), vbdl.Temperature())


def test_rows_of_a_network_trained_elsewhere_are_not_known():
    predict = vbdl.Predictor(vbdl.Deterministic(nn.Linear(4, 3)), vbdl.Categorical(), compile=False)
    assert vbdl.unseen(predict, torch.zeros(3, 4)).tolist() == [0, 1, 2]


def test_no_call_is_forwarded_inside_an_except():
    """An error of the call would be reported as one during the handling of another, which says nothing to the user."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        for handler in ast.walk(ast.parse(path.read_text())):
            if not isinstance(handler, ast.ExceptHandler):
                continue
            for call in ast.walk(ast.Module(handler.body, [])):
                forwarded = isinstance(call, ast.Call) and any(isinstance(a, ast.Starred) for a in call.args)
                if forwarded or isinstance(call, ast.YieldFrom):
                    found.append(f"{path.relative_to(PACKAGE)}:{handler.lineno}: {ast.unparse(call)}")
    assert not found


def test_dir_lists_public_names_once():
    names = dir(vbdl)
    assert len(names) == len(set(names)) and set(vbdl.__all__) <= set(names)
    assert not {"former", "give_place", "importlib", "TYPE_CHECKING", "Any", "METHODS"} & set(names)
