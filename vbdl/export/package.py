"""A package: the folder of a predictor that was compiled ahead of time, which Python or C++ loads without a compiler.

Compiled code does not check its inputs: a wrong size reads out of bounds, wrong strides give wrong results. So every
call is checked (dtype, shape, device, finite) and padded to whole tiles, here and in `cpp/vbdl_package.h`.

A package is native code derived from a predictor. It is loaded only where it was made or if the caller trusts it, and
only on a machine that it fits.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from vbdl.artifact.manifest import Inputs
from vbdl.artifact.tensors import DTYPES
from vbdl.calling.inputs import arguments, map_inputs, tensors
from vbdl.data.rows import as_tensor
from vbdl.data.tiles import padded
from vbdl.export import machine
from vbdl.export.gate import ExportError
from vbdl.types import Inputs as Rows
from vbdl.types import Nested, State

FORMAT = 2
DESCRIPTION = "package.json"
_MAX_BYTES = 2**20

Runner = Callable[..., Sequence[Tensor]]
"""The compiled code of one tile size: runner(seed, *tensors of a tile) -> the fields, in the order of `Description`."""


class Description(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The content of `package.json`, which describes a package."""

    format: int
    backend: str  # "aoti" or "onnx"
    inputs: Inputs
    fields: list[str]
    tiles: dict[str, str]  # number of rows of a tile -> name of its file
    sha256: dict[str, str]  # file name -> SHA-256
    seed: int  # default of a call
    n_samples: int
    device: str
    made_for: machine.Machine
    model: str  # digest of the predictor it was made from
    measured: dict[str, float]  # largest difference from the predictor, by field
    digest: str = ""  # SHA-256 of all fields above, which through `sha256` covers the files


def digest_of(description: Description) -> str:
    """The SHA-256 of a description without its digest; it covers the input shapes, which bound what the code reads."""
    return hashlib.sha256(msgspec.json.encode(msgspec.structs.replace(description, digest=""))).hexdigest()


class Package:
    """A loaded package: package(x, seed=None) -> the prediction's fields by name, (batch, ...) each.

    x may be tensors or arrays with any number of rows. Raises ValueError for a wrong dtype, shape or device and for
    rows that are not finite.
    """

    def __init__(self, description: Description, runners: Mapping[int, Runner]):
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

    def _check(self, x: Rows) -> tuple[Rows, int]:
        x = as_tensor(x)
        values = _parts(x) if isinstance(x, Tensor | tuple | dict) else []
        expected = self._inputs.tensors
        if self._inputs.layout == "keyword":
            names = [e.name for e in expected]
            if not isinstance(x, dict) or sorted(x) != sorted(map(str, names)):
                raise ValueError(f"this package takes a dict with the keys {names}")
            x = {str(n): x[str(n)] for n in names}
            values = _parts(x)
        parts = [value for value in values if isinstance(value, Tensor)]
        sound = bool(values) and len(parts) == len(values)
        if len(values) != len(expected) or not sound:
            got = len(values) if sound else type(x).__name__
            raise ValueError(f"this package takes {len(expected)} tensor(s) or array(s), got {got}")
        for t, e in zip(parts, expected, strict=True):
            who = e.name or "the input"
            if t.dtype != DTYPES[e.dtype]:
                raise ValueError(f"{who} is {t.dtype}, this package takes {DTYPES[e.dtype]}")
            if list(t.shape[1:]) != list(e.shape) or t.ndim != len(e.shape) + 1:
                raise ValueError(f"{who} is {tuple(t.shape)}, this package takes (rows, {str(e.shape)[1:-1]})")
            if t.device.type != self.description.device or t.layout != torch.strided:
                raise ValueError(
                    f"{who} is on {t.device} with layout {t.layout}, this package takes dense tensors on "
                    f"{self.description.device}"
                )
            if t.is_floating_point() and not math.isfinite(float(t.detach().sum())):
                ok = t.isfinite().flatten(1).all(1) if t.ndim > 1 else t.isfinite()
                if not bool(ok.all()):
                    bad = (~ok).nonzero().flatten().tolist()
                    raise ValueError(f"{len(bad)} of {len(ok)} rows are not finite, the first is row {bad[0]}")
        rows = {t.shape[0] for t in parts}
        if len(rows) > 1:
            raise ValueError(f"the inputs have different numbers of rows: {[tuple(t.shape) for t in parts]}")
        return map_inputs(lambda t: t.detach(), x), rows.pop()


