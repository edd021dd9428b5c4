"""Docstrings as the API pages show them: lines `name: text` about parameters become a list, examples become code.

The docstrings are written for a terminal, where `help(vbdl.X)` shows them, so the same lines have to read well there.
"""

import re

import griffe

_ITEM = re.compile(r"(?P<names>[A-Za-z_]\w*(?:, [A-Za-z_]\w*)*)(?P<more> \([^)]*\))?: +(?P<text>\S.*)")
_SPLIT = re.compile(r"(?:;|\.)\s{2,}(?=[A-Za-z_]\w*(?:, [A-Za-z_]\w*)*: )")


def readable(text: str, parameters: set[str]) -> str:
    """The docstring as Markdown; parameters: the names that may begin an item of the list."""
    lines: list[str] = []
    item = code = False
    for line in text.splitlines():
        if line.lstrip().startswith(">>> ") and not code:
            lines += ["", "```python"]
            code = True
        if code:
            if line.strip():
                lines.append(line.strip() if line.lstrip().startswith((">>>", "...")) else line.strip())
                continue
            lines += ["```", ""]
            code = False
        if line.strip() in ("Example:", "Examples:"):
            lines += ["", "**Example**", ""]
            continue
        match = _ITEM.fullmatch(line)
        if match and set(match["names"].split(", ")) <= parameters:
            if not item:
                lines.append("")
            for part in _SPLIT.split(line):
                found = _ITEM.fullmatch(part)
                names = ", ".join(f"`{name}`" for name in found["names"].split(", ")) if found else ""
                lines.append(f"- {names}{found['more'] or ''}: {found['text']}" if found else f"- {part}")
            item = True
        elif item and line.startswith("    "):
            lines.append("  " + line.strip())
        else:
            if item and line.strip():
                lines.append("")
            item = False
            lines.append(line)
    if code:
        lines.append("```")
    return "\n".join(lines)


class Readable(griffe.Extension):
    """Rewrite the docstring of every class and function."""

    def on_function_instance(self, *, func: griffe.Function, **options: object) -> None:
        _rewrite(func, {p.name for p in func.parameters})

    def on_class_members(self, *, cls: griffe.Class, **options: object) -> None:
        """Called when the members of a class are known, so that the arguments of its constructor are."""
        constructor = cls.members.get("__init__")
        names = {p.name for p in constructor.parameters} if isinstance(constructor, griffe.Function) else set()
        _rewrite(cls, names | {name for name, member in cls.members.items() if member.is_attribute})


def _rewrite(obj: griffe.Object, names: set[str]) -> None:
    if obj.docstring is None:
        return
    sections = re.search(r"^Args:$", obj.docstring.value, re.MULTILINE)  # mkdocstrings makes a table of these
    if not sections or ">>> " in obj.docstring.value:
        obj.docstring.value = readable(obj.docstring.value, set() if sections else names)
