"""The engine on Ray: the local engine's files, and a job whose driver was killed. Ray runs in processes of its own."""

import os
import signal
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

import vbdl

pytest.importorskip("ray")
pytestmark = pytest.mark.slow  # a start of Ray takes some ten seconds

OPTIONS = {"chunk_rows": 100, "tile": 64, "compile": False, "progress": False, "workers": 2}


@pytest.fixture(scope="module")
def data(rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    pa.parquet.write_table(rows, folder / "a.parquet", row_group_size=330)
    pa.csv.write_csv(rows.slice(0, 500), folder / "b.csv")
    text = (folder / "b.csv").read_text().replace('"row-321",', '"row-321",x')
    (folder / "b.csv").write_text(text)
    return folder


@pytest.fixture(scope="module")
def expected(model, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("local") / "out"
    vbdl.predict_table(model, data, out, **OPTIONS)
    return contents(out)


def contents(out):
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def start(model, data, out, **options):
    given = {**OPTIONS, "engine": "ray", "ray_options": {"num_cpus": 2}, **options}
    code = f"import vbdl; print(vbdl.predict_table({str(model)!r}, {str(data)!r}, {str(out)!r}, **{given!r}))"
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip


def end(process):
    said = process.communicate(timeout=240)[0]
    return process.returncode, said


def test_two_workers_on_two_cpus_write_the_local_engines_files(model, data, expected, tmp_path):
    code, said = end(start(model, data, tmp_path / "out"))
    assert code == 0, said
    assert contents(tmp_path / "out") == expected


def test_a_killed_driver_is_gone_on_with(model, data, expected, tmp_path):
    """Killed when the first parts are there; its actors die with it, and what they write meanwhile is the same."""
    out, landed = tmp_path / "out", 0
    for wait in (1, 6):
        process = start(model, data, out)
        until = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < until and len(list(out.rglob("*-*.parquet"))) < wait:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        landed += process.returncode == -9
        for part in out.rglob("*.parquet"):
            assert part.name.startswith(".") or pa.parquet.read_metadata(part).num_rows >= 0
        time.sleep(3)
    assert landed, "the job was done before the blow: the test shows nothing"
    code, said = end(start(model, data, out))
    assert code == 0, said
    assert contents(out) == expected


def test_more_actors_than_cpus_share_them(model, data, expected, tmp_path):
    code, said = end(start(model, data, tmp_path / "out", workers=3))
    assert code == 0 and contents(tmp_path / "out") == expected, said


def test_a_busy_cluster_is_an_error_and_not_a_wait(model, data, tmp_path):
    code, said = end(start(model, data, tmp_path / "out", ray_options={"num_cpus": 0}))
    assert code != 0 and "CPUs" in said


def test_an_error_of_the_data_is_one_line(model, data, tmp_path):
    code, said = end(start(model, data, tmp_path / "out", on_error="stop"))
    assert code != 0 and "b.csv, row 321" in said