def _parts(x: Rows) -> list[Nested]:
    """The positional and keyword arguments of a call as one list, not necessarily tensors."""
    args, kwargs = arguments(x)
    return [*args, *kwargs.values()]


def load_package(folder: str | Path, *, trust: bool = False) -> Package:
    """Load a package from its folder; nothing is compiled.

    trust: accept native code that was not made by this user on this machine. It can do whatever you can.
    Raises ExportError if files are damaged, or the package was made for another machine or is not trusted.
    """
    folder = Path(folder)
    try:
        data = (folder / DESCRIPTION).read_bytes()
        if len(data) > _MAX_BYTES:
            raise ExportError(f"{DESCRIPTION} has {len(data)} bytes, more than the {_MAX_BYTES} allowed")
        description = msgspec.json.decode(data, type=Description)
    except OSError as error:
        raise ExportError(f"{folder} is not a package: {error}") from None
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise ExportError(f"{DESCRIPTION} does not match its schema: {error}") from None
    if description.format != FORMAT:
        raise ExportError(f"the package has format {description.format}, this vbdl reads {FORMAT}: export again")
    if description.digest != digest_of(description):
        raise ExportError(f"{DESCRIPTION} was damaged or edited after the export: export again")
    if odd := [e.dtype for e in description.inputs.tensors if e.dtype not in DTYPES]:
        raise ExportError(f"{DESCRIPTION} names the unknown dtype {odd[0][:40]!r}; known are {sorted(DTYPES)}")
    if description.backend not in ("aoti", "onnx") or not description.tiles:
        raise ExportError(
            f"{DESCRIPTION} must name a back end, aoti or onnx, and at least one tile; its back end is "
            f"{description.backend[:40]!r}"
        )
    if description.backend == "aoti" and (reason := machine.misfit(description.made_for)):
        raise ExportError(f"the package does not fit this machine: {reason}. Export the model again here")
    for rows, name in description.tiles.items():
        suffix = "pt2" if description.backend == "aoti" else "onnx"
        if not rows.isdecimal() or name != f"tile_{rows}.{suffix}":
            raise ExportError(f"{DESCRIPTION} names the file {name[:80]!r} for tiles of {rows[:20]} rows: export again")
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise ExportError(f"{name} is missing or not a regular file: export again")
        digest = machine.sha256(path)
        if digest != description.sha256.get(name):
            raise ExportError(f"{name} was damaged or replaced after the export: export again")
    if description.backend == "aoti" and not trust and not machine.was_made_here(description.digest):
        raise ExportError(
            "this native code was not made here: export the model again, or use load_package(..., trust=True) if you "
            "know who made it"
        )
    try:
        runners = runners_of(description, folder)
    except ImportError:
        raise
    except Exception as error:  # runtimes raise errors of any type
        message = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise ExportError(f"the files of the package cannot be loaded: {message}") from error
    return Package(description, runners)


def runners_of(description: Description, folder: Path) -> dict[int, Runner]:
    """Load the compiled code of each tile size from a folder, by number of rows."""
    files = {int(rows): folder / name for rows, name in description.tiles.items()}
    if description.backend == "onnx":
        from vbdl.export.onnx import runner as of_onnx

        shapes = [e.shape for e in description.inputs.tensors]
        return {rows: of_onnx(path, rows, shapes) for rows, path in files.items()}
    from vbdl.export.native import runner, written

    inputs = written((e.dtype, e.shape) for e in description.inputs.tensors)
    return {rows: runner(path, rows, inputs) for rows, path in files.items()}
