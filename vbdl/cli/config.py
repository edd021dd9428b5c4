"""The option `--config FILE` reads options from a TOML file; options on the command line override them.

    vbdl fit data.parquet --config fit.toml

Keys are options of the command, written with - or _. They stand at the top of the file, or in a table named after the
command, so that one file can hold options of several commands. An unknown key is an error that names the nearest
option.
"""

import dataclasses
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

FORMER = {"fit": {"draws": "samples"}}
"""Options that have another name now: {command: {former name: name}}."""


class Configured(typing.TypedDict, total=False):
    """Keyword arguments of `tyro.cli`."""

    default: Callable[[], int | None]  # a command, which returns an exit code or None


def configured(arguments: Sequence[str], commands: Mapping[str, type]) -> tuple[list[str], Configured]:
    """Return the arguments without `--config FILE`, and {"default": the command with the file's options} for tyro.

    Raises ValueError if the file is not TOML, or has an unknown option or a value of the wrong type; OSError if the
    file cannot be read.
    """
    rest, path = [], None
    remaining = iter(arguments)
    for argument in remaining:
        if argument == "--config":
            path = next(remaining, None)
            if path is None:
                raise ValueError("--config needs a file")
        elif argument.startswith("--config="):
            path = argument.removeprefix("--config=")
        else:
            rest.append(_option_of_today(argument, rest[0] if rest else ""))
    if path is None:
        return rest, {}
    if not rest or rest[0] not in commands:
        raise ValueError(f"--config belongs to a command: vbdl {'|'.join(commands)} --config {path}")
    name = rest[0]
    return rest, {"default": _defaults(commands[name], name, _section(Path(path), name, commands), path)}


def _option_of_today(argument: str, command: str) -> str:
    """An argument as it is, or with the name of today in place of an option's former name."""
    option, equals, value = argument.partition("=")
    new = FORMER.get(command, {}).get(option.removeprefix("--")) if option.startswith("--") else None
    return argument if new is None else f"{_renamed(option, f'--{new}')}{equals}{value}"


def _renamed(old: str, new: str) -> str:
    """Print that an option has a new name, and return the new name."""
    print(f"vbdl: {old} is called {new} now", file=sys.stderr)
    return new


def _section(path: Path, name: str, commands: Mapping[str, type]) -> dict[str, object]:
    """Read the options of one command from a file."""
    import tomllib

    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from error
    tables = {k for k, v in content.items() if isinstance(v, dict) and k in commands}
    top = {k: v for k, v in content.items() if k not in tables}
    if tables and top:
        raise ValueError(
            f"{path} has options at its top ({', '.join(top)}) and in tables ({', '.join(sorted(tables))})"
        )
    return content.get(name, {}) if tables else top


def _defaults(kind: type, name: str, values: Mapping[str, object], path: str) -> Callable[[], int | None]:
    """The command of this class with the values of a file's options; options without a value stay required."""
    import difflib

    import msgspec
    import tyro

    types = typing.get_type_hints(kind)
    options: dict[str, object] = {}
    for key, value in values.items():
        option = key.replace("-", "_")
        if new := FORMER.get(name, {}).get(option):
            option = _renamed(option, new)
        if option not in types:
            near = difflib.get_close_matches(option, types, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(sorted(types))}"
            raise ValueError(f"{path}: {key!r} is no option of vbdl {kind.__name__.lower()}{hint}")
        if option in options:
            raise ValueError(f"{path}: {key!r} stands there twice, with - and with _")
        try:
            options[option] = msgspec.convert(value, types[option], dec_hook=_path, strict=True)
        except msgspec.ValidationError as error:
            raise ValueError(f"{path}: {key!r}: {error}") from error
    for field in dataclasses.fields(kind):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if field.name not in options and required:
            options[field.name] = tyro.MISSING
    try:
        return kind(**options)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _path(kind: type, value: object) -> Path:
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise NotImplementedError
