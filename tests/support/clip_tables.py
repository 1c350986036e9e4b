"""Data sets of clips as tables, written without an ingest: rows of every outcome, with clips that are made for them."""

import functools
import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import av
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
      folder: Folder of the table.
      read_clip: Returns the encoded file of a row.
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


def make_avi_file(frames=9, codec="mpeg4") -> bytes:
    """Return an AVI file, which browsers do not play."""
    file = io.BytesIO()
    with av.open(file, "w", "avi") as output:
        stream = output.add_stream(codec, rate=8)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for index in range(frames):
            picture = np.full((64, 96, 3), 20 * index, np.uint8)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        output.mux(stream.encode(None))
    return file.getvalue()


def make_large_table(count: int) -> pa.Table:
    """Return random rows of kept clips."""
    rng = np.random.default_rng(0)
    names = pa.array([f"folder_{number % 100:02d}/clip_{number:07d}.mp4" for number in range(count)])
    words = np.array(["dog", "cat", "tree", "river", "street", "night", "a man", "two women", "slowly", "in the rain"])
    captions = [[" ".join(row)] for row in words[rng.integers(0, len(words), (count, 8))]]
    columns = {
        "id": pa.array(rng.integers(0, 1 << 63, count).astype(np.uint64)),
        "name": names,
        "source": names,
        "outcome": pa.array(np.where(rng.random(count) < 0.9, "kept", "dropped")),
        "split": pa.array(np.where(rng.random(count) < 0.9, "train", "test")),
        "codec": pa.array(rng.choice(["h264", "hevc", "vp9"], count)),
        "captions": pa.array(captions),
        "payload": names,
    }
    for name in ("height", "width", "frames"):
        columns[name] = pa.array(rng.integers(100, 2000, count).astype(np.int32))
    for name in ("fps", "seconds", "motion", "black", "frozen", "sharpness", "letterbox"):
        columns[name] = pa.array(rng.gamma(2, 5, count)).cast(SCHEMA.field(name).type)
    blank = [name for name in SCHEMA.names if name not in columns]
    return pa.table({**columns, **{name: pa.nulls(count, SCHEMA.field(name).type) for name in blank}}).select(
        SCHEMA.names
    )
