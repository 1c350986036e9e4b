"""Elements of pages as HTML: templates in which text cannot become markup, line charts, clips and tables."""

import base64
import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float64
from markupsafe import Markup, escape

from dit_video.core.errors import UserError
from dit_video.core.templates import make_environment
from dit_video.video import Clip, encode

_ENVIRONMENT = make_environment("dit_video.apps.reports")


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Values over steps.

    Raises:
      UserError: If the numbers of steps and values differ.
    """

    name: str
    steps: tuple[int | float, ...]
    values: tuple[int | float, ...]

    def __post_init__(self) -> None:
        if len(self.steps) != len(self.values):
            raise UserError(
                f"curve {self.name!r} has {len(self.steps)} steps and {len(self.values)} values; use one step per value"
            )


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Curves with common axes; the value axis is logarithmic if the values span a decade."""

    title: str
    curves: tuple[Curve, ...]
    note: str = ""
    axis: str = "step"
    """Label of the axis of the curves' steps."""


def render_template(name: str, **values: Any) -> Markup:
    """Return the rendered template; functions among `values` can be called in it."""
    return Markup(_ENVIRONMENT.get_template(name).render(values))


_WIDTH, _HEIGHT = 560, 310
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 546, 14, 266
"""Edges of the axes, in pixels from the chart's left and upper edges."""
_MAX_POINTS = 400
"""Maximum number of points of a line; more points are averaged in bins, as a line of 560 pixels cannot show more."""
_MIN_SMOOTHED_POINTS = 40
"""Minimum number of points for which smoothing is applied."""
_SMOOTHING_REACH = 0.02
"""Reach of the smoothing to either side, as a share of the points."""
_NUM_COLOURS = 6
Line = tuple[str, Float64[np.ndarray, " _"], Float64[np.ndarray, " _"]]
"""Class of the colour, finite steps and their values."""


def draw_line_chart(chart: Chart) -> Markup:
    """Return an SVG of the chart's curves, with a legend of their last smoothed values.

    The value axis is logarithmic if all values are positive and span a decade. Values that are not finite are not
    drawn, and the legend counts them.
    """
    lines: list[Line] = []
    legend = []
    for index, curve in enumerate(chart.curves):
        x, y = np.asarray(curve.steps, np.float64), np.asarray(curve.values, np.float64)
        finite = np.isfinite(x) & np.isfinite(y)
        colour = f"c{index % _NUM_COLOURS}"
        last = format_number(float(smooth(y[finite])[-1])) if finite.any() else "–"
        legend.append((curve.name, colour, last, int((~finite).sum())))
        if finite.any():
            lines.append((colour, x[finite], y[finite]))
    box = {"width": _WIDTH, "height": _HEIGHT, "left": _LEFT, "right": _RIGHT, "top": _TOP, "bottom": _BOTTOM}
    drawn = _compute_coordinates(lines) if lines else {"lines": []}
    return render_template("line_chart.html.jinja", label=chart.title, axis=chart.axis, legend=legend, **box, **drawn)


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


def _compute_coordinates(lines: list[Line]) -> dict[str, Any]:
    """Return the ticks, and the points of each line and of its smoothed line, in pixels."""
    x_all = np.concatenate([x for _, x, _ in lines])
    y_all = np.concatenate([y for _, _, y in lines])
    is_log = bool(y_all.min() > 0 and y_all.max() / y_all.min() >= 10)
    transform = np.log10 if is_log else np.asarray
    x_low, x_high = min(0.0, float(x_all.min())), float(x_all.max())
    y_low, y_high = _compute_limits(transform(y_all))

    def across(x):
        return _LEFT + (x - x_low) / ((x_high - x_low) or 1) * (_RIGHT - _LEFT)

    def down(y):
        return _BOTTOM - (transform(y) - y_low) / (y_high - y_low) * (_BOTTOM - _TOP)

    y_ticks = compute_log_ticks(10.0**y_low, 10.0**y_high) if is_log else compute_linear_ticks(y_low, y_high)
    x_ticks = compute_linear_ticks(x_low, x_high, count=6)
    coordinates = []
    for colour, x, y in lines:
        x, y = _average_neighbours(x, y)
        x, y = across(x), down(y)
        dot = (x[0], y[0]) if len(x) == 1 else None
        coordinates.append((colour, _format_points(x, y), _format_points(x, smooth(y)), dot))
    return {
        "is_log": is_log,
        "x_ticks": [(across(tick), format_number(tick)) for tick in x_ticks],
        "y_ticks": [(float(down(tick)), format_number(tick)) for tick in y_ticks],
        "lines": coordinates,
    }


def _compute_limits(values: Float64[np.ndarray, " n"]) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    margin = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
    return low - margin, high + margin


