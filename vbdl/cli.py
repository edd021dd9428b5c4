"""The command `vbdl`. Torch is imported by the command that needs it, so that help and version answer at once."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import vbdl


@dataclass(frozen=True)
class Demo:
    """Train MC dropout, mean-field and a deep ensemble on data that needs no download, and compare them.

    Prints a table, and saves figures and models."""

    out: Path = Path("vbdl-demo")
    """Folder for the figures and models."""
    seed: int = 1
    """Of the splits, the initialisations and the draws."""
    tasks: tuple[str, ...] = ("breast cancer", "digits", "diabetes")
    """Data sets to use."""
    effort: float = 1.0
    """Share of the training; 0.1 for a quick look."""
    timing: bool = True
    """Measure rows a second, for which each predictor is compiled."""
    threads: int = 1
    """Threads of torch. Networks this small do not gain from more; 0 leaves the choice to torch."""

    def __call__(self) -> None:
        import torch

        from vbdl.demo.run import run

        if self.threads < 0:
            raise ValueError(f"threads is 0 or more, got {self.threads}")
        if self.threads:
            torch.set_num_threads(self.threads)
        run(self.out, self.seed, self.tasks, self.effort, self.timing)


@dataclass(frozen=True)
class Info:
    """Versions, threads, devices and the compiler found: what a bug report needs."""

    def __call__(self) -> None:
        import platform

        import torch

        from vbdl.compiler import can_compile

        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        for name, value in {
            "vbdl": vbdl.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "system": platform.platform(),
            "cores": f"{os.cpu_count()}, torch uses {torch.get_num_threads()} threads",
            "C++ compiler": "found" if can_compile() else "none: predictions run uncompiled",
            "GPU": ", ".join(gpus) or "none",
        }.items():
            print(f"{name:<14} {value}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit code: 0, 1 for an error, 2 for a wrong command line, 130 when interrupted."""
    import logging

    import tyro

    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments == ["--version"]:
        print(f"vbdl {vbdl.__version__}")
        return 0
    command = tyro.cli(
        Annotated[Demo, tyro.conf.subcommand("demo")] | Annotated[Info, tyro.conf.subcommand("info")],  # type: ignore[arg-type]
        prog="vbdl",
        description="Bayesian deep learning with PyTorch: predictions that know what they do not know. "
        "`vbdl --version` prints the version.",
        args=arguments or ["--help"],
    )
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        command()
    except KeyboardInterrupt:
        print("vbdl: interrupted", file=sys.stderr)
        return 130
    # what a user can do something about is a line; anything else is a fault of ours and keeps its traceback
    except (ValueError, OSError, ModuleNotFoundError, FloatingPointError, RuntimeError) as error:
        if os.environ.get("VBDL_TRACEBACK"):
            raise
        print(f"vbdl: {error} (VBDL_TRACEBACK=1 shows where)", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
