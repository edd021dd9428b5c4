"""Damaged and hostile artifacts: each is refused with a reason, in moments, and none runs code.

An audit hook watches for unpickling, processes, sockets and for imports of the packages that an artifact names.
"""

import hashlib
import io
import json
import os
import pickle
import struct
import sys
import time
import zipfile

import pytest
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import nn

import vbdl
from vbdl.artifact import ArtifactError
from vbdl.decision import Referral

FORBIDDEN = (
    "pickle.find_class",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "subprocess.Popen",
    "socket.connect",
    "shutil",
)
watched: list[str] | None = None


def _audit(event: str, args: tuple) -> None:
    if watched is not None and (
        event.startswith(FORBIDDEN) or (event == "import" and str(args[0]).partition(".")[0] in ("antigravity", "this"))
    ):
        watched.append(f"{event} {args}")


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory) -> dict[str, dict[str, bytes]]:
    """The files of a sound artifact of each kind, by name."""
    sys.addaudithook(_audit)  # cannot be removed, so it listens only while a test says so
    net = lambda: nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Dropout(0.2), nn.Linear(7, 3))
    posteriors = {
        "dropout": vbdl.MCDropout(net()),
        "mean-field": vbdl.MeanField(net(), 50),
        "ensemble": vbdl.DeepEnsemble([net() for _ in range(3)]),
    }
    found = {}
    for name, q in posteriors.items():
        q.training_rows = torch.arange(11)
        predict = vbdl.with_decision(vbdl.Predictor(q, vbdl.Categorical(), compile=False), Referral("total", 0.5))
        folder = predict.save(tmp_path_factory.mktemp("sound") / name, example=torch.zeros(1, 5))
        found[name] = {f.name: f.read_bytes() for f in folder.iterdir()}
    return found


def lay(folder, files: dict[str, bytes]):
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def refused(folder, reason: str) -> None:
    """Refused with this reason, with no forbidden event and nothing written beside.

    Not slowly either: what a hostile file could make last would last minutes, and a busy machine takes seconds.
    """
    global watched
    before = {p: p.lstat().st_mtime_ns for p in folder.parent.rglob("*")}
    watched = []
    started = time.process_time()
    try:
        with pytest.raises(ArtifactError, match=reason) as caught:
            vbdl.load(folder)
    finally:
        events, watched = watched, None
    assert time.process_time() - started < 30, "it took too long"
    assert not events, events
    assert len(str(caught.value)) < 1000 and str(caught.value).isprintable()
    assert {p: p.lstat().st_mtime_ns for p in folder.parent.rglob("*")} == before


def test_the_sound_ones_load(artifacts, tmp_path):
    for name, files in artifacts.items():
        assert vbdl.load(lay(tmp_path / name, files)).manifest.training_rows == 11


def test_the_watch_sees(tmp_path):
    global watched
    watched = []
    try:
        assert pickle.loads(pickle.dumps(print)) is print
        os.system("true")
    finally:
        events, watched = watched, None
    assert [e.split()[0] for e in events] == ["pickle.find_class", "os.system"]


# -- the manifest


def edited(files: dict[str, bytes], change) -> dict[str, bytes]:
    manifest = json.loads(files["manifest.json"])
    change(manifest)
    return {**files, "manifest.json": json.dumps(manifest).encode()}


def put(path: str, value):
    """Sets one value of the manifest: "posterior.seed" -> value."""

    def change(manifest):
        *way, last = path.split("/")
        for key in way:
            manifest = manifest[int(key) if isinstance(manifest, list) else key]
        if isinstance(manifest, list):
            manifest[int(last)] = value
        else:
            manifest[last] = value

    return change


def drop(path: str):
    def change(manifest):
        *way, last = path.split("/")
        for key in way:
            manifest = manifest[key]
        del manifest[last]

    return change


