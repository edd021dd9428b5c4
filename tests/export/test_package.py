"""Packages: the predictor's numbers for any batch, every call checked, and nothing loaded that does not fit."""

import contextlib
import json
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from torch import nn

import vbdl
from vbdl import calibration
from vbdl.engine import program
from vbdl.export import ExportError, export, load_package, machine
from vbdl.export.package import Description, digest_of
from vbdl.likelihoods.centered import Centered

KINDS = ["dropout", "mean-field", "ensemble"]


@pytest.fixture(autouse=True, scope="module")
def _own_index(tmp_path_factory):
    """The list of packages made here is the tests', not the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def net(outputs: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Dropout(0.3), nn.Linear(12, outputs))


def cnn() -> nn.Module:
    norm = nn.BatchNorm2d(3)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), norm, nn.ReLU(), nn.Dropout2d(0.3), nn.Flatten(), nn.Linear(45, 3))


def build(kind: str, **settings) -> vbdl.Predictor:
    """A predictor of each kind, the same in every test."""
    torch.manual_seed(4)
    made = {
        "dropout": lambda: (vbdl.MCDropout(net()), vbdl.Categorical()),
        "mean-field": lambda: (vbdl.MeanField(net(), 30, initial_std=0.2), vbdl.Categorical()),
        "ensemble": lambda: (vbdl.DeepEnsemble([net() for _ in range(3)]), vbdl.Categorical()),
        "two architectures": lambda: (vbdl.DeepEnsemble([net(), nn.Sequential(net())]), vbdl.Categorical()),
        "regression": lambda: (vbdl.MeanField(net(2), 30, initial_std=0.2), vbdl.HeteroscedasticGaussian()),
        "images": lambda: (vbdl.MCDropout(cnn()), vbdl.Categorical()),
    }
    q, likelihood = made[kind]()
    settings = {"compile": False, "seed": 11, "tiles": (4,), **({} if q.n_draws else {"n_samples": 5}), **settings}
    return vbdl.Predictor(q, likelihood, **settings)


def rows(kind: str, count: int = 9) -> torch.Tensor:
    shape = (2, 7, 5) if kind == "images" else (5,)
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(6))


def assert_same(found: dict, expected, exact: bool = False) -> None:
    wanted = {n: t for n, t in vars(expected).items() if isinstance(t, torch.Tensor)}
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        tolerance = {"rtol": 0.0, "atol": 0.0} if exact else {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(found[name], value, equal_nan=True, **tolerance, msg=lambda m, n=name: f"{n}: {m}")


# -- ONNX: quick to make, so every kind


@pytest.fixture(scope="module")
def onnx_packages(tmp_path_factory):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    made = {}

    def make(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp("onnx") / "package"
            predict = build(kind)
            made[kind] = predict, predict.export(folder, backend="onnx", example=rows(kind)), folder
        return made[kind]

    return make


@pytest.mark.parametrize(
    "kind", [*KINDS, *(pytest.param(k, marks=pytest.mark.slow) for k in ("regression", "images", "two architectures"))]
)
def test_onnx_has_the_predictors_numbers(kind, onnx_packages):
    """Of every batch size, of its seed and of others: the words of the noise are integers, and the same."""
    predict, package, _ = onnx_packages(kind)
    for count in (1, 4, 9, 0):
        assert_same(package(rows(kind)[:count]), predict(rows(kind)[:count]))
    for seed in (0, -3, 2**62):
        assert_same(package(rows(kind), seed=seed), predict.replace(seed=seed)(rows(kind)))
    assert package.description.measured["probs" if kind != "regression" else "mean"] < 1e-5


def test_what_a_package_does_not_take(onnx_packages):
    _, package, _ = onnx_packages("dropout")
    x = rows("dropout")
    for bad, reason in (
        (x.double(), "is torch.float64, this package takes torch.float32"),
        (x[:, :4], r"takes \(rows, 5\)"),
        (x[0], r"takes \(rows, 5\)"),
        (x.unsqueeze(0), r"takes \(rows, 5\)"),
        (x.to("meta"), "is on meta"),
        ((x, x), "takes 1 tensor"),
        ({"x": [1.0]}, "takes 1 tensor"),
        ("text", "takes 1 tensor.* got str"),
        (x.double().numpy(), "is torch.float64, this package takes torch.float32"),
        (
            torch.where(torch.arange(9).unsqueeze(1) == 3, torch.nan, x),
            "1 of 9 rows are not finite, the first is row 3",
        ),
        (x.to_sparse(), "dense"),
    ):
        with pytest.raises(ValueError, match=reason):
            package(bad)
    # arrays are taken as the predictor takes them; other strides are other memory, and the same rows
    assert_same(package(x.numpy()), Fields(package(x)), exact=True)
    assert_same(package(x.T.contiguous().T.numpy()), Fields(package(x)), exact=True)
    assert_same(package(x.T.contiguous().T), Fields(package(x)), exact=True)
    assert_same(package(torch.cat((x, x), dim=1)[:, ::1][:, :5]), Fields(package(x)), exact=True)


class Fields:
    """Fields as attributes, like a prediction's."""

    def __init__(self, fields):
        vars(self).update(fields)


