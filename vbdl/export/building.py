"""Building a package: compiles a predictor ahead of time, compares both, and writes the package to its folder."""

import hashlib
import re
import tempfile
from pathlib import Path

import msgspec
import torch

from vbdl.artifact.files import check_place, write_folder
from vbdl.artifact.manifest import Inputs
from vbdl.artifact.saving import inputs_of
from vbdl.artifact.tensors import CODES, DTYPES
from vbdl.calling.inputs import Flat, flatten
from vbdl.calling.lending import only_reading
from vbdl.data.tiles import pad
from vbdl.engine.predictor import Predictor
from vbdl.engine.program import alone
from vbdl.engine.settings import INVARIANT_TILES, are_default
from vbdl.export import machine
from vbdl.export.gate import ExportError, check, exporting
from vbdl.export.graph import TileCall, tile_call
from vbdl.export.package import DESCRIPTION, FORMAT, Description, Package, digest_of, load_package, runners_of
from vbdl.types import Inputs as Rows


def export(
    predictor: Predictor,
    folder: str | Path,
    *,
    backend: str = "aoti",
    example: Rows | None = None,
    rebuild: bool = False,
) -> Package:
    """Compile the predictor ahead of time into a folder, for each of its tile sizes, and return the loaded package.

    A predictor with the default tiles is compiled for one size, 64.

    backend: "aoti", native code for this machine, or "onnx", for ONNX Runtime on any machine.
    example: rows like the real ones, on which package and predictor are compared; default: standard normal numbers in
        the shape of an earlier prediction's inputs.
    rebuild: compile again even if the folder holds a valid package of this predictor.

    The folder appears only after the package's predictions have been compared with the predictor's. Raises ExportError
    if they differ by more than 1e-5, have no epistemic spread or do not depend on the seed.
    """
    if backend not in ("aoti", "onnx"):
        raise ValueError(f'backend must be "aoti" or "onnx", not {backend!r}')
    probe, inputs = _probe(predictor, example)
    if are_default(predictor.tiles):  # the user chose none, and each size takes minutes to compile
        predictor = predictor.replace(tiles=INVARIANT_TILES)
    folder, model = Path(folder), identity(predictor)
    check_place(folder, _locate)
    if folder.exists() and not rebuild:
        try:
            existing = load_package(folder)
            if existing.description.model == model and existing.description.backend == backend:
                return existing
        except ExportError:
            pass  # damaged, or made on or for another machine: export again
    with tempfile.TemporaryDirectory() as scratch:
        files, fields = {}, []
        for size in predictor.tiles:
            with exporting(backend):
                tile = pad(flatten(probe), 0, size)
                call = tile_call(predictor, tile, backend)
            fields = list(call.fields)
            path = Path(scratch) / (f"tile_{size}.pt2" if backend == "aoti" else f"tile_{size}.onnx")
            with exporting(backend), alone():
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
            package = Package(description, runners_of(description, Path(scratch)))
            measured = check(predictor, package, probe)
        description = msgspec.structs.replace(description, measured=measured)
        description = msgspec.structs.replace(description, digest=digest_of(description))
        if backend == "aoti":
            machine.remember(description.digest)
        data = {name: (Path(scratch) / name).read_bytes() for name in files.values()}
        data[DESCRIPTION] = msgspec.json.format(msgspec.json.encode(description), indent=1)
        write_folder(folder, data, _locate)
    return load_package(folder)


def _locate(folder: Path) -> None:
    """Raise FileExistsError if the folder holds anything but a package, because it would be deleted."""
    for entry in folder.iterdir():
        if entry.name != DESCRIPTION and not re.fullmatch(r"tile_\d+\.(pt2|onnx)", entry.name):
            raise FileExistsError(f"{folder} holds {entry.name}, which is no part of a package: choose another folder")


def identity(predictor: Predictor) -> str:
    """The SHA-256 of everything a prediction depends on: tensors, modules, settings, torch version and device."""
    digest = hashlib.sha256()
    for owner in (predictor.posterior, predictor.likelihood):
        with only_reading(stacks=True):
            state = owner.state_dict()
        for name, t in sorted(state.items()):
            digest.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
            digest.update(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        digest.update(str(owner).encode())
    settings = (predictor.seed, predictor.n_samples, predictor.tiles, predictor.settings.autocast)
    digest.update(repr((*settings, predictor.settings.joint, str(torch.__version__), str(predictor.device))).encode())
    return digest.hexdigest()


def _compile(call: TileCall, tile: Flat, path: Path, backend: str, seed: int) -> None:
    """Compile the call of one tile size into one file."""
    arguments = (torch.tensor(seed), *tile.tensors)
    if backend == "onnx":
        from vbdl.export.onnx import write

        write(call, arguments, path)
        return
    from torch._inductor import aoti_compile_and_package  # here, so that loading a package does not import the compiler

    from vbdl.export.native import written

    with torch.no_grad():
        exported = torch.export.export(call.module, arguments, strict=False)
        about = {
            "vbdl_fields": ",".join(call.fields),
            "vbdl_rows": str(tile.rows),
            "vbdl_inputs": written((CODES[t.dtype], t.shape[1:]) for t in tile.tensors),
        }
        aoti_compile_and_package(exported, package_path=str(path), inductor_configs={"aot_inductor.metadata": about})


def _probe(predictor: Predictor, example: Rows | None) -> tuple[Rows, Inputs]:
    """(the rows to compare package and predictor on, the description of the inputs)."""
    rows = None if example is None else predictor.check(example)
    if rows is not None and rows.rows < 1:
        raise ValueError("example has no rows: give at least one")
    inputs = inputs_of(predictor, example)
    if inputs is None:
        raise ValueError("the shape of a row is unknown before the first prediction: use export(..., example=rows)")
    if rows is not None:
        return rows.nested, inputs
    if any(not DTYPES[e.dtype].is_floating_point for e in inputs.tensors):
        raise ValueError("integer inputs cannot be replaced by random numbers: use export(..., example=rows)")
    generator = torch.Generator().manual_seed(0)
    columns = [
        torch.randn((64, *e.shape), generator=generator, dtype=torch.float32).to(predictor.device, DTYPES[e.dtype])
        for e in inputs.tensors
    ]
    if inputs.layout == "keyword":
        return {str(e.name): t for e, t in zip(inputs.tensors, columns, strict=True)}, inputs
    return (columns[0] if inputs.layout == "tensor" else tuple(columns)), inputs
