"""Histograms of the clips of a data set for its report: sizes, shapes, lengths, rates, codecs and measures."""

import collections
import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from dit_video.curation.histograms import make_histogram
from dit_video.data.clips import ClipSource

MEASURES = ("motion", "black", "frozen", "sharpness", "letterbox")
"""Columns of measures that an ingest takes."""
_MEASURE_BINS = 12
_LENGTH_EDGES = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600)
"""Upper edges of the bins of lengths, in seconds."""
_LENGTH_BINS = ("< 1 s", *(f"{low}–{high} s" for low, high in itertools.pairwise(_LENGTH_EDGES)), "≥ 3600 s")
_SHAPE_EDGES = (0.5, 0.9, 1.1, 1.6, 2.0)
"""Upper edges of the bins of width over height."""
_SHAPE_BINS = ("1:2 and narrower", "upright", "square", "4:3 to 8:5", "16:9", "wider")
_FRAME_BINS = ("1", "2", *(f"{2**power + 1}–{2 ** (power + 1)}" for power in range(1, 32)))
"""Names of the bins of numbers of frames, which end at powers of two."""


def make_clip_histograms(clips: ClipSource) -> dict[str, dict[str, int]]:
    """Return the counts of clips by the names of bins, for each property, and for each measure that was taken.

    Lengths and rates are those of videos alone. `transfers` are the transfer functions before HDR is mapped to SDR.
    """
    heights, widths, frames, fps = (clips.column(name) for name in ("height", "width", "frames", "fps"))
    is_video = frames > 1
    lengths = clips.column("duration_us")[is_video] / 1e6
    histograms = {
        "sizes": _count_values(f"{height}×{width}" for height, width in zip(heights, widths, strict=True)),
        "shapes": _count_bins(np.searchsorted(_SHAPE_EDGES, widths / heights, side="right").tolist(), _SHAPE_BINS),
        "lengths": _count_bins(np.searchsorted(_LENGTH_EDGES, lengths, side="right").tolist(), _LENGTH_BINS),
        "frames": _count_bins([(int(count) - 1).bit_length() for count in frames], _FRAME_BINS),
        "rates": _count_values(f"{rate:.4g} fps" for rate in fps[is_video]),
        "codecs": _count_values(clips.column("codec")),
        "transfers": _count_values(clips.column("transfer")),
        "sound": _count_values(codec or "none" for codec in clips.column("audio_codec")),
    }
    for name in MEASURES:
        if bins := make_histogram(name, clips.column(name), bins=_MEASURE_BINS).bins:
            histograms[name] = {each.label: each.number for each in bins}
    return histograms


def _count_values(values: Iterable[str]) -> dict[str, int]:
    """Return the counts of values, sorted by count, then by name."""
    return dict(sorted(collections.Counter(values).items(), key=lambda entry: (-entry[1], entry[0])))


def _count_bins(indices: Iterable[int], names: Sequence[str]) -> dict[str, int]:
    """Return the counts of bins in their order, without empty bins at the ends."""
    counts = collections.Counter(indices)
    return {names[index]: counts[index] for index in range(min(counts), max(counts) + 1)} if counts else {}
