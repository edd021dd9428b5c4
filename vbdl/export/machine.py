"""What a compiled package was made for, and which packages were made here."""

import hashlib
import json
import os
import platform
from pathlib import Path

import torch


def describe() -> dict[str, object]:
    """The machine and the libraries that compiled code depends on."""
    return {
        "torch": str(torch.__version__),
        "system": platform.system(),
        "machine": platform.machine(),
        "cpu": sorted(_cpu_flags()),
    }


def misfit(made_for: dict[str, object]) -> str | None:
    """Why a package made for one machine does not run on this one, or None."""
    here = describe()
    for key in ("torch", "system", "machine"):
        if made_for.get(key) != here[key]:
            return f"it was made for {key} {made_for.get(key)}, and this is {here[key]}"
    missing = sorted(set(made_for.get("cpu", ())) - _cpu_flags())  # type: ignore[call-overload]
    return f"it was made for a processor with {', '.join(missing[:5])}, which this has not" if missing else None


def _cpu_flags() -> set[str]:
    """Instruction sets, as Linux names them; the compiler uses all that there are."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {torch.backends.cpu.get_cpu_capability()}
    found = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return set(found.partition(":")[2].split())


def index() -> Path:
    """The folder that remembers which packages were made here, readable by its owner only."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "vbdl" / "packages"


def remember(digest: str) -> None:
    """Note that a package with this digest was made here."""
    folder = index()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    (folder / digest).write_text(json.dumps(describe()))


def was_made_here(digest: str) -> bool:
    return len(digest) == 64 and digest.isalnum() and (index() / digest).is_file()


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
