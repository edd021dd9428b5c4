"""The code blocks of a page, run in order as one session: for the build, which shows their output, and for the tests.

A block is a fence that begins with ```python, or with ```console, whose lines "$ vbdl ..." are commands. A comment in
the line above keeps a block from running, and gives the reason: <!-- not run: needs a running service -->.
"""

import contextlib
import io
import linecache
import os
import re
import shlex
import subprocess
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_FENCE = re.compile(
    r"^(?P<skip><!-- not run: [^\n]+ -->\n)?```(?P<language>python|console)\n(?P<code>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """One block of code of a page, and where it is in the page's text."""

    code: str
    language: str  # "python" or "console"
    line: int  # of its first line of code, from 1
    end: int  # the character behind the closing fence
    runs: bool


def blocks(text: str) -> list[Block]:
    """All blocks of a page, in order."""
    found = []
    for match in _FENCE.finditer(text):
        line = text.count("\n", 0, match.start("code")) + 1
        found.append(Block(match["code"], match["language"], line, match.end(), match["skip"] is None))
    return found


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


class Session:
    """The names that the blocks of one page share; they run in a folder of their own."""

    def __init__(self, page: str, folder: Path):
        self.page, self.folder = page, folder
        self.names: dict[str, object] = {"__name__": "__main__"}

    def run(self, block: Block) -> str:
        """Run the block and return what it prints. An exception names the page and the line."""
        return self._python(block) if block.language == "python" else self._commands(block)

    def _commands(self, block: Block) -> str:
        """Run the commands of vbdl in this process, which saves each the import of torch, and others in a shell."""
        from vbdl.cli import main

        printed = []
        for command in (line.removeprefix("$ ") for line in block.code.splitlines() if line.startswith("$ ")):
            with _inside(self.folder), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                words, out = shlex.split(command), io.StringIO()
                if words[0] == "vbdl":
                    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                        code = main(words[1:])
                else:
                    done = subprocess.run(command, shell=True, capture_output=True, text=True)
                    code = done.returncode
                    out.write(done.stdout + done.stderr)
            if code != 0:
                raise RuntimeError(f"{self.page}, line {block.line}: {command} ended with {code}: {out.getvalue()}")
            printed.append(out.getvalue())
        return "".join(printed)

    def _python(self, block: Block) -> str:
        name = f"{self.page}, line {block.line}"
        # the source stays readable, for a class whose network or method vbdl saves or describes
        linecache.cache[name] = (len(block.code), None, block.code.splitlines(keepends=True), name)
        printed = io.StringIO()
        with _inside(self.folder), contextlib.redirect_stdout(printed), warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")
            exec(compile(block.code, name, "exec"), self.names)
        return printed.getvalue()

    def run_all(self, text: str) -> dict[int, str]:
        """Run every block of a page that runs: what each prints, by the place where the block ends."""
        return {block.end: self.run(block) for block in blocks(text) if block.runs}


def with_output(text: str, printed: dict[int, str]) -> str:
    """The page with what each block prints shown below it."""
    for end in sorted(printed, reverse=True):
        if printed[end].strip():
            text = text[:end] + f"\n\n```{{.text .output}}\n{printed[end].rstrip()}\n```" + text[end:]
    return text
