"""Records of a job that a stranger, an unlucky operator or a bad disk has changed."""

import json
import os
import random
import shutil
import time

import numpy as np
import pytest
import torch

import vbdl
import vbdl.batch.writing as writing
from vbdl.batch.records import job_of, signed

OPTIONS = {"chunk_rows": 10, "tile": 64, "compile": False, "progress": False, "workers": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """45 rows, three of which cannot be used."""
    x = np.random.default_rng(0).normal(size=(45, 2)).astype(np.float32)
    x[[3, 4, 31]] = np.nan
    folder = tmp_path_factory.mktemp("data")
    np.save(folder / "x.npy", x)
    return folder / "x.npy"


@pytest.fixture(scope="module")
def finished(network, data, tmp_path_factory):
    """The output of a whole job, as a folder and as a file; never written to."""
    folder = tmp_path_factory.mktemp("finished")
    for out in ("out", "out.csv"):
        vbdl.predict_table(network, data, folder / out, **OPTIONS)
    return folder


@pytest.fixture
def begun(finished, tmp_path):
    """A job that was killed before its end, all parts there."""
    out = tmp_path / "out"
    shutil.copytree(finished / "out", out)
    manifest = json.loads((out / "_manifest.json").read_text())
    with open(out / "_quarantine.jsonl", "rb") as file:
        for entry in manifest["parts"]:
            if entry["rejected"]:
                (out / "_quarantine").mkdir(exist_ok=True)
                lines = b"".join(file.readline() for _ in range(entry["rejected"]))
                (out / "_quarantine" / f"{entry['part']}.jsonl").write_bytes(lines)
    job = job_of(manifest["settings"])
    lines = [signed({"settings": manifest["settings"]}, job), *manifest["parts"]]
    (out / "_journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (out / "_manifest.json").unlink()
    (out / "_quarantine.jsonl").unlink()
    return out


def contents(folder):
    return {
        str(p.relative_to(folder)): os.readlink(p) if p.is_symlink() else p.read_bytes() if p.is_file() else None
        for p in sorted(folder.rglob("*"))
        if p.name != "_lock"
    }


def test_a_journal_of_a_whole_job_is_gone_on_with(network, data, begun, finished, monkeypatch):
    monkeypatch.setattr(vbdl.Predictor, "__call__", None)
    report = vbdl.predict_table(network, data, begun, **OPTIONS)
    assert (report.resumed, report.rows, report.rejected, report.damaged) == (5, 42, 3, [])
    assert contents(begun) == contents(finished / "out")


# -- a record that names what the job has not written

OUTSIDE = {
    "absolute": lambda folder: str(folder / "victim.txt"),
    "above": lambda folder: "../victim.txt",
    "above through a folder": lambda folder: "deep/../../victim.txt",
    "another file": lambda folder: "mine.txt",
    "its own records": lambda folder: "_lock",
    "a part of no source": lambda folder: "thesis-00000.parquet",
    "empty": lambda folder: "",
    "the folder": lambda folder: ".",
    "no name": lambda folder: "a\0b",
    "a link": lambda folder: "x-00000.parquet",
    "through a link": lambda folder: "deep/x-00000.parquet",
}


def forge(record, part, settings, kind):
    """The record with another part: signed anew, with the old check, or of the form of vbdl 0.1, without any."""
    forged = {**record, "part": part}
    if kind == "signed":
        return signed(forged, job_of(settings))
    return forged if kind == "old check" else {k: v for k, v in forged.items() if k != "check"}


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("kind", ["signed", "old check", "no check"])
@pytest.mark.parametrize("place", ["journal", "manifest", "hidden journal", "journal of another job"])
@pytest.mark.parametrize("how", OUTSIDE)
def test_no_record_deletes_what_the_job_did_not_write(
    network, data, begun, finished, tmp_path, how, place, kind, restart
):
    out, target = begun, begun
    lines = [json.loads(line) for line in (begun / "_journal.jsonl").read_text().splitlines()]
    settings = lines[0]["settings"]
    if place == "journal of another job":
        settings = {"input": [{"name": "y.npy"}], "format": "parquet"}
        lines = [{"settings": settings}]
    if place == "hidden journal":
        out, target = tmp_path / ".out.csv.parts", tmp_path / "out.csv"
        begun.rename(out)
        settings = {**settings, "format": "parquet"}
    (tmp_path / "victim.txt").write_text("precious")
    (out / "mine.txt").write_text("precious")
    (out / "thesis-00000.parquet").write_text("precious")
    if how == "a link":
        (out / "x-00000.parquet").unlink()
        (out / "x-00000.parquet").symlink_to(tmp_path / "victim.txt")
    if how == "through a link":
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "x-00000.parquet").write_text("precious")
        (out / "deep").symlink_to(tmp_path / "elsewhere")
    record = {"part": "", "source": "x.npy", "chunk": 0, "rows": 1, "rejected": 0, "bytes": 8}
    record = lines[1] if len(lines) > 1 else {**record, "sha256": "0" * 64, "check": "0" * 16}
    forged = forge(record, OUTSIDE[how](tmp_path), settings, kind)
    if place == "manifest":
        whole = json.loads((finished / "out" / "_manifest.json").read_text())
        whole = {**whole, "parts": [forged]}
        whole = (
            signed(whole, job_of(settings)) if kind == "signed" else {k: v for k, v in whole.items() if k != "check"}
        )
        (out / "_manifest.json").write_text(json.dumps(whole))
        (out / "_journal.jsonl").unlink()
    else:
        (out / "_journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (lines[0], forged)))
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="no part of it|is a link, which no job has made") as error:
        vbdl.predict_table(network, data, target, restart=restart, **OPTIONS)
    assert "\n" not in str(error.value)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "name", ["_journal.jsonl", "_manifest.json", "_lock", "_quarantine", "_quarantine/x-00000.parquet.jsonl"]
)
@pytest.mark.parametrize("restart", [False, True])
def test_links_in_the_place_of_records_are_not_followed(network, data, begun, tmp_path, name, restart):
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "x-00000.parquet.jsonl").write_text("precious")
    (tmp_path / "victim.txt").write_text("precious")
    place = begun / name
    shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
    place.symlink_to(tmp_path / ("victim" if name == "_quarantine" else "victim.txt"))
    before = contents(tmp_path / "victim")
    try:
        vbdl.predict_table(network, data, begun, restart=restart, **OPTIONS)
    except ValueError as error:
        assert "is a link" in str(error)
    assert contents(tmp_path / "victim") == before and (tmp_path / "victim.txt").read_text() == "precious"


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("name, text", [
    ("_journal.jsonl", '{"time": 1}\n'), ("_journal.jsonl", "[]\n"), ("_manifest.json", '{"files": []}'),
    ("_manifest.json", "[1, 2]"),
])  # fmt: skip
def test_records_of_another_program_are_left_alone(network, data, tmp_path, name, text, restart):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text(text)
    with pytest.raises(ValueError, match="was not written by vbdl"):
        vbdl.predict_table(network, data, out, restart=restart, **OPTIONS)
    assert (out / name).read_text() == text


