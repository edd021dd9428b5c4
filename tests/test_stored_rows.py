"""Rows in files are trained on batch by batch, with the numbers of the same rows in memory, and are not read whole."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from torch import nn

import vbdl
from vbdl.data.fingerprint import fingerprints
from vbdl.data.stored import in_file

ROWS = 61


def stored(folder, array, name="x"):
    np.save(folder / f"{name}.npy", array)
    return np.load(folder / f"{name}.npy", mmap_mode="r")


def network(inputs=4, outputs=3):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, outputs))


def trained(data, make=lambda: vbdl.DeepEnsemble(network(), 3), likelihood=vbdl.Categorical, **options):
    q, likelihood = make(), likelihood()
    options = {"epochs": 3, "batch_size": 16, "progress": False, "compile": False, **options}
    history = vbdl.fit(q, data, likelihood, **options)
    return [*q.state_dict().values(), *likelihood.parameters()], history, q


def the_same(a, b):
    assert all(torch.equal(s, t) for s, t in zip(a[0], b[0], strict=True))
    assert (a[1].train_loss, a[1].validation_nll) == (b[1].train_loss, b[1].validation_nll)
    assert torch.equal(a[2].parts[-1].training_rows, b[2].parts[-1].training_rows)


@pytest.fixture
def rows():
    x = torch.randn(ROWS, 4)
    return x.numpy(), (x[:, 0] > 0).long().numpy()


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (lambda: vbdl.DeepEnsemble(network(), 3), {"validation": 0.2, "bootstrap": True}),
        (lambda: vbdl.DeepEnsemble(network(), 3), {"member_rows": torch.arange(3 * 20).view(3, 20)}),
        (lambda: vbdl.MCDropout(network()), {"validation": 0.2, "patience": 1, "clip_norm": 1.0}),
        (lambda: vbdl.Laplace(network(), prior_precision="validation"), {"validation": 0.2}),
    ],
)
def test_rows_in_a_file_train_as_rows_in_memory(rows, tmp_path, make, options):
    x, y = rows
    in_memory = trained((x, y), make, **options)
    the_same(trained((stored(tmp_path, x), y), make, **options), in_memory)
    the_same(trained((stored(tmp_path, x), stored(tmp_path, y, "y")), make, **options), in_memory)


def test_the_validation_rows_may_be_in_a_file(rows, tmp_path):
    x, y = rows
    held = stored(tmp_path, x[40:].astype(np.float64)), stored(tmp_path, y[40:].astype(np.uint8), "y")
    options = {"validation": held, "patience": 2}
    the_same(
        trained((x[:40], y[:40]), **options), trained((x[:40], y[:40]), **{**options, "validation": (x[40:], y[40:])})
    )


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.uint8, np.int16, np.uint16])
def test_other_dtypes_are_converted_batch_by_batch(rows, tmp_path, dtype):
    x = (np.abs(rows[0]) * 10).astype(dtype)
    the_same(trained((stored(tmp_path, x), rows[1])), trained((x.astype(np.float32), rows[1])))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_small_integers_are_indices_of_a_network_that_takes_indices(rows, tmp_path, dtype):
    ids = np.random.default_rng(0).integers(0, 9, (ROWS, 5))

    def make():
        torch.manual_seed(1)
        return vbdl.MCDropout(nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Dropout(0.1), nn.Linear(20, 3)))

    the_same(trained((stored(tmp_path, ids.astype(dtype)), rows[1]), make), trained((ids, rows[1]), make))


def test_inputs_may_be_a_dict_and_targets_real(rows, tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network(5, 1)

        def forward(self, a, b):
            return self.inner(torch.cat([a, b], 1))

    x, _ = rows
    x = {"a": x, "b": x[:, :1]}
    files = {name: stored(tmp_path, value, name) for name, value in x.items()}
    y = np.sin(x["b"])
    make = lambda: vbdl.MCDropout(Two())
    wide = stored(tmp_path, y.astype(np.float64), "y")
    torch.manual_seed(1)
    one = trained((files, wide), make, vbdl.Gaussian)
    the_same(one, trained((x, wide.astype(np.float32)), make, vbdl.Gaussian))


def test_members_of_several_architectures(rows, tmp_path):
    make = lambda: vbdl.DeepEnsemble([network(), nn.Sequential(nn.Linear(4, 3))])
    x, y = rows
    the_same(trained((stored(tmp_path, x.astype(np.float64)), y), make), trained((x, y), make))


def test_rows_too_large_for_the_device_stay_outside_it(rows, monkeypatch):
    in_memory = trained(rows, validation=0.2)
    taken = []
    monkeypatch.setattr("vbdl.training.row_checks.RowChecks.too_large", lambda self, x: True)
    take = vbdl.data.stored.StoredRows.take
    monkeypatch.setattr(
        "vbdl.data.stored.StoredRows.take", lambda self, r: taken.append(self.read_when_taken) or take(self, r)
    )
    the_same(trained(rows, validation=0.2), in_memory)
    assert taken and all(taken)


@pytest.mark.parametrize("layout", ["columns first", "every second row", "backwards", "big endian"])
def test_any_layout_of_a_file(rows, tmp_path, layout):
    x, y = rows
    if layout == "columns first":
        file = stored(tmp_path, np.asfortranarray(x))
        assert not file.flags.c_contiguous
    elif layout == "big endian":
        with pytest.raises(ValueError, match="byte order"):
            trained((stored(tmp_path, x.astype(">f4")), y))
        return
    else:
        step = 2 if layout == "every second row" else -1
        file, x, y = stored(tmp_path, x)[::step], x[::step], y[::step].copy()
    the_same(trained((file, y)), trained((np.ascontiguousarray(x), y)))


def test_which_data_lie_in_files(rows, tmp_path):
    x, y = rows
    file = stored(tmp_path, x)
    torch.save({"x": torch.tensor(x)}, tmp_path / "x.pt")
    assert in_file((file, y)) and in_file(({"a": file[2:]}, y)) and in_file((x, stored(tmp_path, y, "y")))
    assert in_file((torch.from_file(str(tmp_path / "x.npy"), shared=True, size=8), y))
    assert not in_file((x, y)) and not in_file((torch.tensor(x).share_memory_(), torch.tensor(y)))
    if sys.platform == "linux":
        assert in_file(torch.load(tmp_path / "x.pt", mmap=True))


def test_rows_that_are_not_finite_are_named_by_their_number(rows, tmp_path, monkeypatch):
    monkeypatch.setattr("vbdl.data.rows._NUMBERS_AT_ONCE", 40)  # ten rows at once
    x, y = rows
    x = x.copy()
    x[33, 1] = np.nan
    for data in ((stored(tmp_path, x), y), (x, y)):
        with pytest.raises(ValueError, match="1 input rows are not finite, the first is row 33"):
            trained(data)
    with pytest.raises(ValueError, match="disagree on the number of rows"):
        trained((stored(tmp_path, x), y[1:]))
    y[40] = 3
    with pytest.raises(ValueError, match="targets run from 0 to 3"):
        trained((stored(tmp_path, rows[0]), stored(tmp_path, y, "y")))


def test_fingerprints_do_not_depend_on_the_blocks(rows, monkeypatch):
    x = {"a": torch.tensor(rows[0]), "b": torch.arange(ROWS)}
    whole = fingerprints(x)
    monkeypatch.setattr("vbdl.data.rows._NUMBERS_AT_ONCE", 7)
    assert torch.equal(fingerprints(x), whole) and len(whole.unique()) == ROWS


def test_rows_trained_on_from_a_file_are_refused_in_calibration(rows, tmp_path):
    x, y = rows
    _, _, q = trained((stored(tmp_path, x.astype(np.float64)), y))
    predict = vbdl.Predictor(q, vbdl.Categorical(), compile=False)
    with pytest.raises(ValueError, match="train"):
        vbdl.calibrate(predict, (x.astype(np.float64).astype(np.float32), y), vbdl.Temperature())


_LARGE = """
    import resource, sys
    import numpy as np, torch, vbdl
    from torch import nn

    torch.set_num_threads(1)
    rows, columns = 100_000, 1000  # 400 MB in float32, a file with holes
    x = np.lib.format.open_memmap(sys.argv[1], "w+", np.float32, (rows, columns))
    x[0], x[-1] = 1, 2
    x.flush()
    x = np.load(sys.argv[1], mmap_mode="r")
    y = torch.arange(rows) % 3
    q, likelihood = vbdl.DeepEnsemble(nn.Linear(columns, 3), 2), vbdl.Categorical()
    options = {"epochs": 1, "progress": False, "compile": False}
    few = (np.ascontiguousarray(x[:2000]), y[:2000])
    vbdl.fit(q, few, likelihood, **options)  # what any training takes
    memory = lambda: int(next(l.split()[1] for l in open("/proc/self/status") if l.startswith("VmData"))) * 1024
    # of its own memory, which a file's pages are not
    resource.setrlimit(resource.RLIMIT_DATA, (memory() + 128_000_000, resource.RLIM_INFINITY))
    data = (x if sys.argv[2] == "mapped" else torch.from_numpy(np.array(x))), y
    vbdl.fit(q, data, likelihood, batch_size=1000, validation=0.1, **options)
    print("trained on", len(q.training_rows))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
def test_training_on_400_megabytes_takes_less_than_128(tmp_path):
    def run(how):
        script = [sys.executable, "-c", textwrap.dedent(_LARGE), str(tmp_path / "x.npy"), how]
        return subprocess.run(script, capture_output=True, text=True, timeout=300)

    mapped, copied = run("mapped"), run("copied")
    assert mapped.returncode == 0, mapped.stderr
    assert "trained on" in mapped.stdout
    assert copied.returncode != 0 and "MemoryError" in copied.stderr, copied.stderr  # the limit holds
