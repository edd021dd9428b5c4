"""Draw the cheat sheet, one landscape page, from cheatsheet.txt.

    python docs/tools/cheatsheet.py FOLDER      writes cheatsheet.svg and cheatsheet.pdf

A line that begins with "# " is a heading. Two or more spaces inside another line separate code from what it means.
"""

import io
import re
import sys
from pathlib import Path

SOURCE = Path(__file__).with_name("cheatsheet.txt")
WIDTH, HEIGHT = 11.69, 8.27  # inches, A4
COLUMNS, MARGIN, SIZE, STEP = 3, 0.35, 6.8, 0.182  # the last: inches from line to line


def blocks() -> list[list[str]]:
    """The sections, each a heading and its lines."""
    return [part.splitlines() for part in SOURCE.read_text().strip().split("\n\n")]


def columns() -> list[list[list[str]]]:
    """The sections in columns, filled in order, with the lowest possible height."""
    sections = blocks()
    heights = [len(section) + 0.9 for section in sections]

    def filled(limit: float) -> list[list[list[str]]]:
        found, used = [[]], 0.0
        for section, height in zip(sections, heights, strict=True):
            if found[-1] and used + height > limit:
                found.append([])
                used = 0.0
            found[-1].append(section)
            used += height
        return found

    limit = max(heights)
    while len(filled(limit)) > COLUMNS:
        limit += 0.5
    return filled(limit)


def draw() -> dict[str, bytes]:
    """The sheet as files by suffix, the same bytes in every run."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "vbdl"
    from matplotlib import pyplot as plt

    figure = plt.figure(figsize=(WIDTH, HEIGHT), facecolor="white")
    figure.text(MARGIN / WIDTH, 1 - 0.36 / HEIGHT, "vbdl", size=17, weight="bold", color="#1a3c8f", va="center")
    subtitle = "Bayesian deep learning for any PyTorch module, as one compiled function"
    figure.text((MARGIN + 0.75) / WIDTH, 1 - 0.37 / HEIGHT, subtitle, size=9, color="#444444", va="center")
    width = (WIDTH - 2 * MARGIN) / COLUMNS
    for number, column in enumerate(columns()):
        left, y = MARGIN + number * width, HEIGHT - 0.78
        for heading, *lines in column:
            figure.text(left / WIDTH, y / HEIGHT, heading.removeprefix("# "), size=8.8, weight="bold", color="#c4501c")
            y -= 1.15 * STEP
            for line in lines:
                code, _, meaning = re.sub(r"(?<=\S) {2,}", "\0", line).partition("\0")
                text = {"size": SIZE, "family": "DejaVu Sans Mono"}
                figure.text(left / WIDTH, y / HEIGHT, code, color="#111111", **text)
                if meaning:
                    start = max(len(code), line.index(meaning))  # in characters, as in the source
                    x = left + start * SIZE * 0.602 / 72
                    figure.text(x / WIDTH, y / HEIGHT, meaning, color="#5b6b8f", size=SIZE - 0.5)
                y -= STEP
            y -= 0.75 * STEP
    files = {}
    for suffix, metadata in (("svg", {"Date": None}), ("pdf", {"CreationDate": None})):
        out = io.BytesIO()
        figure.savefig(out, format=suffix, metadata=metadata)
        files[suffix] = out.getvalue()
    plt.close(figure)
    return files


if __name__ == "__main__":
    for suffix, content in draw().items():
        (Path(sys.argv[1]) / f"cheatsheet.{suffix}").write_bytes(content)
