"""Small charts as inline SVG, colored by the page's style sheet, so that they follow its light or dark mode."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

WIDTH, HEIGHT = 320, 230
LEFT, RIGHT, TOP, BOTTOM = 54, 10, 10, 38  # the left margin fits the label and ticks of five characters


@dataclass
class Chart:
    """A chart with axes over x and y = (low, high); add marks, then call svg(). CSS classes c0, c1, ... are colors."""

    x: tuple[float, float]
    y: tuple[float, float]
    x_label: str = ""
    y_label: str = ""
    title: str = ""  # read out by screen readers
    log_x: bool = False
    log_y: bool = False
    marks: list[str] = field(default_factory=list)

    def _at(self, x: float, y: float) -> tuple[float, float]:
        def share(value: float, ends: tuple[float, float], log: bool) -> float:
            low, high = ends
            if log:
                low, high, value = math.log(low), math.log(high), math.log(max(value, 1e-300))
            return 0.5 if high == low else (value - low) / (high - low)

        width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
        across, up = share(x, self.x, self.log_x), share(y, self.y, self.log_y)
        return LEFT + width * across, TOP + height * (1 - min(1.05, max(-0.02, up)))

    def line(self, xs: Sequence[float], ys: Sequence[float], style: str, name: str = "", dots: bool = False) -> None:
        """Add a polyline; it is interrupted at points that are not finite."""
        parts, part = [], []
        for x, y in zip(xs, ys, strict=True):
            if math.isfinite(x) and math.isfinite(y):
                part.append("{:.1f},{:.1f}".format(*self._at(x, y)))
            elif part:
                parts, part = [*parts, part], []
        title = f"<title>{escape(name)}</title>" if name else ""
        for p in [*parts, part]:
            if p:
                self.marks.append(f'<polyline class="line {style}" points="{" ".join(p)}">{title}</polyline>')
        if dots:
            for p in (p for q in [*parts, part] for p in q):
                a, b = p.split(",")
                self.marks.append(f'<circle class="dot {style}" cx="{a}" cy="{b}" r="2.6"/>')

    def bars(self, edges: Sequence[float], heights: Sequence[float], style: str, name: str = "") -> None:
        """Add bars between consecutive edges, from the bottom."""
        title = f"<title>{escape(name)}</title>" if name else ""
        for low, high, height in zip(edges[:-1], edges[1:], heights, strict=True):
            if not height > 0:
                continue
            (left, top), (right, bottom) = self._at(low, height), self._at(high, self.y[0])
            self.marks.append(
                f'<rect class="bar {style}" x="{left:.1f}" y="{top:.1f}" width="{max(right - left - 0.6, 0.6):.1f}" '
                f'height="{max(bottom - top, 0):.1f}">{title}</rect>'
            )

    def svg(self) -> Markup:
        """The chart as markup for a page."""
        out = [
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(self.title)}">',
        ]
        for value in ticks(self.x, self.log_x):
            a, _ = self._at(value, self.y[0])
            out.append(f'<line class="grid" x1="{a:.1f}" x2="{a:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
            out.append(f'<text class="tick" x="{a:.1f}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">')
            out.append(f"{short(value)}</text>")
        for value in ticks(self.y, self.log_y):
            _, b = self._at(self.x[0], value)
            out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{b:.1f}" y2="{b:.1f}"/>')
            out.append(f'<text class="tick" x="{LEFT - 5}" y="{b + 3.5:.1f}" text-anchor="end">{short(value)}</text>')
        out += self.marks
        middle = (LEFT + WIDTH - RIGHT) / 2
        out.append(f'<text class="label" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">')
        out.append(f"{escape(self.x_label)}</text>")
        up = (TOP + HEIGHT - BOTTOM) / 2
        out.append(f'<text class="label" transform="translate(11 {up}) rotate(-90)" text-anchor="middle">')
        out.append(f"{escape(self.y_label)}</text></svg>")
        return Markup("".join(out))


def ticks(ends: tuple[float, float], log: bool = False) -> list[float]:
    """The positions of ticks: about five round numbers between the ends, or powers of ten if log."""
    low, high = ends
    if log:
        first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
        powers = [10.0**e for e in range(first, last + 1)]
        if len(powers) > 1:
            return powers[:: max(1, len(powers) // 5)]
        return [low, high]
    span = high - low
    if not span > 0:
        return [low]
    step = 10 ** math.floor(math.log10(span / 4))
    step = next(step * f for f in (1, 2, 5, 10) if span / (step * f) <= 5)
    start = math.ceil(low / step - 1e-9)
    return [(start + i) * step for i in range(int(math.floor(high / step + 1e-9)) - start + 1)]


def short(value: float) -> str:
    """The number of a tick as short text."""
    if value == 0:
        return "0"
    if abs(value) >= 1e5 or abs(value) < 1e-3:
        return f"{value:.0e}".replace("e+0", "e").replace("e-0", "e-")
    return f"{value:.4g}"
