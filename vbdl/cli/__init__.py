"""The command `vbdl`: one file a command, a dataclass whose fields are its options and whose call does the work.

Torch is imported by the command that needs it, inside its call, so that help and version answer at once.
"""

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Union

import vbdl
from vbdl.cli.bench import Bench
from vbdl.cli.calibrate import Calibrate
from vbdl.cli.compare import Compare
from vbdl.cli.config import configured
from vbdl.cli.demo import Demo
from vbdl.cli.evaluate import Evaluate
from vbdl.cli.export import Export
from vbdl.cli.fit import Fit
from vbdl.cli.info import Info
from vbdl.cli.inspect import Inspect
from vbdl.cli.predict import Predict
from vbdl.cli.recommend import Recommend
from vbdl.cli.report import Report
from vbdl.cli.serve import Serve

COMMANDS = {
    "bench": Bench,
    "calibrate": Calibrate,
    "compare": Compare,
    "demo": Demo,
    "evaluate": Evaluate,
    "export": Export,
    "fit": Fit,
    "info": Info,
    "inspect": Inspect,
    "predict": Predict,
    "recommend": Recommend,
    "report": Report,
    "serve": Serve,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit code: 0, 1 for an error, 2 for a wrong command line, 3 where it ended and some rows could
    not be used, 130 when interrupted."""
    import logging

    import tyro

    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments == ["--version"]:
        print(f"vbdl {vbdl.__version__}")
        return 0
    try:
        arguments, defaults = configured(arguments, COMMANDS)
    except (ValueError, OSError) as error:
        print(f"vbdl: {error}", file=sys.stderr)
        return 2
    named = arguments[0] if arguments else ""
    if named in COMMANDS:  # its parser alone: help answers sooner
        command = tyro.cli(COMMANDS[named], prog=f"vbdl {named}", args=arguments[1:], **defaults)
    else:
        command = tyro.cli(
            Union[tuple(Annotated[kind, tyro.conf.subcommand(name)] for name, kind in COMMANDS.items())],  # type: ignore[arg-type]  # noqa: UP007
            prog="vbdl",
            description="Bayesian deep learning with PyTorch: predictions that know what they do not know. "
            "`vbdl --version` prints the version.",
            args=arguments or ["--help"],
        )
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        return command() or 0
    except KeyboardInterrupt:
        print("vbdl: interrupted", file=sys.stderr)
        return 130
    # what a user can do something about is a line; anything else is a fault of ours and keeps its traceback
    except (ValueError, OSError, ModuleNotFoundError, FloatingPointError, RuntimeError) as error:
        if os.environ.get("VBDL_TRACEBACK"):
            raise
        print(f"vbdl: {error} (VBDL_TRACEBACK=1 shows where)", file=sys.stderr)
        return 1
