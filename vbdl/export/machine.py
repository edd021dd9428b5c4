"""The machine that a compiled package was made for, and the record of packages made on this machine."""

import hashlib
import json
import os
import platform
from pathlib import Path

import torch

Machine = dict[str, str | list[str]]
"""The properties of a machine by name: torch, system, machine, and cpu, its instruction sets."""


def describe() -> Machine:
    """The properties that compiled code depends on: torch version, operating system, architecture, CPU features."""
    return {
        "torch": str(torch.__version__),
        "system": platform.system(),
        "machine": platform.machine(),
        "cpu": sorted(_cpu_flags()),
    }


def misfit(made_for: Machine) -> str | None:
    """The reason why a package made for a machine (`describe`) cannot run on this one, or None."""
    here = describe()
    for key in ("torch", "system", "machine"):
        if made_for.get(key) != here[key]:
            return f"it was made for {key} {made_for.get(key)}, but this is {here[key]}"
    missing = sorted(set(made_for.get("cpu", ())) - _cpu_flags())
    return f"it was made for a processor with {', '.join(missing[:5])}, which this one lacks" if missing else None


def _cpu_flags() -> set[str]:
    """The CPU's instruction sets by their Linux names; the compiler uses all of them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {torch.backends.cpu.get_cpu_capability()}
    flags_line = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return set(flags_line.partition(":")[2].split())


def index() -> Path:
    """The path of the folder that records which packages were made here."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "vbdl" / "packages"


def remember(digest: str) -> None:
    """Record that a package with this digest was made here, in a folder that only its owner can read."""
    folder = index()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    (folder / digest).write_text(json.dumps(describe()))


def was_made_here(digest: str) -> bool:
    return len(digest) == 64 and digest.isalnum() and (index() / digest).is_file()


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
