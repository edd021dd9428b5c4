"""A kill between any two steps that change the disk: the same command again ends as if there had been none."""

import builtins
import contextlib
import io
import os
import shutil
import sys

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest

import vbdl

OPTIONS = {"chunk_rows": 4, "tile": 64, "compile": False, "progress": False, "workers": 1}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Killed(BaseException):
    """What SIGKILL leaves behind: nothing that this process does later reaches the disk."""


class Steps:
    """Counts the steps of a process that change the disk, and kills it before the one that is told.

    Every way that Python has to the names and the contents of files; Arrow writes by itself, into files that have been
    opened here before, and is stopped by the step that names or syncs them.
    """

    NAMES = ["replace", "rename", "unlink", "remove", "mkdir", "rmdir", "link", "symlink", "fsync", "truncate"]
    NAMES += ["ftruncate", "write", "utime", "chmod"]

    def __init__(self, patch, folder, last=None):
        self.taken: list[str] = []
        self.folder, self.last, self.dead = str(folder), last, False
        for name in self.NAMES:
            patch.setattr(os, name, self.counted(getattr(os, name), name))
        patch.setattr(os, "open", self.counted(os.open, "open", lambda path, flags=0, *a, **k: flags & WRITES))
        opened = self.counted(
            open, "open", lambda path, mode="r", *a, **k: not isinstance(path, int) and set(mode) & set("wax+")
        )
        patch.setattr(builtins, "open", opened)
        patch.setattr(io, "open", opened)

    def counted(self, call, name, changes=lambda *a, **k: True):
        def step(*arguments, **options):
            if changes(*arguments, **options) and self.concerns(arguments[0]):
                if self.dead or len(self.taken) == self.last:
                    self.dead = True
                    raise Killed
                self.taken.append(name)
            return call(*arguments, **options)

        return step

    def concerns(self, place):
        if isinstance(place, int):
            with contextlib.suppress(OSError):
                place = os.readlink(f"/proc/self/fd/{place}")
        return isinstance(place, str | os.PathLike) and os.fspath(place).startswith(self.folder)


def table(rows, seed=0):
    a, b = np.random.default_rng(seed).normal(size=(2, rows))
    return pa.table({"id": [f"{i:03d}" for i in range(rows)], "a": a, "b": b})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two files of 6 and 3 rows, one of which is to be quarantined; a third cannot be read."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "deep").mkdir()
    pa.csv.write_csv(table(6), folder / "a.csv")
    pa.csv.write_csv(table(3, 1), folder / "deep" / "b.csv")
    lines = (folder / "a.csv").read_text().splitlines()
    lines[2] = '"001",oops,1'
    (folder / "a.csv").write_text("\n".join(lines) + "\n")
    (folder / "c.csv").write_text('"id","a"\n1,2\n')
    return folder


