"""Line charts as inline SVG: small, without scripts, in the page's own colours."""

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

Points = Sequence[tuple[float, float]]
COLOURS = ("#2266aa", "#cc5522", "#228855", "#aa3377", "#997700", "#5555bb", "#008899", "#884422")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 300, 64, 16, 30, 34
LEGEND = 8  # names beside the chart; every line says its name on hover


def line_chart(
    title: str, curves: Mapping[str, Points], *, marks: Mapping[float, str] | None = None, log: bool = False,
    steps: bool = False, x_end: float | None = None,
) -> str:  # fmt: skip
    """One `<figure>` with a line for each curve of (step, value), and a vertical line at each mark, which says why.

    log: logarithmic values (to base 2); steps: values hold until the next point.
    """
    drawn = {name: [(x, y) for x, y in points if math.isfinite(y) and (y > 0 or not log)] for name, points in
             curves.items()}  # fmt: skip
    drawn = {name: points for name, points in drawn.items() if points}
    if not drawn:
        return ""
    across = _scale(0.0, max([x for points in drawn.values() for x, _ in points] + [x_end or 1.0]), LEFT, WIDTH - RIGHT)
    values = [y for points in drawn.values() for _, y in points]
    low, high = min(values), max(values)
    if log:
        low, high = math.floor(math.log2(low)), math.ceil(math.log2(high))
    elif low > 0 and low < 0.6 * high:
        low = 0.0
    if low == high:
        low, high = low - 0.5 * abs(low or 1.0), high + 0.5 * abs(high or 1.0)
    up = _scale(low, high, HEIGHT - BOTTOM, TOP)
    place = (lambda y: up(math.log2(y))) if log else up
    parts = [_grid(across, x_end or max(x for points in drawn.values() for x, _ in points), up, low, high, log)]
    for step, words in (marks or {}).items():
        x = across(step)
        parts.append(
            f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}">'
            f"<title>{escape(words)}</title></line>"
        )
    for i, (name, points) in enumerate(drawn.items()):
        path = _path([(across(x), place(y)) for x, y in points], steps)
        parts.append(
            f'<path class="curve" stroke="{COLOURS[i % len(COLOURS)]}" d="{path}"><title>{escape(name)}</title></path>'
        )
    for i, name in enumerate(list(drawn)[:LEGEND]):
        x = LEFT + i * (WIDTH - LEFT) / LEGEND
        colour = COLOURS[i % len(COLOURS)]
        parts.append(f'<text x="{x:.0f}" y="{TOP - 10}" style="fill:{colour}">{escape(name[:14])}</text>')
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg></figure>'
    )


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _path(points: Points, steps: bool) -> str:
    if len(points) == 1:  # a dot, which a path of one point would not show
        return f"M{points[0][0] - 3:.1f} {points[0][1]:.1f}h6"
    first, rest = points[0], points[1:]
    text = f"M{first[0]:.1f} {first[1]:.1f}"
    return text + "".join(f"H{x:.1f}V{y:.1f}" if steps else f"L{x:.1f} {y:.1f}" for x, y in rest)


def _grid(
    across: Callable[[float], float], x_end: float, up: Callable[[float], float], low: float, high: float, log: bool
) -> str:
    parts = []
    heights = _ticks(low, high) if not log else [float(i) for i in range(int(low), int(high) + 1)]
    for value in heights:
        y, label = up(value), f"{2**value:g}" if log else f"{value:g}"
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for value in _ticks(0.0, x_end):
        parts.append(
            f'<text x="{across(value):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{value:,.0f}</text>'
        )
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">step</text>')
    return "".join(parts)


def _ticks(low: float, high: float) -> list[float]:
    """Four to ten round numbers between low and high."""
    size = 10 ** math.floor(math.log10((high - low) / 4))
    size *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (factor * size) <= 8)
    return [round(i * size, 12) for i in range(math.ceil(low / size - 1e-9), math.floor(high / size + 1e-9) + 1)]
