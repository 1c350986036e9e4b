"""Line charts as inline SVG: all values as a thin line, and a smoothed line on top."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64

from dit_video.reports.markup import Markup, element, join

_WIDTH, _HEIGHT = 560.0, 310.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 14.0, 14.0, 44.0
_MAX_POINTS = 400
"""Maximum number of points of a line; more points are averaged in bins, as a line of 560 pixels cannot show more."""
_MIN_SMOOTHED_POINTS = 40
"""Minimum number of points for which smoothing is applied."""
_SMOOTHING_REACH = 0.02
"""Reach of the smoothing to either side, as a share of the points."""
_NUM_COLOURS = 6

Line = tuple[str, Float64[np.ndarray, " _"], Float64[np.ndarray, " _"]]
"""Name, steps and values of a line."""


def draw_line_chart(label: str, curves: Sequence[tuple[str, Sequence[int | float], Sequence[int | float]]]) -> Markup:
    """Return an SVG of named curves, each (name, steps, values), with a legend of their last smoothed values.

    The value axis is logarithmic if all values are positive and span a decade. Values that are not finite are not
    drawn, and the legend counts them.
    """
    lines: list[Line] = []
    legend: list[Markup] = []
    for index, (name, steps, values) in enumerate(curves):
        x, y = np.asarray(steps, np.float64), np.asarray(values, np.float64)
        finite = np.isfinite(x) & np.isfinite(y)
        x, y = x[finite], y[finite]
        lines.append((name, x, y))
        missing = int((~finite).sum())
        legend.append(_make_legend_entry(name, y, missing, index % _NUM_COLOURS))
    non_empty = [line for line in lines if len(line[1])]
    if not non_empty:
        return join(element("p", "No finite values to draw.", class_="muted"), element("ul", *legend, class_="legend"))
    return join(_draw_svg(label, lines), element("ul", *legend, class_="legend"))


def smooth(values: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    """Return a triangle-weighted mean over neighbours on both sides, which does not lag; few values are unchanged."""
    if len(values) < _MIN_SMOOTHED_POINTS:
        return values
    reach = max(1, round(_SMOOTHING_REACH * len(values)))
    kernel = np.concatenate([np.arange(1, reach + 1), [reach + 1], np.arange(reach, 0, -1)]).astype(np.float64)
    weight = np.convolve(np.ones_like(values), kernel, mode="same")
    return np.convolve(values, kernel, mode="same") / weight


def compute_linear_ticks(low: int | float, high: int | float, *, count: int = 5) -> list[int | float]:
    """Return about `count` round numbers in [low, high], at steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    min_step = (high - low) / count
    power = 10.0 ** math.floor(math.log10(min_step))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= min_step * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [step * index for index in range(first, last + 1)]


def compute_log_ticks(low: int | float, high: int | float) -> list[float]:
    """Return the powers of ten in [low, high], and 2 and 5 times these if there are at most eight ticks in all."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    fine = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    fine = [tick for tick in fine if low * 0.999 <= tick <= high * 1.001]
    coarse = [tick for tick in fine if math.isclose(math.log10(tick) % 1, 0, abs_tol=1e-9)]
    return fine if len(fine) <= 8 else coarse[:: max(1, math.ceil(len(coarse) / 8))]


def format_number(value: int | float) -> str:
    """Return a number with 4 significant digits, thousands as `12k`."""
    if value != 0 and abs(value) >= 10_000 and abs(value) < 1e9:
        thousand = value / 1_000
        return f"{thousand:.4g}k" if thousand < 10_000 else f"{value / 1e6:.4g}M"
    return f"{value:.4g}"


def _draw_svg(label: str, lines: Sequence[Line]) -> Markup:
    x_all = np.concatenate([x for _, x, _ in lines])
    y_all = np.concatenate([y for _, _, y in lines])
    log = bool(y_all.min() > 0 and y_all.max() / y_all.min() >= 10)
    transform = np.log10 if log else np.asarray
    x_low, x_high = min(0.0, float(x_all.min())), float(x_all.max())
    y_low, y_high = _compute_limits(transform(y_all))

    def across(x):
        return _LEFT + (x - x_low) / ((x_high - x_low) or 1) * (_WIDTH - _LEFT - _RIGHT)

    def down(y):
        return _HEIGHT - _BOTTOM - (transform(y) - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM)

    ticks = compute_log_ticks(10.0**y_low, 10.0**y_high) if log else compute_linear_ticks(y_low, y_high)
    parts = [_draw_y_tick(float(down(tick)), tick) for tick in ticks]
    parts += [_draw_x_tick(float(across(tick)), tick) for tick in compute_linear_ticks(x_low, x_high, count=6)]
    for index, (_, x, y) in enumerate(lines):
        if not len(x):
            continue
        x, y = _bin(x, y)
        colour = f"c{index % _NUM_COLOURS}"
        height = np.asarray(down(y))
        parts.append(element("polyline", points=_format_points(across(x), height), class_=f"raw {colour}"))
        parts.append(element("polyline", points=_format_points(across(x), smooth(height)), class_=f"line {colour}"))
        if len(x) == 1:
            parts.append(element("circle", cx=float(across(x)[0]), cy=float(down(y)[0]), r=3, class_=f"dot {colour}"))
    axis = element("text", "step", x=_WIDTH - _RIGHT, y=_HEIGHT - 4, class_="axis end")
    log_label = element("text", "log scale", x=_WIDTH - _RIGHT, y=_TOP + 8, class_="axis end") if log else None
    return element(
        "svg",
        *parts,
        axis,
        log_label,
        viewBox=f"0 0 {_WIDTH:g} {_HEIGHT:g}",
        role="img",
        aria_label=label,
        class_="chart",
    )


def _compute_limits(values: Float64[np.ndarray, " n"]) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    margin = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
    return low - margin, high + margin


def _bin(x: Float64[np.ndarray, " n"], y: Float64[np.ndarray, " n"]) -> tuple[np.ndarray, np.ndarray]:
    """Return means of neighbouring points if there are more than can be drawn."""
    if len(x) <= _MAX_POINTS:
        return x, y
    edges = np.linspace(0, len(x), _MAX_POINTS + 1).astype(int)
    count = np.diff(edges)
    return np.add.reduceat(x, edges[:-1]) / count, np.add.reduceat(y, edges[:-1]) / count


def _format_points(x: Float64[np.ndarray, " n"], y: Float64[np.ndarray, " n"]) -> str:
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))


def _draw_y_tick(y: float, tick: int | float) -> Markup:
    line = element("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=round(y, 1), y2=round(y, 1), class_="grid")
    return join(line, element("text", format_number(tick), x=_LEFT - 8, y=round(y + 4, 1), class_="axis end"))


def _draw_x_tick(x: float, tick: int | float) -> Markup:
    foot = _HEIGHT - _BOTTOM
    line = element("line", x1=round(x, 1), x2=round(x, 1), y1=foot, y2=foot + 5, class_="grid")
    return join(line, element("text", format_number(tick), x=round(x, 1), y=foot + 18, class_="axis middle"))


def _make_legend_entry(name: str, values: Float64[np.ndarray, " n"], missing: int, colour: int) -> Markup:
    last = format_number(float(smooth(values)[-1])) if len(values) else "–"
    note = f" · {missing} not finite" if missing else ""
    swatch = element("span", class_=f"swatch c{colour}")
    return element("li", swatch, name, " ", element("b", last), element("span", note, class_="muted"))
