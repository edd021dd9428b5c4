"""Compile the words of philox.c when the package is installed or a wheel is built, if there is a C compiler.

Without one the wheel is the same for every system, and NumPy draws the words. The variable `CC` names another compiler;
`VBDL_NATIVE=0` leaves the library out, and `VBDL_NATIVE=1` makes it an error that it cannot be compiled.
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FLAGS = ("-O3", "-std=c11", "-fPIC", "-shared", "-ffp-contract=off")


class Hook(BuildHookInterface):
    """The step of the build that compiles the library beside its source."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile the library into the package, and name the system in the wheel that has it."""
        wanted = os.environ.get("VBDL_NATIVE", "")
        folder = Path(self.root) / "kernels" / "vbdl_kernels"
        library = folder / "libphilox.so"
        if wanted == "0":
            library.unlink(missing_ok=True)
            return
        if (why := compiled(folder / "philox.c", library)) is not None:
            if wanted:
                raise RuntimeError(f"philox.c cannot be compiled: {why}")
            self.app.display_warning(f"vbdl draws noise by NumPy, several times slower than by philox.c: {why}")
            return
        build_data["artifacts"].append("kernels/vbdl_kernels/libphilox.so")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"


def compiled(source: Path, library: Path) -> str | None:
    """Compile the source, and say why that failed."""
    if sys.platform == "win32":
        return "not on Windows"
    compiler = shlex.split(os.environ.get("CC", "cc"))
    if shutil.which(compiler[0]) is None:
        return f"there is no C compiler {compiler[0]!r}"
    made = library.with_suffix(f".{os.getpid()}")  # another process may be loading the library
    try:
        run = subprocess.run(
            [*compiler, *FLAGS, str(source), "-o", str(made)], capture_output=True, text=True, errors="replace"
        )
        if run.returncode == 0:
            made.replace(library)
            return None
        return run.stderr.strip()
    except OSError as error:
        return str(error)
    finally:
        made.unlink(missing_ok=True)
