"""Data sets of encoded clips for annotators, written without an ingest."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from dit_video.core.storage import to_storage_path
from dit_video.data.clips import DATASET_NAME, FEATURES, ClipSource
from dit_video.data.ingest.parts import make_table
from dit_video.data.records import get_file_name, write_records
from dit_video.data.tables import write_column, write_manifest, write_part
from dit_video.video import Clip, encode, probe
from support.clip_tables import make_row

FIELDS = ("name", "height", "width", "frames", "fps", "seconds", "id", "payload")
_PART = "train-00000"


class StoredClips(ClipSource):
    """A data set that counts how often clips are read."""

    reads = 0

    def __getitem__(self, index):
        self.reads += 1
        return super().__getitem__(index)


def open_clips(folder, contents: dict[str, bytes], captions: dict[str, Sequence[str]] | None = None) -> StoredClips:
    """Write a data set of clips, and open it; a file that is no video has invented properties."""
    folder = to_storage_path(folder)
    facts = {name: _probe(content) for name, content in contents.items()}
    examples = ({"clip": content, "name": name, **facts[name]} for name, content in contents.items())
    places = write_records(folder / get_file_name(DATASET_NAME, _PART), FEATURES, examples)
    rows = [
        make_row(name, content, **facts[name], **place._asdict())
        for (name, content), place in zip(contents.items(), places, strict=True)
    ]
    table = make_table(rows)
    write_part(folder, _PART, table)
    write_manifest(folder, "clips", {}, [_PART])
    write_column(
        folder,
        "choice",
        {"id": table["id"], "split": ["train"] * len(rows), "chosen": pa.array([True] * len(rows), pa.bool_())},
    )
    texts = [list((captions or {}).get(name, ())) for name in contents]
    write_column(folder, "captions", {"id": table["id"], "captions": pa.array(texts, pa.list_(pa.string()))})
    return StoredClips(folder)


def make_clip(seed: int, *, frames: int = 8, height: int = 32, width: int = 48) -> bytes:
    """Return a clip of noise as a file."""
    generator = np.random.default_rng(seed)
    small = generator.integers(0, 255, (1, height // 8, width // 8, 3)).repeat(frames, axis=0)
    pixels = np.kron(small, np.ones((1, 8, 8, 1))).astype(np.uint8)
    return encode(Clip(frames=pixels, fps=8), "mp4", crf=18)


def _probe(content: bytes) -> dict[str, Any]:
    try:
        facts = vars(probe(content))
    except Exception:  # a test's damaged file
        facts = {"height": 32, "width": 48, "frames": 8, "fps": 8.0, "seconds": 0.875, "codec": "h264"}
    return {name: facts[name] for name in ("height", "width", "frames", "fps", "seconds", "codec")}