def test_a_package_is_a_cache(onnx_packages, monkeypatch):
    """Found again for the same predictor, made again for another or when asked, never put over someone's files."""
    predict, package, folder = onnx_packages("ensemble")
    before = (folder / "tile_4.onnx").stat().st_mtime_ns
    assert predict.export(folder, backend="onnx", example=rows("ensemble")).description == package.description
    assert (folder / "tile_4.onnx").stat().st_mtime_ns == before
    other = predict.replace(tiles=(2,))
    assert export(other, folder, backend="onnx", example=rows("ensemble")).tiles == (2,)
    assert sorted(p.name for p in folder.iterdir()) == ["package.json", "tile_2.onnx"]
    assert export(predict, folder, backend="onnx", example=rows("ensemble"), rebuild=True).tiles == (4,)
    (folder / "notes.txt").write_text("mine")
    monkeypatch.setattr("vbdl.export.building._compile", lambda *arguments: pytest.fail("compiled for nothing"))
    with pytest.raises(FileExistsError, match="notes.txt"):
        export(other, folder, backend="onnx", example=rows("ensemble"))
    (folder / "notes.txt").unlink()


def test_nothing_is_traced_or_compiled_beside_an_export(tmp_path, monkeypatch):
    """torch.export sets a flag of the whole process: a trace on another thread then changes what the export reads."""
    free = []

    def compile_beside(*_):
        def look():
            free.extend(lock.acquire(blocking=False) for lock in (program._lock, program.compiling))

        other = threading.Thread(target=look)
        other.start()
        other.join()
        raise RuntimeError("seen")

    monkeypatch.setattr("vbdl.export.building._compile", compile_beside)
    for backend in ("aoti", "onnx"):
        with pytest.raises(ExportError, match="seen"):
            export(build("dropout"), tmp_path / backend, backend=backend, example=rows("dropout"))
    assert free == [False] * 4


def test_what_is_needed_to_export(tmp_path):
    with pytest.raises(ValueError, match="example=rows"):
        export(build("dropout"), tmp_path / "package")
    with pytest.raises(ValueError, match="backend"):
        export(build("dropout"), tmp_path / "package", backend="tensorrt")
    with pytest.raises(ValueError, match="more than memory_budget"):
        export(build("dropout", memory_budget=4096, n_samples=40), tmp_path / "package", example=rows("dropout"))
    assert not (tmp_path / "package").exists()


def test_targets_counted_from_far_away_are_exported(tmp_path):
    nets = [nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)) for _ in range(3)]
    predict = vbdl.Predictor(vbdl.DeepEnsemble(nets), Centered(vbdl.Gaussian(std=0.3), 1.7e9), tiles=4, compile=False)
    x = torch.randn(7, 5)
    package = predict.export(tmp_path / "package", example=x, backend="onnx")
    assert package(x)["mean"].dtype == torch.float64
    torch.testing.assert_close(package(x)["mean"], predict(x).mean, rtol=0, atol=1e-4)


def edit(folder, signed=True, **changes):
    """signed: with the digest of what was changed, as somebody who means it would."""
    about = {**json.loads((folder / "package.json").read_text()), **changes}
    if signed:
        with contextlib.suppress(msgspec.ValidationError):
            about["digest"] = digest_of(msgspec.convert(about, Description))
    (folder / "package.json").write_text(json.dumps(about))


