"""Draws line charts as inline SVG, for a page that loads nothing and runs nothing. Colours come from the page's CSS.

Only presentation attributes are used, because a strict Content-Security-Policy drops `style` attributes. Each chart has a
title and a description for screen readers.
"""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Callable, Sequence

Point = tuple[float, float]
"""x (a step) and y of a point."""

WIDTH, HEIGHT = 560, 236
"""Size of a chart, in SVG units. Chosen by hand, like its margins."""
LEFT, RIGHT, TOP, BOTTOM = 58, 62, 14, 34
"""Margins of a chart, in SVG units."""
MAX_POINTS = 480
"""Largest number of points in a curve, roughly: more than the plot's width in pixels would only make the page heavy."""


@dataclasses.dataclass(frozen=True)
class Curve:
    """A curve of a chart. `kind` is its CSS class: "line", "faint" (behind another), "dots" (a line with its points marked)."""

    label: str
    points: Sequence[Point]
    kind: str = "line"


def chart(
    name: str,
    title: str,
    curves: Sequence[Curve],
    show: Callable[[float], str],
    from_zero: bool = False,
    marked: tuple[Point, str] | None = None,
    crosses: Sequence[float] = (),
) -> str:
    """Return a chart as one SVG element: steps along x, the curves' values along y, formatted by `show`; "" without values.

    name: makes ids unique on the page. marked: a point to ring, with its label. crosses: steps to mark on the x axis.
    Values that are not finite leave a gap. The first curve that is not faint is described and labelled.
    """
    curves = [Curve(curve.label, thin(curve.points), curve.kind) for curve in curves]
    values = [point for curve in curves for point in curve.points if math.isfinite(point[1])]
    if not values:
        return ""
    main = next((curve for curve in curves if curve.kind != "faint"), curves[0])
    x_ticks = whole_ticks(min(x for x, _ in values), max(x for x, _ in values))
    low, high = min(y for _, y in values), max(y for _, y in values)
    y_ticks = nice_ticks(0.0 if from_zero else low, high)
    x_low, x_high = min(x for x, _ in values), max(max(x for x, _ in values), x_ticks[-1])

    def place(point: Point) -> Point:
        across = (point[0] - x_low) / (x_high - x_low) if x_high > x_low else 0.5
        up = (point[1] - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [_grid(x_ticks, y_ticks, place, show)]
    parts += [f'<path class="{curve.kind}" d="{_path(curve.points, place)}"/>' for curve in curves]
    for curve in curves:
        if curve.kind == "dots" or len(curve.points) == 1:
            parts += [_dot(place(point), 3, f"step {point[0]:g}: {show(point[1])}") for point in _finite(curve.points)]
    parts += [f'<path class="cross" d="M{place((x, 0))[0]:.1f} {HEIGHT - BOTTOM}v-8"/>' for x in thin_list(crosses)]
    if marked is not None:
        parts.append(_dot(place(marked[0]), 6, f"{marked[1]}, step {marked[0][0]:g}: {show(marked[0][1])}", "ring"))
    end = _finite(main.points)[-1]
    x, y = place(end)
    parts.append(f'<text class="end" x="{x + 10:.1f}" y="{y + 4:.1f}">{_text(show(end[1]))}</text>')
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="{name}-title {name}-desc">'
        f'<title id="{name}-title">{_text(title)}</title>'
        f'<desc id="{name}-desc">{_text(describe(main, show))}</desc>{"".join(parts)}</svg>'
    )


def describe(curve: Curve, show: Callable[[float], str]) -> str:
    """Return a sentence that describes the curve: its first, last, lowest and highest values."""
    points = _finite(curve.points)
    (first, start), (last, end) = points[0], points[-1]
    bottom, top = min(points, key=lambda p: p[1]), max(points, key=lambda p: p[1])
    return (
        f"{curve.label}: {show(start)} at step {first:g}, {show(end)} at step {last:g}; "
        f"lowest {show(bottom[1])} at step {bottom[0]:g}, highest {show(top[1])} at step {top[0]:g}."
    )


def smooth(points: Sequence[Point]) -> list[Point]:
    """Return the curve's exponential moving average, whose half-life is a fortieth of the curve, corrected for its start.

    Values that are not finite are skipped.
    """
    finite = _finite(points)
    keep = 0.5 ** (1 / max(1.0, len(finite) / 40))
    total = weight = 0.0
    smoothed = []
    for x, y in finite:
        total, weight = keep * total + (1 - keep) * y, keep * weight + (1 - keep)
        smoothed.append((x, total / weight))
    return smoothed


def thin(points: Sequence[Point]) -> list[Point]:
    """Return about MAX_POINTS of the points: the lowest and the highest of each stretch, so that no spike is lost."""
    if len(points) <= MAX_POINTS:
        return list(points)
    stretch = math.ceil(2 * len(points) / MAX_POINTS)
    kept = [points[0]]
    for start in range(0, len(points), stretch):
        part = _finite(points[start : start + stretch])
        if part:
            kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return [*kept, points[-1]] if kept[-1] != points[-1] else kept


def thin_list(values: Sequence[float]) -> Sequence[float]:
    """Return at most MAX_POINTS of the values, evenly spaced."""
    return values[:: math.ceil(len(values) / MAX_POINTS) or 1]


def nice_ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Return about `about` round numbers (1, 2, 2.5 or 5 times a power of ten) that enclose low and high."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # put a flat curve in the middle
        low, high = (low - abs(low) / 20, high + abs(high) / 20) if high else (0.0, 1.0)
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    size = next(power * nice for nice in (1, 2, 2.5, 5, 10) if power * nice >= rough * 0.999)
    first, last = math.floor(low / size + 1e-9), math.ceil(high / size - 1e-9)
    return [index * size for index in range(first, last + 1)]


def whole_ticks(low: float, high: float) -> list[float]:
    """Return round whole numbers between low and high; `low` alone if there are none."""
    ticks = [tick for tick in nice_ticks(low, high, 6) if low <= tick <= high and tick == round(tick)]
    return ticks or [low]


def _grid(
    x_ticks: Sequence[float], y_ticks: Sequence[float], place: Callable[[Point], Point], show: Callable[[float], str]
) -> str:
    lines, labels = [], []
    for tick in y_ticks:
        y = place((0, tick))[1]
        lines.append(f"M{LEFT} {y:.1f}H{WIDTH - RIGHT}")
        labels.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{_text(show(tick))}</text>')
    for tick in x_ticks:
        x = place((tick, 0))[0]
        labels.append(f'<text class="tick" x="{x:.1f}" y="{HEIGHT - 12}" text-anchor="middle">{tick:,.0f}</text>')
    return f'<path class="grid" d="{"".join(lines)}"/>{"".join(labels)}'


def _path(points: Sequence[Point], place: Callable[[Point], Point]) -> str:
    """Return the SVG path data of a curve; a value that is not finite leaves a gap."""
    commands, drawing = [], False
    for point in points:
        if not math.isfinite(point[1]):
            drawing = False
            continue
        x, y = place(point)
        commands.append(f"{'L' if drawing else 'M'}{x:.1f} {y:.1f}")
        drawing = True
    return "".join(commands)


def _dot(at: Point, radius: int, tip: str, kind: str = "dot") -> str:
    return f'<circle class="{kind}" cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="{radius}"><title>{_text(tip)}</title></circle>'


def _finite(points: Sequence[Point]) -> list[Point]:
    return [point for point in points if math.isfinite(point[1])]


def _text(text: str) -> str:
    return html.escape(text, quote=True)
