"""A predictor compiled ahead of time: a folder of native code that loads without compiling, from Python or C++.

The code itself looks at nothing: other sizes than it was made for read out of bounds, other strides give other
numbers. So every call goes through a check (dtype, shape, device, finite) and is padded to whole tiles, here and in
`cpp/vbdl_package.h`.

A package is native code and a derived cache: it is loaded where it was made, or where the caller trusts it, and only
on a machine that it fits.
"""

import hashlib
import math
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import msgspec
import torch
from torch import Tensor

from vbdl.artifact.files import check_place, write_folder
from vbdl.artifact.manifest import Inputs
from vbdl.artifact.saving import inputs_of
from vbdl.artifact.tensors import CODES, DTYPES
from vbdl.calling.inputs import Flat, arguments, flatten, map_inputs, tensors
from vbdl.data.rows import as_tensor
from vbdl.data.tiles import pad, padded
from vbdl.engine.predictor import Predictor
from vbdl.engine.settings import DEFAULT_TILES, INVARIANT_TILES
from vbdl.export import machine
from vbdl.export.gate import ExportError, check, exporting
from vbdl.export.graph import TileCall, tile_call
from vbdl.types import Inputs as Rows
from vbdl.types import State

FORMAT = 2
DESCRIPTION = "package.json"
_MAX_BYTES = 2**20


