"""The engine on Ray: the local engine's files, and a job whose driver was killed. Ray runs in processes of its own."""

import contextlib
import json
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

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
    given = {**OPTIONS, "engine": "ray", "ray_options": {"address": "local", "num_cpus": 2}, **options}
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
    # parts that are gone or changed since are computed again, and said
    (tmp_path / "out" / "a-00003.parquet").unlink()
    (tmp_path / "out" / "b-00002.parquet").write_bytes(b"PAR1")
    code, said = end(start(model, data, tmp_path / "out"))
    assert code == 0 and "2 files of the output had gone or changed" in said, said
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
    code, said = end(start(model, data, tmp_path / "out", ray_options={"address": "local", "num_cpus": 0}))
    assert code != 0 and "CPUs" in said


def test_an_error_of_the_data_is_one_line(model, data, tmp_path):
    code, said = end(start(model, data, tmp_path / "out", on_error="stop"))
    assert code != 0 and "b.csv, row 321" in said


# -- thirty kills


FORKS = """
import json, os, sys
import pyarrow.parquet, pyarrow.csv, scipy.special, torch, ray, ray.data
import vbdl, vbdl.batch.predicting, vbdl.batch.ray, vbdl.tabular
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        model, data, out, options = json.loads(line)
        sys.stdout = sys.stderr
        try:
            vbdl.predict_table(model, data, out, engine="ray", **options)
        except BaseException as error:
            print(error, flush=True)
            os._exit(1)
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Cluster:
    """A Ray cluster of two CPUs that outlives the drivers, and drivers forked from a process that has imported all.

    Every process of it carries a mark in its environment, so that no other is ever killed.
    """

    def __init__(self, folder):
        self.place = tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)
        self.folder, self.mark = folder, f"VBDL_TEST_CLUSTER={os.getpid()}-{time.monotonic_ns()}"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        name, _, value = self.mark.partition("=")
        self.environment = {
            **os.environ, name: value, "OMP_NUM_THREADS": "1", "RAY_ADDRESS": self.address,
            "RAY_USAGE_STATS_ENABLED": "0", "PYTHONWARNINGS": "ignore",
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32),
            # a busy machine is no dead one
            "RAY_raylet_start_wait_time_s": "240", "RAY_health_check_failure_threshold": "100",
        }  # fmt: skip
        self.errors = open(folder / "said.txt", "a")  # noqa: SIM115
        self.forker: Any = None

    def start(self):
        port = self.address.rpartition(":")[2]
        # a folder of its own, with a short path for the sockets in it: in Ray's, it would leave the address of a dead
        # cluster, which every ray.init after it takes for a living one
        command = [Path(sys.executable).with_name("ray"), "start", "--head", f"--port={port}", "--num-cpus=2",
                   "--include-dashboard=false", "--node-ip-address=127.0.0.1",
                   f"--temp-dir={self.place.name}"]  # fmt: skip
        without = {k: v for k, v in self.environment.items() if k != "RAY_ADDRESS"}
        subprocess.run(command, env=without, check=True, stdout=subprocess.DEVNULL, timeout=300)
        self.forker = subprocess.Popen([sys.executable, "-c", FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                       stderr=self.errors, text=True, env=self.environment)  # fmt: skip

    def run(self, *arguments):
        """The process id of a driver that was started."""
        self.forker.stdin.write(json.dumps(arguments) + "\n")
        self.forker.stdin.flush()
        return int(self.forker.stdout.readline())

    def ended(self):
        """Its exit code."""
        return int(self.forker.stdout.readline())

    def running(self, name=""):
        """Process ids of what carries the mark and has this in its name."""
        found = []
        for path in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                ours = path.name.isdigit() and self.mark.encode() in (path / "environ").read_bytes().split(b"\0")
                if ours and name in (path / "cmdline").read_bytes().decode(errors="replace"):
                    found.append(int(path.name))
        return found

    def kill(self, *pids):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def kill_all(self):
        while pids := [p for p in self.running() if p != os.getpid()]:
            self.kill(*pids)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.forker.wait(1) if self.forker else time.sleep(0.1)


@pytest.fixture
def cluster(tmp_path):
    found = Cluster(tmp_path)
    try:
        found.start()
        yield found
    finally:
        found.kill_all()
        found.errors.close()
        found.place.cleanup()


def test_thirty_kills_of_drivers_actors_and_whole_clusters(cluster, model, data, tmp_path):
    """Each at a random number of parts; nothing is lost, doubled or half-written, and the end is the local engine's."""
    options = {**OPTIONS, "chunk_rows": 20}
    vbdl.predict_table(model, data, tmp_path / "local", **{**options, "workers": 1})
    expected = contents(tmp_path / "local")
    at, trial, kills = random.Random(0), 0, {"driver": 0, "actor": 0, "cluster": 0}
    finished, in_between, run = 0, 0, 0
    while sum(kills.values()) < 30 or finished < 2:
        out = tmp_path / f"out-{trial}"
        last = None if sum(kills.values()) >= 30 else "cluster" if run % 6 == 5 else "driver"
        driver, run = cluster.run(str(model), str(data), str(out), options), run + 1
        for blow in [*["actor"] * (at.randint(0, 2) if last else 0), last]:
            there = parts_of(out)
            until = there + at.randint(1, 30)
            while blow and Path(f"/proc/{driver}").exists() and parts_of(out) < until:
                time.sleep(0.005)
            if blow is None or not Path(f"/proc/{driver}").exists():
                break
            if blow == "actor":
                actors = cluster.running("ray::MapWorker(MapBatches(_Actor))")
                if not actors:
                    continue
                cluster.kill(at.choice(actors))
            elif blow == "driver":
                cluster.kill(driver)
            else:
                cluster.kill_all()
            kills[blow] += 1
            print(f"{blow} killed with {parts_of(out)} parts there, run {run}", flush=True)
            in_between += 0 < parts_of(out) < len(expected) - 2
            check_whole(out)
        if last == "cluster" and not cluster.running():
            cluster.start()
            continue
        code = cluster.ended()
        said = (tmp_path / "said.txt").read_text()
        assert code in (0, -signal.SIGKILL) or "are free" in said[-2000:], said[-2000:]
        if code == 0:
            assert contents(out) == expected
            trial, finished = trial + 1, finished + 1
        else:
            time.sleep(1)  # Ray ends the actors of a dead driver
    print(kills, f"{in_between} with some parts and not all, {finished} jobs brought to their end in {run} runs")
    assert kills["actor"] >= 5 and kills["driver"] >= 5 and kills["cluster"] >= 1 and in_between >= 15, kills


def parts_of(out):
    return len([p for p in out.rglob("*-*.parquet") if not p.name.startswith(".")])


def check_whole(out):
    """Every part that a reader would see can be read, and no row of a source is in two of them."""
    seen = set()
    for path in out.rglob("*-*.parquet"):
        if path.name.startswith("."):
            continue
        rows = {(path.name.rpartition("-")[0], r) for r in pa.parquet.read_table(path)["row_id"].to_pylist()}
        assert not rows & seen
        seen |= rows