def _average_neighbours(x: Float64[np.ndarray, " n"], y: Float64[np.ndarray, " n"]) -> tuple[np.ndarray, np.ndarray]:
    """Return means of neighbouring points if there are more than can be drawn."""
    if len(x) <= _MAX_POINTS:
        return x, y
    edges = np.linspace(0, len(x), _MAX_POINTS + 1).astype(int)
    count = np.diff(edges)
    return np.add.reduceat(x, edges[:-1]) / count, np.add.reduceat(y, edges[:-1]) / count


def _format_points(x: Float64[np.ndarray, " n"], y: Float64[np.ndarray, " n"]) -> str:
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))


_MAX_LOSSLESS_PIXELS = 33 * 64 * 64
"""Maximum number of pixels over all frames of a clip that is embedded as animated PNG: small, lossless, loops
everywhere."""
_CLIP_CRF = 20
"""Quality of larger clips; a page is for viewing, and the files next to it are the originals."""
_MAX_TINY_SIDE = 80
"""Maximum shorter side of clips that are enlarged by an integer factor, without interpolation."""
_TINY_SIDE, _SHORT_SIDE, _MAX_LONG_SIDE = 160, 240, 640
"""Target lengths of the shorter side for tiny and other clips, and the maximum of the longer side, in CSS pixels."""


def embed_clip(clip: Clip, label: str, *, scale: int | float) -> Markup:
    """Return an element that plays `clip` in a loop: PNG for an image, animated PNG for a tiny clip, else H.264 or VP9.

    VP9 is used for clips with an odd side, which 4:2:0 H.264 does not support.
    """
    frames, height, width, _ = clip.frames.shape
    classes = "media pixels" if scale >= 2 else "media"
    if is_video := frames > 1 and frames * height * width > _MAX_LOSSLESS_PIXELS:
        format: Literal["mp4", "webm"] = "webm" if height % 2 or width % 2 else "mp4"
        kind, data = f"video/{format}", encode(clip, format, crf=_CLIP_CRF)
    else:
        kind, data = "image/png", encode(clip, "png" if frames == 1 else "apng")
        classes += " loop" if frames > 1 else ""
    return render_template(
        "clip.html.jinja",
        is_video=is_video,
        classes=classes,
        label=label,
        source=f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}",
        width=width,
        height=height,
        shown_width=round(width * scale),
    )


def compute_common_scale(clips: Sequence[Clip]) -> int | float:
    """Return one scale for all clips, so that their sizes can be compared; an integer for tiny clips."""
    short = statistics.median(min(clip.height, clip.width) for clip in clips)
    longest = max(max(clip.height, clip.width) for clip in clips)
    if short <= _MAX_TINY_SIDE:
        return max(1, min(_TINY_SIDE // short, _MAX_LONG_SIDE // longest))
    return min(_SHORT_SIDE / short, _MAX_LONG_SIDE / longest)


def join_side_by_side(first: Clip, *others: Clip) -> tuple[Clip, list[tuple[float, float]]]:
    """Return all clips joined into one, so that they stay in sync, and (start, end) of each gap in 0..1."""
    width = first.width
    gap = 2 * max(1, width // 32)
    blank = np.zeros((*first.frames.shape[:2], gap, 3), np.uint8)
    parts = [first.frames, *(part for other in others for part in (blank, other.frames))]
    total_width = width + len(others) * (width + gap)
    starts = [(width + number * (width + gap)) / total_width for number in range(len(others))]
    joined = Clip(frames=np.concatenate(parts, axis=2), fps=first.fps, caption=first.caption)
    return joined, [(start, start + gap / total_width) for start in starts]


def render_metrics(metrics: Mapping[str, Any]) -> Markup:
    """Return one panel for the scalars at the top level, and one for each group."""
    return render_template(
        "metrics.html.jinja",
        metrics=metrics,
        split=_split_groups,
        have_same_names=_have_same_names,
        format_value=format_value,
    )


def format_value(value: Any) -> str:
    """Return a metric's value as text: numbers with four digits, a sequence with commas, `None` as a dash."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}".replace(",", "\u202f")
    if isinstance(value, float):
        return format_number(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(format_value(item) for item in value)
    return str(value)


def render_json(value: Any) -> Markup:
    """Return indented JSON with highlighted keys."""
    text = str(escape(json.dumps(value, indent=2, ensure_ascii=False)))
    keyed = re.sub(r"^( *)(&#34;.*?&#34;)(?=: )", r'\1<span class="key">\2</span>', text, flags=re.MULTILINE)
    return Markup(f'<pre tabindex="0">{keyed}</pre>')


def _split_groups(metrics: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Mapping[str, Any]]]:
    """Return the scalars, and the groups."""
    groups = {name: value for name, value in metrics.items() if isinstance(value, Mapping)}
    return {name: value for name, value in metrics.items() if name not in groups}, groups


def _have_same_names(groups: Mapping[str, Mapping[str, Any]]) -> bool:
    """Return whether several groups are flat and have the same names, so that the names can head columns."""
    first, *others = groups.values() or ({},)
    flat = not any(isinstance(value, Mapping) for group in groups.values() for value in group.values())
    return flat and bool(first and others) and all(group.keys() == first.keys() for group in others)