LAYERS = "posterior/network/root/children"
MANIFESTS = {
    "no format": ("dropout", drop("format"), "no format number"),
    "format as text": ("dropout", put("format", "1"), "no format number"),
    "format true": ("dropout", put("format", True), "no format number"),
    "future format": ("dropout", put("format", 2), "format 2.*newer vbdl"),
    "past format": ("dropout", put("format", 0), "format 0"),
    "other noise": ("dropout", put("versions/noise", 2), "version 2 of the noise generator"),
    "unknown field": ("dropout", put("execute", "rm -rf /"), "unknown field `execute`"),
    "unknown field inside": ("dropout", put("posterior/hook", "os:system"), "unknown field `hook`"),
    "unknown method": ("dropout", put("posterior/type", "Pickled"), "Invalid value"),
    "missing field": ("dropout", drop("likelihood"), "missing required field `likelihood`"),
    "seed too large": ("dropout", put("settings/seed", 2**63), "seed"),
    "no draws": ("dropout", put("settings/n_samples", 0), "n_samples"),
    "negative tile": ("dropout", put("settings/tiles", [-64]), "tiles"),
    "no tiles": ("dropout", put("settings/tiles", []), "tiles"),
    "more draws than members": ("ensemble", put("settings/n_samples", 4), "only 3 different draws"),
    "autocast to a class": ("dropout", put("settings/autocast", "os.system"), "autocast"),
    "autocast to integers": ("dropout", put("settings/autocast", "I64"), "autocast"),
    "a layer in no list": ("dropout", put(f"{LAYERS}/0/name", "Module"), "not among the layers"),
    "a function for a layer": ("dropout", put(f"{LAYERS}/0/name", "os.system"), "not among the layers"),
    "torch.load for a layer": ("dropout", put(f"{LAYERS}/0/name", "utils.skip_init"), "not among the layers"),
    "a layer's unknown argument": ("dropout", put(f"{LAYERS}/0/arguments/device", "cuda"), "no argument 'device'"),
    "an argument that is an object": ("dropout", put(f"{LAYERS}/2/arguments/p", {"a": 1}), "Dropout|dict"),
    "an argument out of range": ("dropout", put(f"{LAYERS}/2/arguments/p", 2.0), "Dropout cannot be built"),
    "a layer of 8 EiB": ("dropout", put(f"{LAYERS}/0/arguments/in_features", 2**60), "Linear|shape"),
    "a layer of 4 TiB": ("dropout", put(f"{LAYERS}/0/arguments/out_features", 2**38), "shape"),
    "a convolution instead": (
        "dropout",
        put(f"{LAYERS}/0", {"name": "Conv1d", "arguments": {"in_channels": 5, "out_channels": 7, "kernel_size": 1}}),
        "shape",
    ),
    "layers in a leaf": (
        "dropout",
        put(f"{LAYERS}/1/children", {"0": {"name": "ReLU"}}),
        "layers inside, which only a Sequential has",
    ),
    "a layer's name with a dot": (
        "dropout",
        put(f"{LAYERS}/0.weight", {"name": "ReLU"}),
        "is not a valid name of a layer",
    ),
    "a missing layer": ("dropout", drop(f"{LAYERS}/3"), "shape None"),
    "tied to nothing": ("dropout", put("posterior/network/ties", {"0.weight": "9.weight"}), "cannot be tied"),
    "tied to another shape": (
        "dropout",
        put("posterior/network/ties", {"0.weight": "3.weight"}),
        "their shapes differ",
    ),
    "import of a stranger": (
        "dropout",
        put("posterior/network", {"type": "reference", "target": "antigravity:x", "arguments": {}, "settings": {}}),
        "runs code",
    ),
    "import of vbdl's command line": (
        "dropout",
        put("posterior/network", {"type": "reference", "target": "vbdl.cli:main", "arguments": {}, "settings": {}}),
        "runs code",
    ),
    "import of vbdl's __main__": (
        "dropout",
        put(
            "posterior/network", {"type": "reference", "target": "vbdl.cli.__main__:x", "arguments": {}, "settings": {}}
        ),
        "runs code",
    ),
    "through vbdl to os": (
        "dropout",
        put(
            "posterior/network",
            {"type": "reference", "target": "vbdl.training.checkpoint:os.system", "arguments": {}, "settings": {}},
        ),
        "runs code",
    ),
    "a target that is an expression": (
        "dropout",
        put("posterior/network", {"type": "reference", "target": "os:system('x')", "arguments": {}, "settings": {}}),
        "regex",
    ),
    "a network to be given": (
        "dropout",
        put("posterior/network", {"type": "supplied", "name": "MyNet", "settings": {}}),
        "does not describe",
    ),
    "deterministic: a class to import": ("dropout", put("posterior/deterministic", ["type:this.X"]), "no module"),
    "deterministic: no such module": ("dropout", put("posterior/deterministic", ["9"]), "no module"),
    "a rate above 1": ("dropout", put("posterior/p", 1.5), "posterior.p|Expected"),
    "a billion members": ("ensemble", put("posterior/members/0/count", 10**9), "count"),
    "4,096 members of 3": ("ensemble", put("posterior/members/0/count", 4096), "shape"),
    "no members": ("ensemble", put("posterior/members", []), "members"),
    "a prior that is text": ("mean-field", put("posterior/priors/0.weight", "N(0,1)"), "priors"),
    "a prior of two numbers": ("mean-field", put("posterior/priors/0.weight", [1.0, 2.0]), "1 or 3 constants"),
    "a negative prior": ("mean-field", put("posterior/priors/0.weight", [-1.0]), "positive"),
    "a prior on nothing": ("mean-field", put("posterior/priors/9.weight", [1.0]), "9.weight"),
    "n_data 0": ("mean-field", put("posterior/n_data", 0), "n_data"),
    "a likelihood that is a function": (
        "dropout",
        put("likelihood/class", "os.system"),
        "not a class that can be stored",
    ),
    "a likelihood to import": ("dropout", put("likelihood/class", "antigravity:X"), "runs code"),
    "a decision to import": (
        "dropout",
        put("likelihood/arguments/decision", {"module": {"class": "this:X", "arguments": {}}}),
        "runs code",
    ),
    "a layer to import": ("dropout", put(f"{LAYERS}/1", {"name": "antigravity:X"}), "runs code"),
    "a layer of vbdl to import": ("dropout", put(f"{LAYERS}/1", {"name": "vbdl.cli:main"}), "runs code"),
    "a method to import": (
        "dropout",
        lambda m: m.update(
            posterior={
                "type": "registered",
                "name": "antigravity:X",
                "network": m["posterior"]["network"],
                "arguments": {},
            }
        ),
        "runs code",
    ),
    "a method that is an expression": (
        "dropout",
        lambda m: m.update(posterior={"type": "registered", "name": "os:system('x')", "network": {}, "arguments": {}}),
        "regex",
    ),
    "a calibrator for a likelihood": (
        "dropout",
        put("likelihood", {"class": "Referral", "arguments": {}}),
        "likelihood",
    ),
    "a likelihood's unknown argument": ("dropout", put("likelihood/arguments/command", "x"), "no argument"),
    "a likelihood inside that is none": (
        "dropout",
        put("likelihood/arguments/likelihood", {"module": {"class": "Linear", "arguments": {}}}),
        "not a class that can be stored",
    ),
    "a tensor in the manifest only": (
        "dropout",
        put("tensors/posterior.x", {"dtype": "F32", "shape": [1]}),
        "posterior.x|'x'",
    ),
    "a tensor in the file only": ("dropout", drop("tensors/training_rows"), "training_rows"),
    "a negative shape": ("dropout", put("tensors/training_rows/shape", [-1]), "shape"),
    "a huge empty shape": ("dropout", put("tensors/training_rows/shape", [2**60, 0]), "shape"),
    "65 axes": ("dropout", put("tensors/training_rows/shape", [1] * 65), "shape"),
    "shapes exchanged": ("dropout", put("tensors/posterior.module.inner.0.weight/shape", [5, 7]), "shape"),
    "another dtype": ("dropout", put("tensors/training_rows/dtype", "F64"), "is I64, the manifest says F64"),
    "a dtype that is none": ("dropout", put("tensors/training_rows/dtype", "OBJECT"), "I64"),
    "a control character in a name": ("dropout", put("tensors/a\x00b", {"dtype": "F32", "shape": [1]}), "manifest"),
    "another digest": ("dropout", put("file_sha256", "0" * 64), "damaged or replaced"),
    "a digest that is a path": ("dropout", put("file_sha256", "../../etc/passwd"), "regex"),
    "a size that is none": ("dropout", put("file_bytes", 2**62), "file_bytes"),
    "fewer training rows": ("dropout", put("training_rows", 3), "fingerprints"),
    "10,001 names": (
        "dropout",
        lambda m: m["tensors"].update({f"posterior.{i}": {"dtype": "F32", "shape": [0]} for i in range(10_001)}),
        "at most 10000 are allowed",
    ),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_hostile_manifest(case, artifacts, tmp_path):
    kind, change, reason = MANIFESTS[case]
    refused(lay(tmp_path / "model", edited(artifacts[kind], change)), reason)


RAW = {
    "empty": (lambda m: b"", "not JSON"),
    "a list": (lambda m: b"[]", "holds a list"),
    "cut short": (lambda m: m[: len(m) // 2], "not JSON"),
    "not UTF-8": (lambda m: m[:50] + b"\xff\xfe" + m[50:], "not JSON"),
    "a pickle": (lambda m: pickle.dumps(print), "not JSON"),
    "twice the same key": (lambda m: m.replace(b"{", b'{"format": 2,', 1), "occurs twice"),
    "twice the same key inside": (lambda m: m.replace(b'"seed":', b'"seed": 5, "seed":', 1), "occurs twice"),
    "NaN": (lambda m: m.replace(b'"seed":', b'"x": NaN, "seed":', 1), "not a valid number in JSON"),
    "1e999": (lambda m: m.replace(b'"seed":', b'"x": 1e999, "seed":', 1), "not a valid number in JSON"),
    "100,000 deep": (lambda m: b"[" * 100_000 + b"]" * 100_000, "not JSON"),
    "an object 100,000 deep": (lambda m: b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "not JSON"),
    "a number of 100,000 digits": (lambda m: b'{"format":' + b"9" * 100_000 + b"}", "not JSON"),
    "17 MiB": (lambda m: m + b" " * (17 * 2**20), "bytes, more than"),
}


@pytest.mark.parametrize("case", RAW)
def test_a_manifest_that_is_none(case, artifacts, tmp_path):
    change, reason = RAW[case]
    files = artifacts["dropout"]
    refused(lay(tmp_path / "model", {**files, "manifest.json": change(files["manifest.json"])}), reason)


# -- the tensors, with a manifest that an attacker has brought in line as far as it goes


def resealed(files: dict[str, bytes], data: bytes, change=lambda m: None) -> dict[str, bytes]:
    def reseal(manifest):
        manifest["file_bytes"], manifest["file_sha256"] = len(data), hashlib.sha256(data).hexdigest()
        change(manifest)

    return {**edited(files, reseal), "model.safetensors": data}


def with_header(data: bytes, change, keep_length: bool = False) -> bytes:
    """The file with its header changed by `change`, as an object or as bytes."""
    length = struct.unpack("<Q", data[:8])[0]
    header = change(json.loads(data[8 : 8 + length]))
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def in_header(path: str, value):
    def change(header):
        put(path, value)(header)
        return header

    return lambda data: with_header(data, change)


def moved(header, by: int = 4):
    header["training_rows"]["data_offsets"] = [o + by for o in header["training_rows"]["data_offsets"]]
    return header


def overlapping(header):
    names = [n for n in header if header[n]["shape"] == [7]] or list(header)
    header["posterior.module.inner.3.bias"]["data_offsets"] = header[names[0]]["data_offsets"]
    return header


def exchanged(data: bytes) -> bytes:
    """The values of a tensor in another order; everything else as it was."""
    tensors = load_tensors(data)
    name = "posterior.module.inner.0.bias"
    return save_tensors({**tensors, name: tensors[name].flip(0).contiguous()})


W = "posterior.module.inner.0.weight"
TENSORS = {
    "cut short": (lambda d: d[:-1], False, "truncated or replaced"),
    "cut in the header": (lambda d: d[:20], False, "truncated or replaced"),
    "empty": (lambda d: b"", False, "truncated or replaced"),
    "a byte more": (lambda d: d + b"x", False, "truncated or replaced"),
    "one bit flipped": (lambda d: d[:-1] + bytes([d[-1] ^ 1]), False, "damaged or replaced"),
    "values in another order": (exchanged, False, "damaged or replaced"),
    "a pickle": (lambda d: pickle.dumps({W: print}), True, "header"),
    "a zip of torch.save": (lambda d: _torch_save({W: torch.zeros(7, 5)}), True, "header"),
    "a zip with ../": (lambda d: _zip({"../../evil.py": b"import os"}), True, "header"),
    "a header of 2^63 bytes": (lambda d: struct.pack("<Q", 2**63) + d[8:], True, "header"),
    "a header longer than the file": (lambda d: struct.pack("<Q", len(d)) + d[8:], True, "header"),
    "a header of 0 bytes": (lambda d: struct.pack("<Q", 0) + d[8:], True, "header"),
    "a header of 100 MB": (lambda d: with_header(d, lambda h: json.dumps(h).encode() + b" " * 10**8), True, "header"),
    "a header that is no JSON": (lambda d: with_header(d, lambda h: b"{" * 100), True, "not JSON"),
    "a header that is a list": (lambda d: with_header(d, lambda h: b"[]"), True, "not a JSON object"),
    "400,000 names": (
        lambda d: with_header(
            d,
            lambda h: {
                **h,
                **{f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(400_000)},
            },
        ),
        True,
        "header",
    ),
    "20,000 names": (
        lambda d: with_header(
            d,
            lambda h: {**h, **{f"{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(20_000)}},
        ),
        True,
        "at most 10000 are allowed",
    ),
    "twice the same name": (
        lambda d: with_header(d, lambda h: json.dumps(h).encode()[:-1] + b',"training_rows":{}}'),
        True,
        "occurs twice",
    ),
    "a name with ../": (
        lambda d: with_header(d, lambda h: {("../../x" if n == W else n): v for n, v in h.items()}),
        True,
        "name different tensors",
    ),
    "another shape": (in_header(f"{W}/shape", [5, 7]), True, "the manifest says"),
    "a shape of 2^60 x 0": (in_header(f"{W}/shape", [2**60, 0]), True, "the manifest says"),
    "a negative shape": (in_header(f"{W}/shape", [-7, -5]), True, "the manifest says"),
    "another dtype": (in_header(f"{W}/dtype", "I32"), True, "the manifest says"),
    "offsets out of the file": (in_header(f"{W}/data_offsets", [10**9, 10**9 + 140]), True, "starts at byte"),
    "negative offsets": (in_header(f"{W}/data_offsets", [-140, 0]), True, "starts at byte"),
    "offsets that are text": (in_header(f"{W}/data_offsets", ["0", "140"]), True, "are not two ints"),
    "offsets that do not fit": (in_header(f"{W}/data_offsets", [0, 4]), True, "needs 140 bytes"),
    "overlapping tensors": (lambda d: with_header(d, overlapping), True, "needs|starts at byte"),
    "a hole": (lambda d: with_header(d, moved) + b"\0" * 4, True, "starts at byte|its data has"),
    "an entry more": (in_header(f"{W}/loader", "os.system"), True, "must have exactly dtype, shape and data_offsets"),
}


def _torch_save(value) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _zip(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


@pytest.mark.parametrize("case", TENSORS)
def test_a_hostile_file_of_tensors(case, artifacts, tmp_path):
    change, reseal, reason = TENSORS[case]
    files = artifacts["dropout"]
    data = change(files["model.safetensors"])
    files = resealed(files, data) if reseal else {**files, "model.safetensors": data}
    refused(lay(tmp_path / "model", files), reason)


def rewritten(name: str, value: torch.Tensor):
    """One tensor exchanged, in the file and in the manifest: both agree, and the network described does not."""

    def change(files):
        tensors = {**load_tensors(files["model.safetensors"]), name: value}
        codes = {torch.float32: "F32", torch.float64: "F64", torch.int64: "I64", torch.bool: "BOOL", torch.int32: "I32"}
        entry = {"dtype": codes[value.dtype], "shape": list(value.shape)}
        return resealed(files, save_tensors(tensors), put(f"tensors/{name}", entry))

    return change


CONSISTENT = {
    "NaN weights": (rewritten(W, torch.full((7, 5), torch.nan)), "not finite"),
    "an infinite weight": (rewritten(W, torch.full((7, 5), torch.inf)), "not finite"),
    "integer weights": (rewritten(W, torch.ones(7, 5, dtype=torch.int64)), "is torch.int64 in the file"),
    "float steps": (rewritten("posterior.steps", torch.tensor(1.0)), "is torch.float32 in the file"),
    "narrower weights": (rewritten(W, torch.ones(7, 4)), "shape"),
    "a tensor of nothing": (rewritten("elsewhere", torch.ones(2)), "neither to the posterior nor to the likelihood"),
    "a tensor the posterior has not": (rewritten("posterior.extra", torch.ones(2)), "'extra' has shape None"),
    "a tensor the likelihood has not": (rewritten("likelihood.extra", torch.ones(2)), "no tensor 'extra'|described"),
    "a NaN threshold": (
        rewritten("likelihood.decision.threshold", torch.tensor(torch.nan, dtype=torch.float64)),
        "NaN",
    ),
    "six thresholds for one": (
        rewritten("likelihood.decision.threshold", torch.zeros(3, 2, dtype=torch.float64)),
        "likelihood",
    ),
    "float fingerprints": (rewritten("training_rows", torch.zeros(11)), "fingerprints"),
}


@pytest.mark.parametrize("case", CONSISTENT)
def test_files_that_agree_on_a_lie(case, artifacts, tmp_path):
    change, reason = CONSISTENT[case]
    refused(lay(tmp_path / "model", change(artifacts["dropout"])), reason)


# -- the folder


def test_a_folder_that_is_none(artifacts, tmp_path):
    files = artifacts["dropout"]
    refused(tmp_path / "nowhere", "does not exist")
    (tmp_path / "file").write_bytes(b"x")
    refused(tmp_path / "file", "is a file")
    refused(lay(tmp_path / "empty", {}), "has no manifest.json")
    refused(lay(tmp_path / "half", {"manifest.json": files["manifest.json"]}), "has no model.safetensors")


@pytest.mark.parametrize("name", ["model.pkl", "pytorch_model.bin", "model.pt2", "code.py", "..\\evil", "x.so", "a\nb"])
def test_a_file_that_no_artifact_holds(name, artifacts, tmp_path):
    files = {**artifacts["dropout"], name: pickle.dumps(print)}
    refused(lay(tmp_path / "model", files), "so nothing was read: an artifact holds only")


@pytest.mark.parametrize("name", ["manifest.json", "model.safetensors", "README.md"])
@pytest.mark.parametrize("kind", ["symbolic link", "absolute link", "folder", "pipe"])
def test_a_file_that_is_something_else(name, kind, artifacts, tmp_path):
    files = dict(artifacts["dropout"])
    secret = lay(tmp_path / "elsewhere", {"data": files.pop(name)}) / "data"
    folder = lay(tmp_path / "model", files)
    if kind == "symbolic link":
        (folder / name).symlink_to("../elsewhere/data")
    elif kind == "absolute link":
        (folder / name).symlink_to(secret.resolve())
    elif kind == "folder":
        (folder / name).mkdir()
    else:
        os.mkfifo(folder / name)
    if name == "README.md" and kind in ("folder", "pipe"):
        vbdl.load(folder)  # never opened
    else:
        refused(folder, "symbolic link|not a regular file")