def test_a_package_that_is_damaged_or_hostile(onnx_packages, tmp_path):
    _, _, source = onnx_packages("dropout")

    def fresh(name):
        folder = tmp_path / name
        folder.mkdir()
        for file in source.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        return folder

    folder = fresh("flipped")
    data = bytearray((folder / "tile_4.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "tile_4.onnx").write_bytes(data)
    with pytest.raises(ExportError, match="damaged or replaced"):
        load_package(folder)
    for name, changes, reason in (
        ("path", {"tiles": {"4": "../../etc/passwd"}}, "names the file"),
        ("absolute", {"tiles": {"4": "/etc/passwd"}}, "names the file"),
        ("rows", {"tiles": {"-4": "tile_-4.onnx"}}, "names the file"),
        ("backend", {"backend": "pickle"}, "must name a back end"),
        ("format", {"format": 1}, "export again"),
        ("unknown", {"run": "me"}, "does not match its schema"),
        ("digest", {"sha256": {}}, "damaged or replaced"),
    ):
        folder = fresh(name)
        edit(folder, **changes)
        with pytest.raises(ExportError, match=reason):
            load_package(folder)
    for name, field in (("shape", "shape"), ("dtype", "dtype")):
        folder = fresh(f"edited {name}")
        inputs = json.loads((folder / "package.json").read_text())["inputs"]
        inputs["tensors"][0][field] = [7] if field == "shape" else "complex999"
        edit(folder, signed=False, inputs=inputs)
        with pytest.raises(ExportError, match="damaged or edited"):
            load_package(folder)
        edit(folder, inputs=inputs)
        with pytest.raises(ExportError, match="expects x0 of shape" if field == "shape" else "names the unknown dtype"):
            load_package(folder)
    folder = fresh("encoding")
    (folder / "package.json").write_bytes(b"\xff\xfe" + (source / "package.json").read_bytes())
    with pytest.raises(ExportError, match="does not match its schema"):
        load_package(folder)
    folder = fresh("link")
    (folder / "tile_4.onnx").unlink()
    (folder / "tile_4.onnx").symlink_to(source / "tile_4.onnx")
    with pytest.raises(ExportError, match="missing or not a regular file"):
        load_package(folder)
    with pytest.raises(ExportError, match="is not a package"):
        load_package(tmp_path / "nowhere")


def test_which_machine_a_package_fits():
    here = machine.describe()
    assert machine.misfit(here) is None
    assert "torch 2.0.0" in machine.misfit({**here, "torch": "2.0.0"})
    assert "machine" in machine.misfit({**here, "machine": "sparc"})
    assert "avx9000" in machine.misfit({**here, "cpu": [*here["cpu"], "avx9000"]})


# -- native code: a compile takes half a minute, so one kind by default


def decided() -> vbdl.Predictor:
    """MC dropout, calibrated and deciding."""
    predict = build("dropout", tiles=(8,))
    x = rows("dropout", 60)
    y = torch.where(torch.arange(60) % 4 == 0, torch.arange(60) % 3, predict(x).label)
    calibrated = vbdl.calibrate(predict, (x, y), calibration.Temperature("probs"))
    return vbdl.with_decision(calibrated, vbdl.decision.Referral("total", 0.9))


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    folder = tmp_path_factory.mktemp("native") / "package"
    predict = decided()
    return predict, predict.export(folder, example=rows("dropout")), folder


def test_native_code_has_the_predictors_numbers(native):
    predict, package, folder = native
    x = rows("dropout")
    assert {"probs", "action", "epistemic"} < {*package.description.fields}
    for count in (9, 8, 1, 0):
        assert_same(package(x[:count]), predict(x[:count]))
    assert_same(package(x, seed=-3), predict.replace(seed=-3)(x))
    # a row is the same to the bit wherever it is in a tile of one size
    whole = package(x[:8])
    order = torch.tensor([5, 1, 7, 0, 2, 6, 4, 3])
    assert_same(package(x[:8][order]), Fields({n: t[order] for n, t in whole.items()}), exact=True)
    assert_same(package(x[:8].T.contiguous().T), Fields(whole), exact=True)
    with pytest.raises(ValueError, match=r"takes \(rows, 5\)"):
        package(x[:, :4])


_ELSEWHERE = """
import sys
import torch
from vbdl.export import load_package

def refuse(event, arguments):
    if event in ("subprocess.Popen", "os.system", "os.posix_spawn", "os.exec", "os.fork"):
        raise RuntimeError(f"{event}: {arguments}")

sys.addaudithook(refuse)
fields = load_package(sys.argv[1])(torch.load(sys.argv[2], weights_only=True))
torch.save(fields, sys.argv[3])
"""


def test_native_code_is_loaded_without_a_compiler(native, tmp_path):
    """In a process of its own, which starts no other: the same numbers to the bit."""
    _, package, folder = native
    torch.save(rows("dropout"), tmp_path / "rows.pt")
    paths = [str(folder), str(tmp_path / "rows.pt"), str(tmp_path / "fields.pt")]
    subprocess.run([sys.executable, "-c", _ELSEWHERE, *paths], check=True, timeout=100)
    found = torch.load(tmp_path / "fields.pt", weights_only=True)
    assert_same(found, Fields(package(rows("dropout"))), exact=True)


def test_native_code_is_loaded_where_it_was_made_or_trusted(native, monkeypatch, tmp_path):
    _, package, folder = native
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ExportError, match="was not made here"):
        load_package(folder)
    assert_same(load_package(folder, trust=True)(rows("dropout")), Fields(package(rows("dropout"))), exact=True)
    monkeypatch.undo()
    about = json.loads((folder / "package.json").read_text())
    text = (folder / "package.json").read_text()
    try:
        wide = {**about["inputs"], "tensors": [{**about["inputs"]["tensors"][0], "shape": [9]}]}
        edit(folder, inputs=wide)  # not made here, as it is now; and the code knows what it was compiled for
        with pytest.raises(ExportError, match="was not made here"):
            load_package(folder)
        with pytest.raises(ExportError, match="was compiled for 8 rows of"):
            load_package(folder, trust=True)
        (folder / "package.json").write_text(text)
        edit(folder, made_for={**about["made_for"], "torch": "2.0.0"})
        with pytest.raises(ExportError, match="does not fit this machine: it was made for torch 2.0.0"):
            load_package(folder, trust=True)
    finally:
        (folder / "package.json").write_text(text)
    assert (machine.index().stat().st_mode & 0o777) == 0o700


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, "regression", "images", "two architectures"])
def test_native_code_of_every_kind(kind, tmp_path):
    predict = build(kind, tiles=(1, 8) if kind == "ensemble" else (8,))
    package = predict.export(tmp_path / "package", example=rows(kind))
    assert_same(package(rows(kind)), predict(rows(kind)))
    assert_same(package(rows(kind), seed=5), predict.replace(seed=5)(rows(kind)))


