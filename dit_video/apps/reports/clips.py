"""Clips embedded in a page as data URIs, with the size at which they are shown."""

import base64
import statistics
from collections.abc import Sequence
from typing import Literal

import numpy as np
from markupsafe import Markup

from dit_video.apps.reports.template import render_template
from dit_video.video import Clip, encode

_MAX_LOSSLESS_PIXELS = 33 * 64 * 64
"""Maximum number of pixels over all frames of a clip that is embedded as animated PNG: small, lossless, loops
everywhere."""
_CRF = 20
"""Quality of larger clips; a page is for viewing, and the files next to it are the originals."""
_MAX_TINY_SIDE = 80
"""Maximum shorter side of clips that are enlarged by an integer factor, without interpolation."""
_TINY_SIDE, _SIDE, _MAX_LONG_SIDE = 160, 240, 640
"""Target lengths of the shorter side for tiny and other clips, and the maximum of the longer side, in CSS pixels."""


def embed(clip: Clip, label: str, *, scale: int | float) -> Markup:
    """Return an element that plays `clip` in a loop: PNG for an image, animated PNG for a tiny clip, else H.264 or VP9.

    VP9 is used for clips with an odd side, which 4:2:0 H.264 does not support.
    """
    frames, height, width, _ = clip.frames.shape
    classes = "media pixels" if scale >= 2 else "media"
    if is_video := frames > 1 and frames * height * width > _MAX_LOSSLESS_PIXELS:
        format: Literal["mp4", "webm"] = "webm" if height % 2 or width % 2 else "mp4"
        kind, data = f"video/{format}", encode(clip, format, crf=_CRF)
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
    return min(_SIDE / short, _MAX_LONG_SIDE / longest)


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
