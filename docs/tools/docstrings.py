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

    def on_instance(self, *, obj: griffe.Object, **options: object) -> None:
        if obj.docstring is None or not isinstance(obj, (griffe.Class, griffe.Function)):
            return
        names = set()
        function = obj.members.get("__init__") if isinstance(obj, griffe.Class) else obj
        if isinstance(function, griffe.Function):
            names = {p.name for p in function.parameters}
        if isinstance(obj, griffe.Class):
            names |= {name for name, member in obj.members.items() if member.is_attribute}
        if not re.search(r"^Args:$", obj.docstring.value, re.MULTILINE):
            obj.docstring.value = readable(obj.docstring.value, names)
        elif ">>> " in obj.docstring.value:
            obj.docstring.value = readable(obj.docstring.value, set())
