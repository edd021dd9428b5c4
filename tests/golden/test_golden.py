"""Predictions and artefacts of 361ba7c, the last commit before the house was rebuilt, are what this vbdl gives.

On the kind of machine that wrote them (processor, instruction set and torch version, `machine.py`), one thread computes
the same bits, and bits are compared. Elsewhere sums are rounded in another order: the bound is 1e-6 of a field's
largest value, some ten roundings of float32, and 2^-7 (four of bfloat16's) under autocast; whole numbers stay equal.
`VBDL_GOLDEN=bits` or `VBDL_GOLDEN=bound` chooses.

Uncompiled and in tiles of 64 rows: the default sizes of tiles have changed since, on purpose.
"""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

import vbdl

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER))
from cases import CASES, CHANGED, STORED_ONLY, TRAINING, predict  # noqa: E402
from machine import machine  # noqa: E402


def read(file: str) -> tuple[dict[str, np.ndarray], str]:
    with safe_open(FOLDER / file, "numpy") as stored:
        return {name: stored.get_tensor(name) for name in stored.keys()}, stored.metadata()["machine"]  # noqa: SIM118


ARRAYS, WRITTEN_ON = read("predictions.safetensors")
CHANGES, CHANGED_ON = read("changed.safetensors")
CHOSEN = os.environ.get("VBDL_GOLDEN")


def assert_same(name: str, computed: dict[str, np.ndarray], how: str = "") -> None:
    """The arrays of a case are the stored ones; how: "built" or "stored", where its numbers may have changed."""
    case = f"{how}:{name}"
    arrays, written_on, where = (CHANGES, CHANGED_ON, case) if case in CHANGED else (ARRAYS, WRITTEN_ON, name)
    wanted = {n.rpartition("/")[2]: array for n, array in arrays.items() if n.rpartition("/")[0] == where}
    assert wanted and computed.keys() == wanted.keys()
    to_the_bit = CHOSEN == "bits" or (CHOSEN != "bound" and machine() == written_on)
    for field, value in computed.items():
        other = wanted[field]
        assert value.dtype == other.dtype and value.shape == other.shape, f"{name}: {field}"
        if to_the_bit or not np.issubdtype(value.dtype, np.floating):
            assert np.array_equal(value, other, equal_nan=value.dtype.kind == "f"), f"{name}: {field}"
        else:
            # epistemic is total less aleatoric, and has their roundings
            whole = wanted["total"] if field == "epistemic" and "total" in wanted else other
            finite = np.abs(whole[np.isfinite(whole)])
            bound = (2.0**-7 if "autocast" in name else 1e-6) * float(finite.max(initial=0.0))
            np.testing.assert_allclose(value, other, rtol=0, atol=bound, err_msg=f"{name}: {field}")


@pytest.mark.parametrize("name", [name for name in CASES if name not in STORED_ONLY])
def test_built_anew(name):
    assert_same(name, predict(name, CASES[name]()), "built")


@pytest.mark.parametrize("name", CASES)
def test_an_artefact_of_0_1(name):
    predictor = vbdl.load(FOLDER / "artefacts" / name.replace(" ", "-"))
    if name.endswith("moments"):  # an artefact predicts by sampling
        predictor = predictor.replace(estimator="moments")
    assert_same(name, predict(name, predictor), "stored")


@pytest.mark.parametrize("name", TRAINING)
def test_trained(name):
    assert_same(f"training/{name}", TRAINING[name]())


def test_every_stored_array_is_compared():
    names = {*CASES, *(f"training/{name}" for name in TRAINING)}
    assert {n.rpartition("/")[0] for n in ARRAYS} == names
    assert {n.rpartition("/")[0] for n in CHANGES} == {*CHANGED}
    assert {case.partition(":")[2] for case in CHANGED} <= names