class Description(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`package.json`."""

    format: int
    backend: str  # "aoti" or "onnx"
    inputs: Inputs
    fields: list[str]
    tiles: dict[str, str]  # rows of a tile -> its file
    sha256: dict[str, str]  # of each file
    seed: int  # unless a call gives another
    n_samples: int
    device: str
    made_for: dict[str, Any]
    model: str  # digest of the predictor it was made from
    measured: dict[str, float]  # largest difference from the predictor, by field
    digest: str = ""  # of all of the above, and by `sha256` of the files


def _digest(description: Description) -> str:
    """Of everything in a description but the digest itself: what rows look like decides what native code reads."""
    return hashlib.sha256(msgspec.json.encode(msgspec.structs.replace(description, digest=""))).hexdigest()


class Package:
    """package(x, seed=None) -> the fields of the prediction by name, (batch, ...) each.

    Any number of rows, as tensors or arrays. Raises ValueError for rows of another dtype, shape or device, and for rows
    that are not finite.
    """

    def __init__(self, description: Description, runners: Mapping[int, Any]):
        self.description = description
        self.tiles = tuple(sorted(runners))
        self._runners = dict(runners)
        self._seed = torch.tensor(description.seed)
        self._inputs = description.inputs

    def __call__(self, x: Rows, seed: int | None = None) -> State:
        x, rows = self._check(x)
        which = self._seed if seed is None else torch.tensor(seed)
        size = next((t for t in self.tiles if t >= rows), self.tiles[-1])
        with torch.no_grad():
            parts = [
                self._runners[size](which, *(padded(t, start, size) for t in tensors(x)))
                for start in range(0, max(rows, 1), size)
            ]
        if len(parts) == 1 and rows == size:
            return dict(zip(self.description.fields, parts[0], strict=True))
        columns = zip(*parts, strict=True)
        return {n: torch.cat(column)[:rows] for n, column in zip(self.description.fields, columns, strict=True)}

    def _check(self, x: Any) -> tuple[Rows, int]:
        x = as_tensor(x)
        given = _parts(x) if isinstance(x, Tensor | tuple | dict) else []
        expected = self._inputs.tensors
        if self._inputs.layout == "keyword":
            names = [e.name for e in expected]
            if not isinstance(x, dict) or sorted(x) != sorted(map(str, names)):
                raise ValueError(f"this package takes a dict of {names}")
            x = {str(n): x[str(n)] for n in names}
            given = _parts(x)
        sound = bool(given) and all(isinstance(t, Tensor) for t in given)
        if len(given) != len(expected) or not sound:
            got = len(given) if sound else type(x).__name__
            raise ValueError(f"this package takes {len(expected)} tensor(s) or array(s), got {got}")
        for t, e in zip(given, expected, strict=True):
            who = e.name or "the input"
            if t.dtype != DTYPES[e.dtype]:
                raise ValueError(f"{who} is {t.dtype}, this package takes {DTYPES[e.dtype]}")
            if list(t.shape[1:]) != list(e.shape) or t.ndim != len(e.shape) + 1:
                raise ValueError(f"{who} is {tuple(t.shape)}, this package takes (rows, {str(e.shape)[1:-1]})")
            if t.device.type != self.description.device or t.layout != torch.strided:
                raise ValueError(f"{who} is on {t.device}, this package runs on {self.description.device}, dense")
            if t.is_floating_point() and not math.isfinite(float(t.detach().sum())):
                ok = t.isfinite().flatten(1).all(1) if t.ndim > 1 else t.isfinite()
                if not bool(ok.all()):
                    bad = (~ok).nonzero().flatten().tolist()
                    raise ValueError(f"{len(bad)} of {len(ok)} rows are not finite, the first is row {bad[0]}")
        rows = {t.shape[0] for t in given}
        if len(rows) > 1:
            raise ValueError(f"inputs disagree on the number of rows: {[tuple(t.shape) for t in given]}")
        return map_inputs(lambda t: t.detach(), x), rows.pop()


def _parts(x: Any) -> list[Any]:
    """The arguments of a call, tensors or not."""
    args, kwargs = arguments(x)
    return [*args, *kwargs.values()]


def export(
    predictor: Predictor,
    folder: str | Path,
    *,
    backend: str = "aoti",
    example: Rows | None = None,
    rebuild: bool = False,
) -> Package:
    """Compile the predictor ahead of time into a folder, for every tile size of it; the package, loaded.

    A predictor with the default tiles gets one size, 64.

    backend: "aoti", native code for this machine, or "onnx", for ONNX Runtime anywhere.
    example: rows like the real ones, on which the gate compares; random normal numbers of the shape of what was
        predicted before, unless given.
    rebuild: compile again even where a package of this predictor is there and fits.

    The package is compared with the predictor before the folder appears. Raises ExportError where it is another: no
    epistemic spread, numbers apart by more than 1e-5, a seed without effect.
    """
    if backend not in ("aoti", "onnx"):
        raise ValueError(f'backend is "aoti" or "onnx", not {backend!r}')
    probe, inputs = _probe(predictor, example)
    if predictor.tiles == DEFAULT_TILES:  # nobody chose them, and each takes minutes to compile
        predictor = predictor.replace(tiles=INVARIANT_TILES)
    folder, model = Path(folder), identity(predictor)
    check_place(folder, _locate)
    if folder.exists() and not rebuild:
        try:
            found = load_package(folder)
            if found.description.model == model and found.description.backend == backend:
                return found
        except ExportError:
            pass  # of another machine, another model, damaged: a cache is made again
    with tempfile.TemporaryDirectory() as scratch:
        files, fields = {}, []
        for size in predictor.tiles:
            with exporting(backend):
                tile = pad(flatten(probe), 0, size)
                call = tile_call(predictor, tile)
            fields = list(call.fields)
            path = Path(scratch) / (f"tile_{size}.pt2" if backend == "aoti" else f"tile_{size}.onnx")
            with exporting(backend):
                _compile(call, tile, path, backend, predictor.seed)
            files[str(size)] = path.name
        description = Description(
            format=FORMAT,
            backend=backend,
            inputs=inputs,
            fields=fields,
            tiles=files,
            sha256={name: machine.sha256(Path(scratch) / name) for name in files.values()},
            seed=predictor.seed,
            n_samples=predictor.n_samples,
            device=predictor.device.type,
            made_for=machine.describe() if backend == "aoti" else {},
            model=model,
            measured={},
        )
        with exporting(backend):
            package = Package(description, _runners(description, Path(scratch)))
            measured = check(predictor, package, probe)
        description = msgspec.structs.replace(description, measured=measured)
        description = msgspec.structs.replace(description, digest=_digest(description))
        if backend == "aoti":
            machine.remember(description.digest)
        data = {name: (Path(scratch) / name).read_bytes() for name in files.values()}
        data[DESCRIPTION] = msgspec.json.format(msgspec.json.encode(description), indent=1)
        write_folder(folder, data, _locate)
    return load_package(folder)


def load_package(folder: str | Path, *, trust: bool = False) -> Package:
    """A package from its folder, ready to be called; nothing is compiled.

    trust: run native code that was not made by this user on this machine. It can do whatever you can.
    Raises ExportError where files are damaged, the package was made for another machine, or is not trusted.
    """
    folder = Path(folder)
    try:
        data = (folder / DESCRIPTION).read_bytes()
        if len(data) > _MAX_BYTES:
            raise ExportError(f"{DESCRIPTION} has {len(data)} bytes")
        description = msgspec.json.decode(data, type=Description)
    except OSError as error:
        raise ExportError(f"{folder} is not a package: {error}") from None
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise ExportError(f"{DESCRIPTION} does not fit its format: {error}") from None
    if description.format != FORMAT:
        raise ExportError(f"the package has format {description.format}, this vbdl reads {FORMAT}: export again")
    if description.digest != _digest(description):
        raise ExportError(f"{DESCRIPTION} is not as it was exported: damaged or edited")
    if odd := [e.dtype for e in description.inputs.tensors if e.dtype not in DTYPES]:
        raise ExportError(f"{DESCRIPTION} names the dtype {odd[0][:40]!r}")
    if description.backend not in ("aoti", "onnx") or not description.tiles:
        raise ExportError(f"{DESCRIPTION} names the back end {description.backend[:40]!r}")
    if description.backend == "aoti" and (reason := machine.misfit(description.made_for)):
        raise ExportError(f"the package does not fit: {reason}. Export the model again here")
    for rows, name in description.tiles.items():
        suffix = "pt2" if description.backend == "aoti" else "onnx"
        if not rows.isdecimal() or name != f"tile_{rows}.{suffix}":
            raise ExportError(f"{DESCRIPTION} names the file {name[:80]!r}")
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise ExportError(f"{name} is not there, or not a file of its own")
        digest = machine.sha256(path)
        if digest != description.sha256.get(name):
            raise ExportError(f"{name} is not the file that was exported: damaged or exchanged")
    if description.backend == "aoti" and not trust and not machine.was_made_here(description.digest):
        raise ExportError(
            "this is native code that was not made here: export the model again, or load_package(..., trust=True) if "
            "you know who made it"
        )
    try:
        runners = _runners(description, folder)
    except ImportError:
        raise
    except Exception as error:  # a runtime refuses a file in many ways
        said = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise ExportError(f"the files of the package cannot be loaded: {said}") from error
    return Package(description, runners)


def _locate(folder: Path) -> None:
    """Raises unless a folder holds a package and nothing else: only that is replaced."""
    for entry in folder.iterdir():
        if entry.name != DESCRIPTION and not re.fullmatch(r"tile_\d+\.(pt2|onnx)", entry.name):
            raise FileExistsError(f"{folder} holds {entry.name}, which no package does: choose another folder")


def identity(predictor: Predictor) -> str:
    """A digest of everything that a prediction depends on."""
    digest = hashlib.sha256()
    for owner in (predictor.posterior, predictor.likelihood):
        for name, t in sorted(owner.state_dict().items()):
            digest.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
            digest.update(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        digest.update(str(owner).encode())
    settings = (predictor.seed, predictor.n_samples, predictor.tiles, predictor.settings.autocast)
    digest.update(repr((*settings, predictor.settings.joint, str(torch.__version__), str(predictor.device))).encode())
    return digest.hexdigest()


def _compile(call: TileCall, tile: Flat, path: Path, backend: str, seed: int) -> None:
    """One file, for one size of tile."""
    arguments = (torch.tensor(seed), *tile.tensors)
    if backend == "onnx":
        from vbdl.export.onnx import write

        write(call, arguments, path)
        return
    from torch._inductor import aoti_compile_and_package  # what loads a package needs no compiler, and waits for none

    from vbdl.export.native import written

    with torch.no_grad():
        exported = torch.export.export(call.module, arguments, strict=False)
        about = {
            "vbdl_fields": ",".join(call.fields),
            "vbdl_rows": str(tile.rows),
            "vbdl_inputs": written((CODES[t.dtype], t.shape[1:]) for t in tile.tensors),
        }
        aoti_compile_and_package(exported, package_path=str(path), inductor_configs={"aot_inductor.metadata": about})


def _runners(description: Description, folder: Path) -> dict[int, Any]:
    files = {int(rows): folder / name for rows, name in description.tiles.items()}
    if description.backend == "onnx":
        from vbdl.export.onnx import runner as of_onnx

        shapes = [e.shape for e in description.inputs.tensors]
        return {rows: of_onnx(path, rows, shapes) for rows, path in files.items()}
    from vbdl.export.native import runner, written

    inputs = written((e.dtype, e.shape) for e in description.inputs.tensors)
    return {rows: runner(path, rows, inputs) for rows, path in files.items()}


def _probe(predictor: Predictor, example: Rows | None) -> tuple[Rows, Inputs]:
    """Rows to compare on, and what they look like."""
    if example is not None:
        checked = predictor.check(example)
        if checked.rows < 1:
            raise ValueError("example needs at least one row")
        return checked.nested, cast(Inputs, inputs_of(predictor, example))
    inputs = inputs_of(predictor, None)
    if inputs is None:
        raise ValueError("nothing was predicted yet, so the shape of a row is not known: export(..., example=rows)")
    if any(not DTYPES[e.dtype].is_floating_point for e in inputs.tensors):
        raise ValueError("integer inputs have a meaning that random numbers have not: export(..., example=rows)")
    generator = torch.Generator().manual_seed(0)
    made = [
        torch.randn((64, *e.shape), generator=generator, dtype=torch.float32).to(predictor.device, DTYPES[e.dtype])
        for e in inputs.tensors
    ]
    if inputs.layout == "keyword":
        return {str(e.name): t for e, t in zip(inputs.tensors, made, strict=True)}, inputs
    return (made[0] if inputs.layout == "tensor" else tuple(made)), inputs
