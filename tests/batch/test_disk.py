"""Disks that are full, read-only or somebody else's: a line that says so, whole parts, and a job that can go on."""

import os
import resource
import subprocess
import sys

import numpy as np
import pyarrow.parquet
import pytest

import vbdl

OPTIONS = {"chunk_rows": 100, "tile": 64, "compile": False, "progress": False, "workers": 1}
NOBODY = 65_534


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    np.save(folder / "x.npy", np.random.default_rng(0).normal(size=(1_000, 2)).astype(np.float32))
    folder.chmod(0o755)
    return folder / "x.npy"


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "_lock"}


class AsNobody:
    """File access of a user that is not root, in this thread and those it starts."""

    def __enter__(self):
        self.before = os.geteuid()
        if self.before == 0:
            os.seteuid(NOBODY)

    def __exit__(self, *error):
        if self.before == 0:
            os.seteuid(0)


@pytest.fixture
def place(tmp_path):
    """A folder that the other user can reach and write to."""
    for above in [tmp_path, *tmp_path.parents]:
        if not os.stat(above).st_mode & 0o001:
            if os.geteuid() != 0 or above.stat().st_uid != os.geteuid():
                pytest.skip(f"{above} is closed to others")
            above.chmod(above.stat().st_mode | 0o011)
    tmp_path.chmod(0o777)
    return tmp_path


def refused(network, data, out):
    with AsNobody(), pytest.raises((OSError, ValueError)) as error:
        vbdl.predict_table(network, data, out, **OPTIONS)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_output_that_is_not_ours_to_write(network, data, place):
    (place / "closed").mkdir(mode=0o555)
    for out in ("out", "out.csv"):
        assert "Permission denied" in refused(network, data, place / "closed" / out)
    assert not list((place / "closed").iterdir())
    with AsNobody():
        vbdl.predict_table(network, data, place / "out", **OPTIONS)
    (place / "out").chmod(0o555)
    before = contents(place / "out")
    with AsNobody():  # done before: there is nothing to write
        assert vbdl.predict_table(network, data, place / "out", **OPTIONS).resumed == 10
    (place / "out").chmod(0o777)
    (place / "out" / "x-00003.parquet").unlink()
    (place / "out").chmod(0o555)
    assert "Permission denied" in refused(network, data, place / "out")
    (place / "out").chmod(0o777)
    with AsNobody():
        assert vbdl.predict_table(network, data, place / "out", **OPTIONS).damaged == ["x-00003.parquet"]
    assert contents(place / "out") == before


@pytest.mark.parametrize("name", ["b.npy", "b.csv", "b.csv.gz", "b.parquet", "b.arrow"])
def test_an_input_that_is_not_ours_to_read(network, data, place, name):
    (place / "in").mkdir()
    os.link(data, place / "in" / "a.npy") if os.stat(data).st_dev == os.stat(place).st_dev else None
    (place / "in" / name).write_bytes(b"a,b\n1,2\n")
    (place / "in" / name).chmod(0)
    with AsNobody():
        report = vbdl.predict_table(network, place / "in", place / "out", **OPTIONS)
    assert report.rows == 1_000 and list(report.failed) == [name]
    assert name in report.failed[name] and "Permission denied" in report.failed[name]


def test_a_folder_that_cannot_be_looked_into_is_said(network, data, place):
    """Its files would be left out without a word."""
    (place / "in" / "closed").mkdir(parents=True)
    np.save(place / "in" / "a.npy", np.zeros((3, 2), np.float32))
    (place / "in" / "closed").chmod(0)
    assert "closed" in refused(network, place / "in", place / "out")
    assert not (place / "out").exists()


FULL = """
import resource, signal, sys
import pyarrow.parquet, pyarrow.csv, torch, vbdl, vbdl.cli, vbdl.batch.predicting, vbdl.tabular
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
sys.exit(vbdl.cli.main(["predict", *sys.argv[2:]]))
"""


@pytest.mark.parametrize("out", ["out", "out.csv", "out.parquet", "out.npy"])
def test_a_full_disk_can_be_gone_on_with(network, data, tmp_path, out, monkeypatch):
    """A limit on the size of a file stops Arrow's, NumPy's and Python's own writing in the middle of a file."""
    whole = tmp_path / "whole"
    whole.mkdir()
    vbdl.predict_table(network, data, whole / out, **OPTIONS)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    stopped = 0
    for limit in (0, 100, 1_000, 2_000, 3_500, 5_000, 9_000, 20_000):
        folder = tmp_path / str(limit)
        folder.mkdir()
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            vbdl.predict_table(network, data, folder / out, **OPTIONS)
        except OSError as error:
            stopped += 1
            assert "\n" not in str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        for path in folder.rglob("*-*.parquet"):  # what a reader would see is whole
            if not path.name.startswith("."):
                assert pyarrow.parquet.read_table(path).num_rows == 100
        vbdl.predict_table(network, data, folder / out, **OPTIONS)
        assert contents(folder) == contents(whole), limit
        assert [p.name for p in folder.rglob(".*")] == []
    assert stopped >= 3


def test_a_full_disk_is_a_line_of_the_command(model, rows, tmp_path):
    pyarrow.parquet.write_table(rows, tmp_path / "t.parquet")
    command = [sys.executable, "-c", FULL, "2000", str(model), str(tmp_path / "t.parquet"), str(tmp_path / "out")]
    done = subprocess.run(
        [*command, "--chunk-rows", "500", "--compile", "False"], capture_output=True, text=True, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("vbdl: ") and "File too large" in line]