@pytest.mark.slow
def test_a_cpp_program_prints_the_predictors_numbers(tmp_path):
    """All three methods; rows that do not fill a tile, and what it does not take."""
    source = Path(vbdl.export.__file__).parent / "cpp"
    root = Path(torch.__file__).parent
    flags = [f"-I{root}/include", f"-I{root}/include/torch/csrc/api/include", f"-L{root}/lib", f"-Wl,-rpath,{root}/lib"]
    subprocess.run(
        ["g++", "-std=c++20", "-O1", *flags, str(source / "predict.cpp"), "-o", str(tmp_path / "predict"), "-ltorch",
         "-ltorch_cpu", "-lc10"],
        check=True, timeout=500,
    )  # fmt: skip
    x = rows("dropout")

    def run(folder, x, seed, columns=5):
        return subprocess.run(
            [tmp_path / "predict", folder, str(len(x)), str(columns), str(seed)], input=x.numpy().tobytes(),
            capture_output=True, timeout=100,
        )  # fmt: skip

    for kind in KINDS:
        predict = build(kind, tiles=(4,))
        predict.export(tmp_path / kind, example=x)
        for seed in (11, 6):
            done = run(tmp_path / kind, x, seed)
            assert done.returncode == 0, done.stderr
            expected = vars(predict.replace(seed=seed)(x))
            for line in done.stdout.decode().splitlines():
                name, _, numbers = line.partition(":")
                found = np.array(numbers.split(), dtype=np.float64)
                np.testing.assert_allclose(found, expected[name].double().flatten().numpy(), rtol=1e-5, atol=1e-5)
    wrong = run(tmp_path / "dropout", x[:, :4].contiguous(), 11, columns=4)
    assert wrong.returncode == 1 and b"takes (rows, 5)" in wrong.stderr
    bad = run(tmp_path / "dropout", torch.full((2, 5), torch.nan), 11)
    assert bad.returncode == 1 and b"not finite" in bad.stderr
