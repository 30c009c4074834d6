"""Draw line charts as inline SVG: no script, no request, colours from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH, HEIGHT = 360, 170
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 10, 24
MAX_POINTS = 300

Point = tuple[float, float]


@dataclass(frozen=True)
class Scale:
    """Values to heights, linear or by decades."""

    low: float
    high: float
    log: bool
    ticks: tuple[float, ...]

    def __call__(self, value: float) -> float:
        low, high, value = (math.log10(x) if self.log else x for x in (self.low, self.high, value))
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - BOTTOM - TOP)


def line_chart(steps: Sequence[int], values: Sequence[float], *, label: str) -> Markup:
    """Draw one figure over the optimisation steps; gaps where it is not finite.

    label: the chart's text alternative.
    """
    points = downsample(list(zip(steps, values, strict=True)))
    scale = fit([y for _, y in points if math.isfinite(y)])
    first, last = (steps[0], steps[-1]) if steps else (0, 1)

    def x(step: float) -> float:
        inner = WIDTH - LEFT - RIGHT
        return LEFT + (step - first) / (last - first) * inner if last > first else LEFT + inner / 2

    grid = Markup("").join(
        Markup('<line class="grid" x1="{}" x2="{}" y1="{y}" y2="{y}"/><text x="{}" y="{}" class="tick y">{}</text>')
        .format(LEFT, WIDTH - RIGHT, LEFT - 6, f"{scale(tick) + 3.5:.1f}", number(tick), y=f"{scale(tick):.1f}")
        for tick in scale.ticks
    )  # fmt: skip
    path, pen_up = [], True
    for step, value in points:
        if math.isfinite(value):
            path.append(f"{'M' if pen_up else 'L'}{x(step):.1f} {scale(value):.1f}")
        pen_up = not math.isfinite(value)
    finite = [(x(step), scale(value)) for step, value in points if math.isfinite(value)]
    dots = finite if len(finite) <= 40 else finite[-1:]
    marks = Markup("").join(
        Markup('<circle class="dot" cx="{}" cy="{}" r="{}"/>').format(f"{cx:.1f}", f"{cy:.1f}", 3 if n else 2)
        for n, (cx, cy) in ((i == len(dots) - 1, dot) for i, dot in enumerate(dots))
    )
    ends = [(first, "start"), (last, "end")] if last > first else [(first, "middle")]
    below = Markup("").join(
        Markup('<text x="{}" y="{}" text-anchor="{}" class="tick">{}</text>').format(
            f"{x(step):.1f}", HEIGHT - 7, anchor, f"step {step}"
        )
        for step, anchor in ends
    )
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}<path class="line" d="{}"/>{}{}</svg>').format(
        WIDTH, HEIGHT, label, grid, "".join(path), marks, below
    )


def downsample(points: list[Point], limit: int = MAX_POINTS) -> list[Point]:
    """Reduce points to at most ``limit``: of each stretch its lowest and its highest, so that no spike is lost.

    A stretch with a value that is not finite keeps that one, too, as a gap.
    """
    if len(points) <= limit:
        return points
    stretches = max(limit // 3, 1)
    kept: list[Point] = []
    for i in range(stretches):
        part = points[i * len(points) // stretches : (i + 1) * len(points) // stretches]
        finite = [point for point in part if math.isfinite(point[1])]
        gaps = [point for point in part if not math.isfinite(point[1])][:1]
        extremes = {min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])} if finite else set()
        kept += sorted([*extremes, *gaps])
    return kept


def fit(values: Sequence[float]) -> Scale:
    """Fit a scale to the values, with a few round ticks; by decades where they span more than two."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if low > 0 and high / low > 100:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        every = max(1, math.ceil((last - first) / 4))
        return Scale(10.0**first, 10.0**last, True, tuple(10.0**e for e in range(first, last + 1, every)))
    if low == high:
        low, high = (low - abs(low) / 2, high + abs(high) / 2) if low else (0.0, 1.0)
    elif 0 < low < high / 2:
        low = 0.0  # a fall by half should look like one
    raw = (high - low) / 4
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return Scale(first * step, last * step, False, tuple(i * step for i in range(first, last + 1)))


_SUPERSCRIPT = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")


def number(value: float | None) -> str:
    """Format a number: three significant digits, powers of ten written out; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        digits = max(0, 2 - math.floor(math.log10(abs(value))))
        text = f"{value:.{digits}f}"
        text = text.rstrip("0").rstrip(".") if "." in text else text
        return text.replace("-", "\N{MINUS SIGN}")
    mantissa, exponent = f"{value:.1e}".split("e")
    mantissa = mantissa.removesuffix(".0")
    power = "10" + str(int(exponent)).translate(_SUPERSCRIPT)
    return (power if mantissa == "1" else f"{mantissa} × {power}").replace("-", "\N{MINUS SIGN}")