@pytest.mark.parametrize("name", [
    ".notes.tmp", ".x-00000.parquet.swp", "deep/.backup.7.tmp", "_quarantine/mine.jsonl", "x.txt", "y-00000.parquet",
    "_quarantine/y-00000.parquet.jsonl", "x-00000.csv", ".y-00000.parquet.12.tmp",
])  # fmt: skip
@pytest.mark.parametrize("restart", [False, True])
def test_files_that_the_job_did_not_write_stay(network, data, begun, name, restart):
    (begun / name).parent.mkdir(exist_ok=True)
    (begun / name).write_text("precious")
    vbdl.predict_table(network, data, begun, restart=restart, **OPTIONS)
    assert (begun / name).read_text() == "precious"


@pytest.mark.parametrize("name", ["out.csv.quarantine.jsonl", "out.csv.manifest.json", "out.csv"])
def test_files_beside_an_output_that_is_a_file_stay(network, data, tmp_path, name):
    (tmp_path / name).write_text("precious")
    with pytest.raises(ValueError, match="is there already|no manifest of a job"):
        vbdl.predict_table(network, data, tmp_path / "out.csv", **OPTIONS)
    assert contents(tmp_path) == {name: b"precious"}


def test_a_part_that_somebody_replaced_is_set_aside_and_not_deleted(network, data, begun, tmp_path):
    (begun / "x-00004.parquet").write_text("my own work")
    vbdl.predict_table(network, data, begun, restart=True, **{**OPTIONS, "chunk_rows": 20})
    assert (begun / "_changed-1-x-00004.parquet").read_text() == "my own work"
    assert sorted(p.name for p in begun.glob("x-*")) == ["x-00000.parquet", "x-00001.parquet", "x-00002.parquet"]


