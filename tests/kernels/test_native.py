"""The compiled words of `philox.c`: the bits of NumPy's, wherever a library can be built."""

import contextlib
import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from vbdl_kernels import native, philox
from vbdl_kernels.philox import make_key

ROOT = Path(__file__).parents[2]
KEY = torch.stack((make_key(17, range(5)), make_key(-(2**40) - 3, [9, 2**31, 0, 4, 2**40 + 5])))

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler named cc")


@pytest.fixture(scope="module")
def build():
    """The module that builds the library when vbdl is installed."""
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def library(build, tmp_path_factory):
    path = tmp_path_factory.mktemp("built") / "libphilox.so"
    assert build.compiled(ROOT / "kernels/vbdl_kernels/philox.c", path) is None
    found = native.load(path)
    assert found is not None
    return found


@needs_compiler
@pytest.mark.parametrize("rows", [0, 1, 3, 70])
@pytest.mark.parametrize("columns", [0, 1, 31, 32, 33, 63, 64, 65, 96, 97, 127, 128, 129, 192, 200, 256, 1000])
def test_compiled_words_masks_and_normals_have_the_bits_of_numpy(rows, columns, library, monkeypatch):
    monkeypatch.setattr(philox, "compiled", library)
    words = philox._processor_words(KEY, 11, philox.WEIGHT, rows, columns, first_row=2**32 - 2)
    normals = philox.normal(KEY, 11, philox.WEIGHT, rows, columns)
    keeps = [philox.keep_mask(KEY, 11, rows, columns, p, first=2**32 - 2) for p in (0.0, 0.3, 1 - 2**-32, 1.0)]
    monkeypatch.setattr(philox, "compiled", None)
    for p, keep in zip((0.0, 0.3, 1 - 2**-32, 1.0), keeps, strict=True):
        assert torch.equal(keep, philox.keep_mask(KEY, 11, rows, columns, p, first=2**32 - 2))
    assert torch.equal(words, philox._processor_words(KEY, 11, philox.WEIGHT, rows, columns, first_row=2**32 - 2))
    assert torch.equal(normals, philox.normal(KEY, 11, philox.WEIGHT, rows, columns))
    assert words.shape == normals.shape == (2, 5, rows, columns)


@needs_compiler
def test_keys_that_are_parts_of_others_are_read_as_they_are(library, monkeypatch):
    monkeypatch.setattr(philox, "compiled", library)
    whole = philox.normal(KEY, 3, philox.WEIGHT, 4, 40)
    assert torch.equal(philox.normal(KEY[:, ::2], 3, philox.WEIGHT, 4, 40), whole[:, ::2])
    assert torch.equal(philox.normal(KEY.flip(0), 3, philox.WEIGHT, 4, 40), whole.flip(0))


def test_a_file_that_is_no_library_is_left_alone(tmp_path):
    (tmp_path / "libphilox.so").write_bytes(b"not a library")
    assert native.load(tmp_path / "libphilox.so") is None
    assert native.load(tmp_path / "missing.so") is None


@needs_compiler
@pytest.mark.parametrize("text", ["int other;", "#include <stdint.h>\nint64_t vbdl_philox_version(void) { return 0; }"])
def test_a_library_of_another_version_is_left_alone(text, build, tmp_path):
    (tmp_path / "other.c").write_text(text)
    assert build.compiled(tmp_path / "other.c", tmp_path / "other.so") is None
    with pytest.warns(match="another version") if "version" in text else contextlib.nullcontext():
        assert native.load(tmp_path / "other.so") is None


@needs_compiler
def test_a_source_that_does_not_compile_is_said(build, tmp_path):
    (tmp_path / "wrong.c").write_text("int wrong(")
    assert "wrong.c" in build.compiled(tmp_path / "wrong.c", tmp_path / "wrong.so")
    assert [p.name for p in tmp_path.iterdir()] == ["wrong.c"]


def test_a_missing_compiler_is_said(build, tmp_path, monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler -m64")
    assert "no-such-compiler" in build.compiled(tmp_path / "a.c", tmp_path / "a.so")
