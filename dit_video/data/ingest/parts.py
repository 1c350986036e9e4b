"""Parts of an ingest, the units of its work: any process writes a part, and one whose index exists is done.

ingest/settings.json          settings, which do not change
ingest/parts-000.parquet      files of each part; a source that has grown adds parts-001.parquet
ingest/listing.parquet        files that the source holds now, with their captions
ingest/skipped.json           entries of the source that cannot be clips
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from dit_video.core.errors import UserError
from dit_video.core.storage import StoragePath, read_document, write_document
from dit_video.data.ingest.formats import ListedClip, Listing
from dit_video.data.records import get_part_name, sort_splits
from dit_video.data.table_files import INDEX_FOLDER, list_parquet, read_parquet, write_parquet

FOLDER = "ingest"
_MIN_PART_BYTES, _MAX_PART_BYTES, _MAX_PART_FILES = 16 << 20, 1 << 30, 4096
_PARTS_PER_SET = 64
"""Number of parts of a data set whose parts are neither of the smallest nor of the largest size."""
_COLUMNS = ("name", "size", "path", "offset", "split")


class IngestFolder:
    """The parts of a data set, and the files that each is made of.

    Args:
      folder: the data set.
      settings: settings of the ingest, as JSON values.

    Raises:
      UserError: the data set was made with other settings.
    """

    def __init__(self, folder: StoragePath, settings: Mapping[str, Any]):
        self.folder, self.settings = folder, dict(settings)
        self._own = folder / FOLDER
        if not (self._own / "settings.json").exists():
            write_document(self._own / "settings.json", dict(settings))
        if (written := read_document(self._own / "settings.json")) != settings:
            differences = sorted(key for key in {*settings, *written} if settings.get(key) != written.get(key))
            raise UserError(
                f"{folder} holds another data set: its {', '.join(differences)} differ. Use another folder, or the "
                "settings with which it was started."
            )
        self._files = [read_parquet(self._own / f"{name}.parquet") for name in list_parquet(self._own, "parts-")]

    @property
    def parts(self) -> list[str]:
        """Return the names of all parts, in the order of their rows."""
        names = {name for table in self._files for name in pc.unique(table["part"]).to_pylist()}
        splits = sort_splits(name.rpartition("-")[0] for name in names)
        return sorted(names, key=lambda name: (splits.index(name.rpartition("-")[0]), name))

    def list_unfinished(self) -> list[str]:
        """Return the parts that are not written."""
        finished = set(list_parquet(self.folder / INDEX_FOLDER))
        return [name for name in self.parts if name not in finished]

    def read_clips(self, part: str) -> list[ListedClip]:
        """Return the files of a part."""
        for table in self._files:
            rows = table.filter(pc.equal(table["part"], part)).select(_COLUMNS).to_pylist()
            if rows:
                return [ListedClip(captions=(), **row) for row in rows]
        raise KeyError(part)

    def read_listing(self) -> pa.Table:
        """Return the names, sizes, splits and captions of the files that the source holds."""
        return read_parquet(self._own / "listing.parquet")

    def read_skipped(self) -> dict[str, Any]:
        """Return the format of the source, and its entries that are no clips."""
        return read_document(self._own / "skipped.json")

    def update(self, listing: Listing) -> bool:
        """Add parts for the files of a source that no part has; return whether the listing has changed at all.

        Raises:
          UserError: no file of the source is in a part, so it is another one.
        """
        listed = pa.table(
            {
                "name": [clip.name for clip in listing.clips],
                "size": pa.array([clip.size for clip in listing.clips], pa.int64()),
                "split": [clip.split for clip in listing.clips],
                "captions": pa.array([clip.captions for clip in listing.clips], pa.list_(pa.string())),
            }
        )
        skipped = {
            "format": listing.format,
            "unlisted": [*listing.unlisted],
            "rejected": [*map(list, listing.rejected)],
        }
        if self._files and self.read_listing() == listed and self.read_skipped() == skipped:
            return False
        known = {
            (row["name"], row["size"]) for table in self._files for row in table.select(["name", "size"]).to_pylist()
        }
        new = [clip for clip in listing.clips if (clip.name, clip.size) not in known]
        if known and len(new) == len(listing.clips):
            raise UserError(
                f"{self.folder} holds another data set, without any file of this source. Use another folder."
            )
        if new:
            table = self._plan(new)
            write_parquet(self._own / f"parts-{len(self._files):03d}.parquet", table)
            self._files.append(table)
        write_document(self._own / "skipped.json", skipped)
        write_parquet(self._own / "listing.parquet", listed)
        return True

    def _plan(self, clips: Sequence[ListedClip]) -> pa.Table:
        counts: dict[str, int] = {}
        for name in self.parts:
            split = name.rpartition("-")[0]
            counts[split] = counts.get(split, 0) + 1
        total = sum(clip.size for clip in clips)
        max_bytes = min(max(total // _PARTS_PER_SET, _MIN_PART_BYTES), _MAX_PART_BYTES)
        columns: dict[str, list[Any]] = {name: [] for name in ("part", *_COLUMNS)}
        for split in sort_splits(clip.split for clip in clips):
            parts = _group((clip for clip in clips if clip.split == split), max_bytes)
            for number, members in enumerate(parts, counts.get(split, 0)):
                columns["part"] += [get_part_name(split, number)] * len(members)
                for name in _COLUMNS:
                    columns[name] += [getattr(clip, name) for clip in members]
        types = {"size": pa.int64(), "offset": pa.int64()}
        return pa.table({name: pa.array(values, types.get(name, pa.string())) for name, values in columns.items()})


def _group(clips: Iterator[ListedClip], max_bytes: int) -> Iterator[list[ListedClip]]:
    """Yield consecutive clips of at most this size in bytes together, at least one."""
    group: list[ListedClip] = []
    size = 0
    for clip in clips:
        if group and (size + clip.size > max_bytes or len(group) == _MAX_PART_FILES):
            yield group
            group, size = [], 0
        group.append(clip)
        size += clip.size
    if group:
        yield group
