"""The command `vbdl`: each command is a dataclass in a file of its own; its fields are options, its call does the work.

A command imports torch inside its call, so that help and version answer at once.
"""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from typing import Annotated, TextIO, Union

import vbdl
from vbdl.cli.config import configured

_NAMES = (
    "bench", "calibrate", "compare", "demo", "evaluate", "export", "fit", "info", "inspect", "predict", "recommend",
    "report", "serve",
)  # fmt: skip


class _Commands(Mapping[str, type]):
    """A mapping from command names to classes, each imported on first use: "fit" to `Fit` of `vbdl/cli/fit.py`."""

    def __getitem__(self, name: str) -> type:
        if name not in _NAMES:
            raise KeyError(name)
        return getattr(import_module(f"vbdl.cli.{name}"), name.capitalize())

    def __contains__(self, name: object) -> bool:
        return name in _NAMES

    def __iter__(self) -> Iterator[str]:
        return iter(_NAMES)

    def __len__(self) -> int:
        return len(_NAMES)


COMMANDS = _Commands()


class _Stream:
    """A text stream that discards what is written after its reader has closed the pipe, as `head` does."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self.leave()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self.leave()

    def leave(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    0: done. 1: an error. 2: a wrong command line. 3: done, but some rows could not be used. 130: interrupted.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Stream(before[0]), _Stream(before[1])  # type: ignore[assignment]
    try:
        try:
            return _main(argv)
        finally:
            sys.stdout.flush()  # here, because a closed pipe is no error here
            sys.stderr.flush()
    except OSError as error:  # writing the output failed, for example on a full disk
        sys.stdout.leave()  # type: ignore[attr-defined]
        print(f"vbdl: {error}", file=sys.stderr)
        return 1
    finally:
        sys.stdout, sys.stderr = before


def _main(argv: Sequence[str] | None) -> int:
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
    if named in COMMANDS:  # build the parser of this command only: help answers sooner
        command = tyro.cli(COMMANDS[named], prog=f"vbdl {named}", args=arguments[1:], **defaults)
    else:
        command = tyro.cli(
            Union[tuple(Annotated[kind, tyro.conf.subcommand(name)] for name, kind in COMMANDS.items())],  # type: ignore[arg-type]  # noqa: UP007
            prog="vbdl",
            description="Bayesian deep learning with PyTorch: predictions with their uncertainty. "
            "`vbdl --version` prints the version.",
            args=arguments or ["--help"],
        )
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if trusted := getattr(command, "trust", ()):
        from vbdl.artifact.trust import look_here

        look_here(trusted)
    try:
        return command() or 0
    except KeyboardInterrupt:
        print("vbdl: interrupted", file=sys.stderr)
        return 130
    # errors that a user can mend take one line; any other error is a bug of vbdl and keeps its traceback
    except (ValueError, OSError, ModuleNotFoundError, FloatingPointError, RuntimeError) as error:
        if os.environ.get("VBDL_TRACEBACK"):
            raise
        print(f"vbdl: {error} (VBDL_TRACEBACK=1 shows where)", file=sys.stderr)
        return 1
