"""Clips of a data set by the rows of its table, and the kinds of files that they are."""

from typing import NamedTuple, Protocol, runtime_checkable

from dit_video.core.storage import StoragePathLike
from dit_video.data.clips import DATASET_NAME, FEATURES
from dit_video.data.records import RecordReader, read_row
from dit_video.data.tables import Table


@runtime_checkable
class StoredClips(Protocol):
    """A data set whose clips can be read."""

    @property
    def table(self) -> Table:
        """Return the table."""

    def read(self, row: int) -> bytes:
        """Return the encoded file of the clip in a row of the table.

        Raises:
          UserError: If the file cannot be reached, or is damaged.
        """


class TableClips:
    """A data set that an ingest wrote, with the clips of all its rows: also of those that are not chosen.

    Args:
      folder: Folder or address of the data set.
    """

    def __init__(self, folder: StoragePathLike):
        self.table = Table(folder)
        self._reader = RecordReader(self.table.folder, FEATURES)

    def read(self, row: int) -> bytes:
        """Return the encoded file of the clip in a row of the table.

        Raises:
          UserError: If the file cannot be reached, or is damaged.
        """
        return read_row(self._reader, self.table, row, DATASET_NAME)["clip"]


def open_clips(folder: StoragePathLike) -> StoredClips:
    """Return the clips of a data set.

    Raises:
      MissingError: If the folder does not exist.
      UserError: If the folder holds no finished data set.
    """
    return TableClips(folder)


class MediaType(NamedTuple):
    """A kind of media file."""

    suffix: str
    """Suffix of its files, with a dot."""
    name: str
    """Name in the header of a response."""
    is_image: bool


_MP4 = MediaType(".mp4", "video/mp4", False)
_TYPES: tuple[tuple[int, bytes, MediaType], ...] = (
    (4, b"ftypavif", MediaType(".avif", "image/avif", True)),
    (4, b"ftypheic", MediaType(".heic", "image/heic", True)),
    (4, b"ftypmif1", MediaType(".heic", "image/heic", True)),
    (4, b"ftypqt", MediaType(".mov", "video/quicktime", False)),
    *((4, name, _MP4) for name in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")),
    (0, b"\x89PNG\r\n", MediaType(".png", "image/png", True)),
    (0, b"\xff\xd8\xff", MediaType(".jpg", "image/jpeg", True)),
    (8, b"WEBP", MediaType(".webp", "image/webp", True)),
    (0, b"GIF8", MediaType(".gif", "image/gif", True)),
    (0, b"BM", MediaType(".bmp", "image/bmp", True)),
    (0, b"II*\0", MediaType(".tif", "image/tiff", True)),
    (0, b"MM\0*", MediaType(".tif", "image/tiff", True)),
    (8, b"AVI ", MediaType(".avi", "video/x-msvideo", False)),
    (0, b"OggS", MediaType(".ogv", "video/ogg", False)),
    (0, b"FLV", MediaType(".flv", "video/x-flv", False)),
    (0, b"\0\0\1\xba", MediaType(".mpg", "video/mpeg", False)),
    (0, b"\0\0\1\xb3", MediaType(".mpg", "video/mpeg", False)),
    (0, b"\x47", MediaType(".ts", "video/mp2t", False)),
)
"""Kinds by the bytes at a position."""
_WEBM, _MKV = MediaType(".webm", "video/webm", False), MediaType(".mkv", "video/x-matroska", False)


def detect_media_type(content: bytes) -> MediaType:
    """Return the kind of a file by its first bytes; mp4 if they are unknown."""
    if content.startswith(b"\x1a\x45\xdf\xa3"):
        return _WEBM if b"webm" in content[:64] else _MKV
    for position, signature, media_type in _TYPES:
        if content[position:].startswith(signature):
            return media_type
    return _MP4
