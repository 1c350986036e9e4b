"""Data sets of clips as tables, written without an ingest: rows of every outcome, with clips that are made for them."""

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dit_video.data.tables import Table, write_manifest, write_part
from dit_video.video import Clip, encode

SCHEMA = pa.schema(
    {
        "id": pa.uint64(),
        **dict.fromkeys(("name", "source"), pa.string()),
        "source_bytes": pa.int64(),
        **dict.fromkeys(("source_sha256", "split", "outcome", "reason"), pa.string()),
        "transient": pa.bool_(),
        **dict.fromkeys(("start_us", "duration_us"), pa.int64()),
        **dict.fromkeys(("height", "width", "frames"), pa.int32()),
        **dict.fromkeys(("fps", "seconds"), pa.float64()),
        **dict.fromkeys(("codec", "transfer", "audio_codec"), pa.string()),
        **dict.fromkeys(("audio_rate", "audio_channels"), pa.int32()),
        "audio_offset": pa.float64(),
        **dict.fromkeys(("motion", "black", "frozen", "sharpness", "letterbox"), pa.float32()),
        "hash": pa.list_(pa.uint64()),
        "payload": pa.string(),
        "payload_bytes": pa.int64(),
        "captions": pa.list_(pa.string()),
    }
)
"""Columns of the index that are looked at; the others say where a record lies."""


class MemoryClips:
    """A data set whose clips a function makes.

    Args:
      folder: folder of the table.
      read_clip: returns the encoded file of a row.
    """

    def __init__(self, folder: Path, read_clip: Callable[[int], bytes]):
        self.table = Table(folder)
        self.read = read_clip


def write_table(folder: Path, rows: Sequence[Mapping[str, Any]] | pa.Table, *, parts: int = 2) -> None:
    """Write a table of rows; values that a row does not name are missing."""
    if not isinstance(rows, pa.Table):
        rows = pa.Table.from_pylist([{**dict.fromkeys(SCHEMA.names), **row} for row in rows], schema=SCHEMA)
    names = [f"train-{number:05d}" for number in range(parts)]
    for name, numbers in zip(names, np.array_split(np.arange(len(rows)), parts), strict=True):
        write_part(folder, name, rows.take(pa.array(numbers, pa.int64())))
    write_manifest(folder, "clips", {"source": "made for a test"}, names)


def make_row(name: str, content: bytes | None = None, **values: Any) -> dict[str, Any]:
    """Return a row of a kept clip of 9 frames of 64×96 pixels, or of what `values` say."""
    digest = hashlib.sha256(content or b"").hexdigest() if content else None
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    facts = {"height": 64, "width": 96, "frames": 9, "fps": 8.0, "seconds": 1.0, "codec": "h264", "transfer": "sdr"}
    source = {"source": name.split("#")[0], "source_bytes": 1000, "source_sha256": "ab" * 32, "split": "train"}
    span = {"start_us": 0, "duration_us": 1_125_000, "outcome": "kept", "reason": "", "transient": False}
    payload = {"payload": digest, "payload_bytes": len(content) if content else None}
    return {"id": key, "name": name, **source, **span, **facts, **payload, **values}


@functools.cache
def make_clip_file(number: int, *, height: int = 64, width: int = 96, frames: int = 9) -> bytes:
    """Return an mp4 file, or a PNG file of one frame: a square of a colour of its own moves over a dark ground."""
    rng = np.random.default_rng(number)
    ground, colour = rng.integers(10, 60, 3), rng.integers(90, 255, 3)
    video = np.empty((frames, height, width, 3), np.uint8)
    video[:] = ground
    side, top = height // 3, int(rng.integers(0, height // 2))
    for index, frame in enumerate(video):
        left = int((width - side) * index / max(1, frames - 1))
        frame[top : top + side, left : left + side] = colour
    return encode(Clip(video, fps=8), "mp4" if frames > 1 else "png")