@pytest.mark.parametrize("restart", [False, True])
def test_parts_are_not_written_through_a_link(network, tmp_path, restart):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for name in ("a.npy", "deep/b.npy"):
        np.save(tmp_path / "in" / name, np.zeros((12, 2), np.float32))
    vbdl.predict_table(network, tmp_path / "in", tmp_path / "out", **OPTIONS)
    (tmp_path / "elsewhere").mkdir()
    shutil.rmtree(tmp_path / "out" / "deep")
    (tmp_path / "out" / "deep").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="deep is a link"):
        vbdl.predict_table(network, tmp_path / "in", tmp_path / "out", restart=restart, **OPTIONS)
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_source_cannot_lead_out_of_the_folder(network, tmp_path):
    from vbdl.batch.sources import DatasetSource

    for name in ("../x", "/x", "a/../../x", "a//b"):
        with pytest.raises(ValueError, match="outside of"):
            vbdl.predict_table(network, [DatasetSource(torch.zeros(3, 2), name, False)], tmp_path / "out", **OPTIONS)
    assert not list(tmp_path.iterdir())


# -- a finished job whose files are gone or changed


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def flip_with_the_same_times(path):
    about = path.stat()
    flip(path)
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))


DAMAGES = {"gone": lambda path: path.unlink(), "cut": cut, "flipped": flip, "same times": flip_with_the_same_times}
DAMAGES["empty"] = lambda path: path.write_bytes(b"")


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["x-00001.parquet", "x-00003.parquet", "_quarantine.jsonl"])
@pytest.mark.parametrize("state", ["finished", "begun"])
def test_damaged_parts_are_computed_again(network, data, finished, begun, tmp_path, name, damage, state):
    out = begun
    if state == "finished":
        shutil.rmtree(begun)
        shutil.copytree(finished / "out", out)
    elif name == "_quarantine.jsonl":
        name = "_quarantine/x-00003.parquet.jsonl"
    DAMAGES[damage](out / name)
    report = vbdl.predict_table(network, data, out, **OPTIONS)
    expected = ["x-00000.parquet", "x-00003.parquet"] if name == "_quarantine.jsonl" else ["x-00003.parquet"]
    expected = [name] if name.startswith("x-") else expected
    if name == "_quarantine.jsonl" and damage in ("flipped", "same times", "cut"):  # in one of its lines
        expected = expected[:1] if damage != "cut" else expected[1:]
    assert report.damaged == expected and report.resumed == 5 - len(expected)
    assert "had gone or changed, and" in str(report) and expected[0] in str(report)
    assert contents(out) == contents(finished / "out")
    assert vbdl.predict_table(network, data, out, **OPTIONS).damaged == []


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["out.csv", "out.csv.quarantine.jsonl"])
def test_a_damaged_file_is_computed_again(network, data, finished, tmp_path, name, damage):
    for path in finished.glob("out.csv*"):
        shutil.copy2(path, tmp_path)
    DAMAGES[damage](tmp_path / name)
    report = vbdl.predict_table(network, data, tmp_path / "out.csv", **OPTIONS)
    assert report.damaged == [name]
    assert contents(tmp_path) == {p.name: p.read_bytes() for p in finished.glob("out.csv*")}
    assert vbdl.predict_table(network, data, tmp_path / "out.csv", **OPTIONS).damaged == []


