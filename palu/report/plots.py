"""Lay out line charts for the template, which draws them as inline SVG; and write numbers for people."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

WIDTH, HEIGHT = 360, 170
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 10, 24
MAX_DOTS = 40


class Scale(NamedTuple):
    """Values to heights, linear or by decades."""

    low: float
    high: float
    log: bool
    ticks: tuple[float, ...]

    def height(self, value: float) -> float:
        low, high, value = (math.log10(x) if self.log else x for x in (self.low, self.high, value))
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - BOTTOM - TOP)


def line_chart(steps: Sequence[int], values: Sequence[float]) -> dict[str, Any]:
    """Lay out one figure over the optimisation steps; the line has a gap where the figure is not finite.

    ticks: (y, text). dots: (x, y), the last one being the end of the line. ends: (x, anchor, step).
    """
    points = list(zip(steps, values, strict=True))
    scale = fit([value for value in values if math.isfinite(value)])
    first, last = (steps[0], steps[-1]) if steps else (0, 1)

    def x(step: float) -> str:
        inner = WIDTH - LEFT - RIGHT
        return f"{LEFT + (step - first) / (last - first) * inner if last > first else LEFT + inner / 2:.1f}"

    places = [(x(step), f"{scale.height(value):.1f}") if math.isfinite(value) else None for step, value in points]
    before = [None, *places]
    path = [f"{'L' if before[i] else 'M'}{place[0]} {place[1]}" for i, place in enumerate(places) if place]
    dots = [place for place in places if place]
    ends = [(first, "start"), (last, "end")] if last > first else [(first, "middle")]
    return {
        "width": WIDTH,
        "height": HEIGHT,
        "left": LEFT,
        "right": WIDTH - RIGHT,
        "ticks": [(f"{scale.height(tick):.1f}", number(tick)) for tick in scale.ticks],
        "path": "".join(path),
        "dots": dots if len(dots) <= MAX_DOTS else dots[-1:],
        "ends": [(x(step), anchor, step) for step, anchor in ends],
    }


def fit(values: Sequence[float]) -> Scale:
    """Fit a scale to the values, with a few round ticks; by decades where they span more than two."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if low > 0 and high / low > 100:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        every = max(1, math.ceil((last - first) / 4))
        return Scale(10.0**first, 10.0**last, True, tuple(10.0**e for e in range(first, last + 1, every)))
    if math.isclose(low, high, rel_tol=1e-9, abs_tol=1e-300):  # else rounding would decide where the ticks are
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