def contents(folder):
    """Every file and folder, hidden ones too."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in sorted(folder.rglob("*"))
        if p.name != "_lock"
    }


def counts(report):
    return [getattr(report, k) for k in ("rows", "rejected", "parts", "failed", "unseen", "filled", "reasons")]


def nothing(folder, network, data):
    pass


def another_job(out):
    """Leaves the output of another job, with a quarantine, which is to be written over."""

    def prepare(folder, network, data):
        vbdl.predict_table(network, data / "a.csv", folder / out, keep=("id",), inputs=("a", "b"), **OPTIONS)

    return prepare


def damaged(folder, network, data):
    """A finished job, one part of which is cut since, and one is gone."""
    vbdl.predict_table(network, data, folder / "out", keep=("id",), inputs=("a", "b"), **OPTIONS)
    (folder / "out" / "a-00001.parquet").write_bytes(b"PAR1")
    (folder / "out" / "deep" / "b-00000.parquet").unlink()


def cut_off(folder, network, data):
    """A finished file that was cut since."""
    vbdl.predict_table(network, data, folder / "out.csv", keep=("id",), inputs=("a", "b"), **OPTIONS)
    (folder / "out.csv").write_bytes((folder / "out.csv").read_bytes()[:50])


# into a folder and into one file: from nothing and over another job each, and damaged since in the folder, which holds
# more to find again
@pytest.mark.parametrize(
    "out, prepare, options",
    [
        ("out", nothing, {}),
        ("out.csv", nothing, {}),
        ("out", another_job("out"), {"restart": True}),
        ("out.parquet", another_job("out.parquet"), {"restart": True}),
        ("out", damaged, {}),
        pytest.param("out.csv", cut_off, {}, marks=pytest.mark.slow),
    ],
    ids=["folder", "csv", "folder again", "parquet again", "damaged folder", "damaged file"],
)
def test_a_job_killed_at_any_step_is_ended_by_the_same_command(network, data, tmp_path, out, prepare, options):
    given = {**OPTIONS, "keep": ("id",), "inputs": ("a", "b"), **options}
    before, whole = tmp_path / "before", tmp_path / "whole"
    before.mkdir()
    prepare(before, network, data)
    shutil.copytree(before, whole)
    with pytest.MonkeyPatch.context() as patch:
        steps = Steps(patch, whole)
        expected = vbdl.predict_table(network, data, whole / out, **given)
    end = contents(whole)
    assert len(steps.taken) > 20 and expected.rejected == 1 and list(expected.failed) == ["c.csv"]
    for last in range(len(steps.taken)):
        folder = tmp_path / str(last)
        shutil.copytree(before, folder)
        with pytest.MonkeyPatch.context() as patch:
            killed = Steps(patch, folder, last)
            with pytest.raises(Killed):
                vbdl.predict_table(network, data, folder / out, **given)
        said = f"killed before step {last}, {steps.taken[last]}, after {killed.taken[-3:]}"
        report = vbdl.predict_table(network, data, folder / out, **given)
        assert contents(folder) == end, said
        assert counts(report) == counts(expected), said


def test_another_job_in_the_place_of_a_killed_one_has_nothing_of_it(network, data, tmp_path):
    """--restart with another input, after a kill at any step of a job: no part, no quarantine, no folder is left."""
    whole = tmp_path / "whole"
    with pytest.MonkeyPatch.context() as patch:
        steps = Steps(patch, tmp_path)
        vbdl.predict_table(network, data, tmp_path / "first", inputs=("a", "b"), **OPTIONS)
    again = {**OPTIONS, "inputs": ("a", "b"), "restart": True}
    vbdl.predict_table(network, data / "deep", whole, **again)
    for last in range(len(steps.taken)):
        out = tmp_path / str(last)
        with pytest.MonkeyPatch.context() as patch:
            Steps(patch, tmp_path, last)
            with pytest.raises(Killed):
                vbdl.predict_table(network, data, out, inputs=("a", "b"), **OPTIONS)
        vbdl.predict_table(network, data / "deep", out, **again)
        assert contents(out) == contents(whole), (last, steps.taken[:last][-3:])


AUDITED = {"os.rename": ("replace", "rename"), "os.remove": ("unlink", "remove"), "os.mkdir": ("mkdir",)}
AUDITED |= {"os.rmdir": ("rmdir",), "os.link": ("link",), "os.symlink": ("symlink",), "open": ("open",)}
EVENTS: list[list[str]] = []  # the innermost list gets what happens


def listen(event, arguments):
    if EVENTS and event in AUDITED and (event != "open" or (arguments[2] or 0) & WRITES):
        EVENTS[-1].append((event, arguments[0]))


sys.addaudithook(listen)


@pytest.mark.parametrize("out", ["out", "out.csv", "out.npy", "out.arrow", "out.parquet"])
def test_every_step_of_python_is_counted(network, data, tmp_path, out):
    """A way to change the disk that Steps does not know would be a step at which no kill is tried."""
    EVENTS.append([])
    try:
        with pytest.MonkeyPatch.context() as patch:
            steps = Steps(patch, tmp_path)
            vbdl.predict_table(network, data, tmp_path / out, inputs=("a", "b"), **OPTIONS)
    finally:
        events = [event for event, place in EVENTS.pop() if steps.concerns(place)]
    for event, names in AUDITED.items():
        assert events.count(event) == sum(map(steps.taken.count, names)), event
