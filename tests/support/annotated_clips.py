"""Data sets of encoded clips for annotators, without an ingest."""

import hashlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from dit_video.data.clips import ClipInfo, ClipSource
from dit_video.data.table_files import write_manifest, write_part
from dit_video.data.tables import Table
from dit_video.video import Clip, encode, probe

FIELDS = ("name", "height", "width", "frames", "fps", "seconds", "id", "payload")


class StoredInfo(ClipInfo):
    """Metadata with the key and the hash of a clip."""

    id: int
    payload: str


class StoredClips(ClipSource):
    """Clips in memory, whose table is a folder."""

    def __init__(self, folder, contents: dict[str, bytes], captions: dict[str, Sequence[str]]):
        self.tables = (Table(folder),)
        self.reads = 0
        self._contents, self._infos = list(contents.values()), []
        for row, name in enumerate(self.tables[0]["name"].to_pylist()):
            values = {each: self.tables[0].arrow(each)[row].as_py() for each in FIELDS}
            known = {each: value for each, value in values.items() if each in ClipInfo._fields}
            info = StoredInfo(**known, captions=tuple(captions.get(name, ())))
            info.id, info.payload = values["id"], values["payload"]
            self._infos.append(info)

    @property
    def folders(self):
        return (self.tables[0].folder,)

    @property
    def infos(self):
        return tuple(self._infos)

    def __len__(self):
        return len(self._infos)

    def __getitem__(self, index):
        self.reads += 1
        return self._contents[index]

    def column(self, name):
        values = [getattr(info, name) for info in self._infos]
        return np.array(values, np.uint64) if name == "id" else values


def open_clips(folder, contents: dict[str, bytes], captions: dict[str, Sequence[str]] | None = None) -> StoredClips:
    """Write the table of clips, and open them; a file that is no video has invented properties."""
    rows = []
    for name, content in contents.items():
        try:
            info = probe(content)
            facts = (info.height, info.width, info.frames, info.fps, info.seconds)
        except Exception:  # a test's damaged file
            facts = (32, 48, 8, 8.0, 0.875)
        digest = hashlib.sha256(content).hexdigest()
        key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
        rows.append(dict(zip(FIELDS, (name, *facts, key, digest), strict=True)))
    columns = {each: [row[each] for row in rows] for each in FIELDS}
    types = {"id": pa.uint64(), "name": pa.string(), "payload": pa.string()}
    types |= dict.fromkeys(("fps", "seconds"), pa.float64())
    arrays = {each: pa.array(values, types.get(each, pa.int32())) for each, values in columns.items()}
    write_part(folder, "train-00000", pa.table(arrays))
    write_manifest(folder, "clips", {}, ["train-00000"])
    return StoredClips(folder, contents, captions or {})


def make_clip(seed: int, *, frames: int = 8, height: int = 32, width: int = 48) -> bytes:
    """Return a clip of noise as a file."""
    generator = np.random.default_rng(seed)
    small = generator.integers(0, 255, (1, height // 8, width // 8, 3)).repeat(frames, axis=0)
    pixels = np.kron(small, np.ones((1, 8, 8, 1))).astype(np.uint8)
    return encode(Clip(frames=pixels, fps=8), "mp4", crf=18)