def test_content_is_read_where_size_or_time_leave_doubt_or_it_is_asked_for(network, data, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(
        writing, "identity", lambda path, real=writing.identity: (read.append(path.name), real(path))[1]
    )
    for out in (tmp_path / "out", tmp_path / "out.csv"):
        vbdl.predict_table(network, data, out, **OPTIONS)
        parts = 5 if out.is_dir() else 2
        later = (out if out.is_dir() else tmp_path) / ("_manifest.json" if out.is_dir() else "out.csv.manifest.json")
        time.sleep(0.05)
        later.write_bytes(later.read_bytes())  # the clock has ticked since the last part was written
        for options, expected in (({}, 0), ({"verify": True}, parts), ({}, 0)):
            read.clear()
            assert vbdl.predict_table(network, data, out, **options, **OPTIONS).damaged == []
            assert len(read) == expected


def test_the_counts_of_a_resumed_job_are_the_whole_jobs(model, rows, tmp_path):
    """Of categories that training had not and of cells that were filled too, and of a job that was done before."""
    import pyarrow as pa

    words = ["new" if i % 50 == 0 else w for i, w in enumerate(rows["word"].to_pylist())]
    table = rows.set_column(3, "word", pa.array(words)).set_column(1, "a", pa.array([None, *rows["a"].to_pylist()[1:]]))
    pa.parquet.write_table(table, tmp_path / "t.parquet")
    for out in ("out", "out.csv"):
        whole = vbdl.predict_table(model, tmp_path / "t.parquet", tmp_path / out, compile=False, chunk_rows=300)
        again = vbdl.predict_table(model, tmp_path / "t.parquet", tmp_path / out, compile=False, chunk_rows=300)
        for report in (whole, again):
            assert (report.rows, report.unseen, report.filled) == (2_000, {"word": 40}, {"a": 1})
    (tmp_path / "out" / "t-00000.parquet").unlink()
    again = vbdl.predict_table(model, tmp_path / "t.parquet", tmp_path / "out", compile=False, chunk_rows=300)
    assert (again.resumed, again.unseen, again.filled) == (6, {"word": 40}, {"a": 1})


# -- a damaged journal


def noise(data, at):
    """One of many ways to damage a file: bytes changed, taken out, put in, doubled, cut off, lines swapped."""
    data, place = bytearray(data), at.randrange(len(data))
    kind = at.randrange(8)
    if kind < 3:
        data[place] = at.choice([data[place] ^ (1 << at.randrange(8)), at.randrange(256), ord("0")])
    elif kind == 3:
        del data[place : place + at.randrange(1, 60)]
    elif kind == 4:
        data[place:place] = at.randbytes(at.randrange(1, 60))
    elif kind == 5:
        del data[place:]
    elif kind == 6:
        data[place : place + 200] = bytes(min(200, len(data) - place))
    else:
        lines = bytes(data).splitlines(keepends=True)
        at.shuffle(lines)
        return b"".join(lines)
    return bytes(data)


@pytest.mark.parametrize("name", ["_journal.jsonl", "_manifest.json"])
def test_damaged_records_cost_no_more_than_their_parts(network, data, finished, begun, tmp_path, name):
    """The same command ends in the same bytes, or says in a line what to do; --restart always does."""
    source = begun if name == "_journal.jsonl" else finished / "out"
    expected, at, kept, refused = contents(finished / "out"), random.Random(0), 0, 0
    for trial in range(150):
        out = tmp_path / f"trial-{trial}"
        shutil.copytree(source, out)
        damaged = noise((out / name).read_bytes(), at)
        (out / name).write_bytes(damaged)
        try:
            report = vbdl.predict_table(network, data, out, **OPTIONS)
            kept += report.resumed
        except ValueError as error:
            refused += 1
            assert "--restart" in str(error) and "\n" not in str(error), (trial, error)
            report = vbdl.predict_table(network, data, out, restart=True, **OPTIONS)
        assert contents(out) == expected, (trial, damaged)
        assert (report.rows, report.rejected) == (42, 3)
        shutil.rmtree(out)
    # a refusal needs a first line, or a manifest, that does not say whose the parts are
    assert refused < 30 and (kept > 300 or name == "_manifest.json"), (kept, refused)


@pytest.mark.parametrize("name", ["_journal.jsonl", "_manifest.json"])
def test_restart_works_whatever_the_records_hold(network, data, finished, begun, tmp_path, name):
    source, at = begun if name == "_journal.jsonl" else finished / "out", random.Random(1)
    texts = [b"", b"\n", b"\0" * 100, b"{", b"\xff\xfe", b'{"settings": 7}\n', b'{"settings": {}}\n{"part": 3}\n']
    texts += [b"[" * 100_000, b'{"settings": {}, "parts": 3}', b'{"settings": {"input": 3, "format": []}}\n']
    texts += [noise((source / name).read_bytes(), at) for _ in range(20)]
    for number, text in enumerate(texts):
        out = tmp_path / str(number)
        shutil.copytree(source, out)
        (out / name).write_bytes(text)
        vbdl.predict_table(network, data, out, restart=True, **OPTIONS)
        assert contents(out) == contents(finished / "out"), text


@pytest.mark.parametrize("text", [b"", b"{", b"{}", b'{"settings": {}}', b"\xff", b"[]", None])
def test_restart_works_whatever_the_manifest_of_a_file_holds(network, data, finished, tmp_path, text):
    for path in finished.glob("out.csv*"):
        shutil.copy2(path, tmp_path)
    about = tmp_path / "out.csv.manifest.json"
    about.write_bytes(flipped(about.read_bytes()) if text is None else text)
    with pytest.raises(ValueError, match="--restart"):
        vbdl.predict_table(network, data, tmp_path / "out.csv", **OPTIONS)
    vbdl.predict_table(network, data, tmp_path / "out.csv", restart=True, **OPTIONS)
    assert contents(tmp_path) == {p.name: p.read_bytes() for p in finished.glob("out.csv*")}


def flipped(text):
    return text.replace(b'"rejected": 3', b'"rejected": 2', 1)


def test_a_journal_of_another_job_is_said_even_where_its_first_line_is_damaged(network, data, begun):
    lines = (begun / "_journal.jsonl").read_bytes().splitlines(keepends=True)
    (begun / "_journal.jsonl").write_bytes(b"".join([lines[0][:-50] + b"\n", *lines[1:]]))
    before = contents(begun)
    with pytest.raises(ValueError, match="do not say whether its parts are of this job.*--restart"):
        vbdl.predict_table(network, data, begun, **{**OPTIONS, "chunk_rows": 5})
    assert contents(begun) == before
    assert vbdl.predict_table(network, data, begun, **OPTIONS).resumed == 5


@pytest.mark.parametrize("state", ["finished", "begun"])
def test_records_of_the_first_version_are_read(network, data, finished, begun, tmp_path, state):
    """Without checks and without what was not counted in them."""
    out = begun
    if state == "finished":
        out = tmp_path / "finished"
        shutil.copytree(finished / "out", out)
        manifest = json.loads((out / "_manifest.json").read_text())
        del manifest["check"]
        manifest["parts"] = [
            {k: v for k, v in e.items() if k not in ("check", "quarantine")} for e in manifest["parts"]
        ]
        (out / "_manifest.json").write_text(json.dumps(manifest))
    else:
        lines = [json.loads(line) for line in (out / "_journal.jsonl").read_text().splitlines()]
        lines = [{k: v for k, v in line.items() if k not in ("check", "quarantine")} for line in lines]
        (out / "_journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = vbdl.predict_table(network, data, out, **OPTIONS)
    assert (report.resumed, report.rows, report.rejected, report.damaged) == (5, 42, 3, [])
