"""Tables as structured arrays."""

import datetime

import numpy as np
import pyarrow as pa
import pytest

from vbdl.batch.arrays import join_arrays, to_array, write_array


def table(words, start=0):
    n = len(words)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(2 * n, dtype=np.float32)), 2)
    return pa.table({
        "id": pa.array(range(start, start + n), pa.int64()), "word": words, "code": pa.array(words).dictionary_encode(),
        "x": pa.array([None, *[1.5] * (n - 1)], pa.float32()), "n": pa.array([None, *[2] * (n - 1)], pa.int64()),
        "day": [datetime.date(2024, 5, 1)] * n, "yes": [True] * n, "vector": vectors,
    })  # fmt: skip


def test_each_column_is_a_field():
    found = to_array(table(["a", "longer", None]))
    assert found["word"].tolist() == found["code"].tolist() == ["a", "longer", ""]
    assert found["id"].dtype == np.int64 and found["x"].dtype == np.float32 and found["yes"].dtype == bool
    assert np.isnan(found["x"][0]) and np.isnan(found["n"][0]) and found["n"][1] == 2
    assert found["day"][0] == np.datetime64("2024-05-01") and found["vector"].tolist() == [[0, 1], [2, 3], [4, 5]]


def test_files_are_joined_and_text_is_as_wide_as_the_widest(tmp_path):
    parts = [table(["a", "b"]), table(["ccc", "longest", "é"], 2), table(["d"], 5)]
    paths = [tmp_path / f"{i}.npy" for i in range(3)]
    for path, part in zip(paths, parts, strict=True):
        write_array(path, part)
    join_arrays(tmp_path / "all.npy", paths)
    found = np.load(tmp_path / "all.npy", allow_pickle=False)
    assert found["id"].tolist() == list(range(6)) and found["word"].dtype == "<U7"
    assert found["word"].tolist() == ["a", "b", "ccc", "longest", "é", "d"]
    assert np.array_equal(found["vector"], np.concatenate([to_array(p)["vector"] for p in parts]))


def test_what_numpy_has_no_type_for_is_said():
    with pytest.raises(ValueError, match="'yes' has missing cells"):
        to_array(pa.table({"yes": [True, None]}))
    with pytest.raises(ValueError, match="'price' holds decimal"):
        to_array(pa.table({"price": pa.array([1, 2], pa.decimal128(5, 2))}))
