"""The speeds of a GPU that the cost model uses: those of an H100, or those measured on the device itself.

`python -m vbdl_kernels.measured` measures them and writes a file in $XDG_CACHE_HOME/vbdl (~/.cache/vbdl), named after
the file format, the device and the versions of torch and triton. The file is replaced atomically; a file that cannot be
read is ignored.
"""

import contextlib
import functools
import json
import math
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

FORMAT = 3  # the version of the file's format


@dataclass(frozen=True)
class Card:
    """The speeds of a GPU, per second, and its latencies. Defaults: an H100, products at 65 % of the data sheet."""

    normals: float = 0.97e12  # normals per second, drawn inside a product of few rows
    half_flops: float = 0.65 * 989e12  # flops per second on tensor cores, bfloat16 and float16
    float_flops: float = 0.65 * 494e12  # flops per second on tensor cores, tf32
    exact_flops: float = 51e12  # flops per second in float32 without tensor cores
    bytes: float = 3.0e12  # bytes per second, read from and written to main memory
    launch: float = 1.2e-6  # seconds between two kernels in a CUDA graph
    dispatch: float = 20e-6  # seconds that the host takes to start a kernel outside a CUDA graph; not from an H100
    overlap: float = 0.66  # for noise and product: the fraction of the shorter's time that the longer does not hide
    step: float = 1.2e-6  # seconds that a layer of a small network takes inside one program: latency, not work
    programs: float = 264.0  # number of such programs that run at once
    half_rows: float = 0.0  # up to this many rows the fused kernel was measured to be faster; 0: ask the model
    float_rows: float = 0.0  # half_rows for float32


def device_card() -> Card:
    """The constants that were measured on the current device, or the defaults."""
    return Card(**(constants(tuple(Card.__dataclass_fields__)) or {}))


def device_name() -> str | None:
    """The name of the current accelerator, or None on a CPU."""
    return _name(torch.cuda.current_device()) if torch.cuda.is_available() else None


@functools.cache
def _name(index: int) -> str:
    return torch.cuda.get_device_name(index)


def path_of(name: str) -> Path:
    """The path of the file with a device's constants."""
    return _path(name, os.environ.get("XDG_CACHE_HOME"))


@functools.cache  # every call of an operator needs the path, and finding a package's version takes 300 us
def _path(name: str, root: str | None) -> Path:
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "none"
    slug = re.sub(r"[^a-z0-9.]+", "-", f"{name}-torch-{torch.__version__}-triton-{triton}".lower())
    return Path(root or Path.home() / ".cache") / "vbdl" / f"regime-{FORMAT}-{slug}.json"


def constants(names: Sequence[str]) -> dict[str, float] | None:
    """The constants of these names that were measured on the current device, or None if not all of them were."""
    device = device_name()
    return None if device is None else _read(path_of(device), tuple(names))


@functools.cache
def _read(path: Path, names: tuple[str, ...]) -> dict[str, float] | None:
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            return None
        values = {n: float(content["constants"][n]) for n in names}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    # 0 rows are valid: then the cost model decides
    sound = all(math.isfinite(v) and (v > 0 or (v == 0 and n.endswith("_rows"))) for n, v in values.items())
    return values if sound else None


def keep(name: str, constants: dict[str, float]) -> Path:
    """Write the constants of a device to its file and return the path; readers see the old file or the new one."""
    path = path_of(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=path.parent, suffix=".json")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump({"format": FORMAT, "device": name, "constants": constants}, file, indent=1)
        os.replace(draft, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(draft)
        raise
    _read.cache_clear()
    return path
