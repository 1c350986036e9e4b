"""WebDataset: tars of clips, each with its first caption as .txt, and all captions and columns as .json.

Source: github.com/webdataset/webdataset, "The WebDataset format"
"""

import io
import json
import posixpath
import tarfile
from pathlib import Path

from dit_video.curation.export.contents import ExportContents, ExportedClip, PathRegister

MAX_TAR_BYTES = 1 << 30
INDEX = "index.jsonl"
"""List of all clips, with the tar and the key of each."""


def write_web_dataset(contents: ExportContents, folder: Path) -> dict[str, list[str]]:
    """Write the tars `SPLIT/00000.tar`, …, and a list of all clips; return the patterns of each split's files.

    A clip's key is its path, with dots as underscores: a key ends at the first dot.

    Raises:
      UserError: two clips would have the same key.
    """
    keys = PathRegister()
    tars: dict[str, _TarWriter] = {}
    try:
        with (folder / INDEX).open("w", encoding="utf-8") as index:
            for clip in contents:
                stem, suffix = posixpath.splitext(clip.path)
                key = posixpath.join(posixpath.dirname(stem), posixpath.basename(stem).replace(".", "_"))
                keys.add(f"{clip.split}/{key}", clip.name)
                writer = tars.setdefault(clip.split, _TarWriter(folder, clip.split))
                values = {"captions": list(clip.captions), **clip.values}
                place = writer.add(key, suffix, clip, values)
                index.write(json.dumps({"file_name": f"{place}/{key}{suffix}", **values}, ensure_ascii=False) + "\n")
    finally:
        for writer in tars.values():
            writer.close()
    return {split: [f"{split}/*.tar"] for split in tars}


class _TarWriter:
    """The tars of a split, of which a new one is begun when one is full."""

    def __init__(self, folder: Path, split: str):
        self._folder, self._split, self._number, self._bytes = folder, split, -1, MAX_TAR_BYTES
        self._tar: tarfile.TarFile | None = None

    def add(self, key: str, suffix: str, clip: ExportedClip, values: dict) -> str:
        """Add a clip, and return the path of the tar."""
        if self._bytes >= MAX_TAR_BYTES:
            self.close()
            self._number, self._bytes = self._number + 1, 0
            path = self._folder / self._split / f"{self._number:05d}.tar"
            path.parent.mkdir(exist_ok=True)
            self._tar = tarfile.open(path, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115  # closed by `close`
        text = clip.captions[0] if clip.captions else ""
        document = json.dumps(values, ensure_ascii=False)
        for end, content in ((suffix, clip.content), (".txt", text.encode()), (".json", document.encode())):
            entry = tarfile.TarInfo(f"{key}{end}")  # without a time or an owner: equal clips give equal tars
            entry.size = len(content)
            assert self._tar is not None
            self._tar.addfile(entry, io.BytesIO(content))
            self._bytes += len(content)
        return f"{self._split}/{self._number:05d}.tar"

    def close(self) -> None:
        """Complete the tar."""
        if self._tar is not None:
            self._tar.close()
            self._tar = None
