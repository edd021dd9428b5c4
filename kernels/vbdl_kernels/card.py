"""The speeds of a GPU that the cost model computes with: those of an H100, or those measured on the device itself.

`python -m vbdl_kernels.measured` measures a device's own and keeps them in a file in $XDG_CACHE_HOME/vbdl
(~/.cache/vbdl), named by the format, the device and the versions of torch and triton. The file is written whole or not
at all, and one that cannot be read counts as none.
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

FORMAT = 3


@dataclass(frozen=True)
class Card:
    """What a card does a second, and what a launch costs. Defaults: an H100, products at 65 % of the data sheet."""

    normals: float = 0.97e12  # drawn inside a product of few rows
    half_flops: float = 0.65 * 989e12  # tensor cores, bfloat16 and float16
    float_flops: float = 0.65 * 494e12  # tensor cores, tf32
    exact_flops: float = 51e12  # float32 without tensor cores
    bytes: float = 3.0e12  # of main memory, read and written
    launch: float = 1.2e-6  # seconds between two kernels in a CUDA graph
    dispatch: float = 20e-6  # seconds of the host to start a kernel outside of one; not measured on that card
    overlap: float = 0.66  # of noise and product, the part of the shorter that the longer does not hide
    step: float = 1.2e-6  # seconds of one layer of a small network inside one program: latency, not work
    programs: float = 264.0  # of such networks at once
    half_rows: float = 0.0  # rows up to which the fused kernel was measured to be the faster; 0: by the model
    float_rows: float = 0.0  # the same in float32


def device_card() -> Card:
    """The constants measured on the current device, or the defaults."""
    return Card(**(constants(tuple(Card.__dataclass_fields__)) or {}))


def device_name() -> str | None:
    """The current accelerator, or None on a CPU."""
    return _name(torch.cuda.current_device()) if torch.cuda.is_available() else None


@functools.cache
def _name(index: int) -> str:
    return torch.cuda.get_device_name(index)


def path_of(name: str) -> Path:
    return _path(name, os.environ.get("XDG_CACHE_HOME"))


@functools.cache  # asked for in every call of an operator, and the version of a package takes 300 us to find
def _path(name: str, root: str | None) -> Path:
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "none"
    slug = re.sub(r"[^a-z0-9.]+", "-", f"{name}-torch-{torch.__version__}-triton-{triton}".lower())
    return Path(root or Path.home() / ".cache") / "vbdl" / f"regime-{FORMAT}-{slug}.json"


def constants(names: Sequence[str]) -> dict[str, float] | None:
    """What was measured on the current device, if all of these were."""
    device = device_name()
    return None if device is None else _read(path_of(device), tuple(names))


@functools.cache
def _read(path: Path, names: tuple[str, ...]) -> dict[str, float] | None:
    try:
        found = json.loads(path.read_text())
        if found["format"] != FORMAT:
            return None
        kept = {n: float(found["constants"][n]) for n in names}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    # zero rows: there the fused kernel was never the slower one, or never measured
    sound = all(math.isfinite(v) and (v > 0 or (v == 0 and n.endswith("_rows"))) for n, v in kept.items())
    return kept if sound else None


def keep(name: str, found: dict[str, float]) -> Path:
    """Write the constants of a device; readers see the old file or the new one."""
    path = path_of(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=path.parent, suffix=".json")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump({"format": FORMAT, "device": name, "constants": found}, file, indent=1)
        os.replace(draft, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(draft)
        raise
    _read.cache_clear()
    return path
