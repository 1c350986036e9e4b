"""A listing: the clips of a source by name, their captions, and the location of their bytes.

Surrounding white space of captions is stripped; white space and line breaks inside a caption are kept. Empty captions
and duplicates are dropped. A clip whose caption is too long or not UTF-8 is rejected with the reason: such a caption is
more likely a wrong file than a typo, and a clip that silently lost its caption would train the unconditional model.
"""

import contextlib
import json
import os
import posixpath
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from dit_video.core.errors import UserError
from dit_video.core.storage import read_range

VIDEOS = frozenset(".mp4 .m4v .mov .3gp .mkv .webm .avi .mpg .mpeg .ts .mts .m2ts .ogv .wmv .flv".split())  # noqa: SIM905
IMAGES = frozenset(".gif .apng .png .jpg .jpeg .webp .bmp .tif .tiff .avif .heic .heif".split())  # noqa: SIM905
UNSUPPORTED = {".jxl": "is JPEG XL, which no installed decoder reads; convert it to PNG"}
"""Reasons by suffix why files are rejected that are known as clips."""
MEDIA = VIDEOS | IMAGES | UNSUPPORTED.keys()
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Names of splits, as Hugging Face's data sets have them in columns and folders."""
SPLITS = {word: split for split, words in _SPLIT_WORDS.items() for word in words}
"""Splits by what they are called."""
MAX_CAPTION_BYTES = 64 << 10
"""Maximum size of a caption in bytes of UTF-8, about 10,000 words."""
MAX_CAPTION_FILE_BYTES = 16 << 20
"""Maximum size of a caption file in bytes; its JSON may hold much more than captions."""
CAPTION_FILE_TOO_LARGE = f"has {{:,}} bytes, {MAX_CAPTION_FILE_BYTES:,} is the limit of a caption file"
"""Reason with the size of a caption file, to be formatted."""
CAPTION_FIELDS = ("text", "caption", "captions", "prompt", "cap")
"""Columns and JSON fields that hold captions; each is a string or, in JSON, a list of strings."""
CAPTION_SUFFIXES = (".txt", ".caption", ".json")
"""Suffixes of caption files, in the order in which a clip's captions are read from several files."""
_NO_CAPTIONS = ("readme", "license", "licence")
"""Names, without suffix, of files without captions."""
_MIN_FRAMES = 12
"""Number of images whose names differ in a number alone from which they may be the frames of a video."""
Rejection = tuple[str, str]
"""Name and reason of an entry that cannot be a clip. Names in a reason are written as `repr` writes them: reasons that
differ only inside quotes are counted as one kind."""


@dataclass(frozen=True, kw_only=True)
class ListColumns:
    """Columns of a list of clips, if they have other names than those that are known (see `lists`)."""

    name: str | None = None
    """Column of the clip's path."""
    captions: tuple[str, ...] = ()
    """Columns of captions; a clip has the captions of all of them."""
    split: str | None = None
    """Column of the split; `split` by default, if there is one."""


@dataclass(frozen=True, kw_only=True)
class ListingOptions:
    """Options of the formats of sources; each format uses those that concern it."""

    ucf101_split: Literal[1, 2, 3] = 1
    """Number of UCF-101's pair of train and test lists."""
    list_path: str | None = None
    """Path of a folder's list of clips inside the folder, instead of the one that is found."""
    columns: ListColumns = field(default_factory=ListColumns)
    """Columns of lists."""
    follow_links: bool = False
    """True if links in a folder may lead out of it. Links into the `blobs` of Hugging Face's cache always may."""


class ListedClip(NamedTuple):
    """A clip of a source, before it is ingested."""

    name: str
    """Path of the clip inside the source, with forward slashes; unique. In a folder of tars it starts with the tar's
    path."""
    captions: tuple[str, ...]
    """Captions of the clip; may be empty."""
    size: int
    """Size of the clip in bytes."""
    path: str
    """File that holds the clip: its own file, or a tar; a path of this machine or an address."""
    offset: int | None = None
    """Byte offset of the clip in its tar; None if the clip has a file of its own."""
    split: str = ""
    """Split of the clip: "train", "validation" or "test"; empty if the source says nothing, see `find_split`."""
    content: str = ""
    """SHA-256 of a file that took the place of another one of its name and size; empty for any other."""

    def read(self) -> bytes:
        """Return the encoded bytes of the clip.

        Raises:
          OSError: If the file cannot be read, or has become shorter.
        """
        try:
            content = read_range(self.path, self.offset or 0, None if self.offset is None else self.size)
        except UserError as error:  # of a service
            raise OSError(str(error)) from error
        if self.offset is not None and len(content) != self.size:
            raise OSError(f"{self.path} has become shorter")
        return content


class Listing(NamedTuple):
    """All clips of a source, and the files and entries that are left out."""

    clips: tuple[ListedClip, ...]
    """Clips in the order of the source's list, else sorted by name: the same on every machine."""
    unlisted: tuple[str, ...] = ()
    """Files that are left out: media that the source's list does not name; without a list, files that are neither clips
    (by suffix) nor captions of a clip. Where no clip has a caption, files of a tar or beside a list, too."""
    rejected: tuple[Rejection, ...] = ()
    """Entries that cannot be clips, such as tar entries outside of their tar, and malformed rows of a list."""
    format: str = "folder"
    """Name of the format in which the source was read."""


class UnusableClipError(Exception):
    """An error that rejects one clip or entry of a source; caught while the source is listed, never shown to a user."""


@contextlib.contextmanager
def reject_unusable(rejected: list[Rejection], name: str, location: str = "") -> Iterator[None]:
    """Add an entry to the rejected ones if it turns out to be unusable; `location` precedes the reason."""
    try:
        yield
    except UnusableClipError as error:
        rejected.append((name, location + str(error)))


def escape_name(name: str) -> str:
    r"""Return a name with bytes that are not UTF-8 (surrogates in Python) written as `\udcXX`."""
    return name.encode("utf-8", "backslashreplace").decode()


def check_name(name: str) -> None:
    """Raise if a name is not UTF-8, which neither the index nor a record can hold, or has a null byte.

    Raises:
      UnusableClipError: If the name is invalid, or its suffix is of a kind that cannot be decoded.
    """
    if (suffix := get_suffix(name)) in UNSUPPORTED:
        raise UnusableClipError(UNSUPPORTED[suffix])
    if escape_name(name) != name:
        raise UnusableClipError("its name is not UTF-8; rename it")
    if "\0" in name:
        raise UnusableClipError("its name holds a null byte")


def get_suffix(name: str) -> str:
    """Return the suffix of a name in lower case, with its dot."""
    return os.path.splitext(name)[1].lower()


def find_split(name: str) -> str:
    """Return the split of a clip by its name: that which the first folder is called by, else "train"."""
    folder, is_inside, _ = name.partition("/")
    return SPLITS.get(folder.lower(), "train") if is_inside else "train"


def make_listing(
    source: object,
    format: str,
    clips: Iterable[ListedClip],
    *,
    unlisted: Iterable[str] = (),
    rejected: Iterable[Rejection] = (),
) -> Listing:
    """Return the listing if it has at least one clip.

    Raises:
      UserError: If there is no clip.
    """
    reasons = tuple((escape_name(name), escape_name(reason)) for name, reason in rejected)
    listing = Listing(tuple(clips), tuple(map(escape_name, unlisted)), reasons, format)
    if listing.clips:
        return listing
    if reasons:
        first = ": ".join(reasons[0])
        raise UserError(f"none of the {len(reasons)} entries of {source} can be used (first: {first}); fix them")
    fix = "put videos or images there, with captions in metadata.csv (file_name,text)"
    raise UserError(f"{source} holds no clips; {fix}")


def warn_of_losses(source: object, listing: Listing) -> None:
    """Warn of what may be a mistake where no clip has a caption: files that are not read, and frames of a video."""
    if any(clip.captions for clip in listing.clips):
        return
    others = [name for name in listing.unlisted if get_suffix(name) not in MEDIA and may_hold_captions(name)]
    if others:
        first = ", ".join(others[:3]) + (", …" if len(others) > 3 else "")
        fix = "if they hold captions, write these to metadata.csv (file_name,text) or, in a tar, to .txt files"
        warnings.warn(f"no clip of {source} has a caption, and these files are not read: {first}; {fix}", stacklevel=2)
    if all(get_suffix(clip.name) in IMAGES - {".gif", ".apng"} for clip in listing.clips):
        patterns = Counter(re.sub(r"\d+(?=[^\d/]*$)", "#", clip.name) for clip in listing.clips)
        for pattern, count in patterns.most_common(1):
            if count >= _MIN_FRAMES:
                fix = "if they are frames of a video, make one of them (ffmpeg -i frame_%04d.png video.mp4)"
                warnings.warn(f"{source} holds {count} images {pattern}, which are a clip each; {fix}", stacklevel=2)


def may_hold_captions(name: str) -> bool:
    """Return whether a file that is no clip may hold captions, by its name without suffix."""
    return os.path.splitext(posixpath.basename(name))[0].lower() not in _NO_CAPTIONS


def clean_captions(texts: Iterable[str]) -> tuple[str, ...]:
    """Return the captions stripped, without empty ones and duplicates.

    Raises:
      UnusableClipError: If a caption is too long, or cannot be encoded as UTF-8 (it has half of a surrogate pair).
    """
    unique = dict.fromkeys(text for text in map(str.strip, texts) if text)
    for text in unique:
        try:
            size = len(text.encode())
        except UnicodeEncodeError as error:
            raise UnusableClipError("its caption is not UTF-8") from error
        if size > MAX_CAPTION_BYTES:
            raise UnusableClipError(f"its caption has {size:,} bytes, {MAX_CAPTION_BYTES:,} is the limit")
    return tuple(unique)


def read_caption_fields(fields: Mapping[str, Any], names: Sequence[str] = CAPTION_FIELDS) -> list[str]:
    """Return all captions of a JSON object, in the fields of these names; it may have other fields too.

    Raises:
      UnusableClipError: If a caption is neither a string nor a list of strings.
    """
    texts: list[str] = []
    for name in names:
        value = fields.get(name)
        for text in value if isinstance(value, list) else [value]:
            if not isinstance(text, str | None):
                raise UnusableClipError(f"its {name} is {type(text).__name__}, not text")
            texts += [text] if text is not None else []
    return texts


def read_caption_file(name: str, content: bytes) -> list[str] | None:
    """Return the captions of a caption file; a text file is one caption, however many lines it has.

    Returns:
      None for a JSON object that has fields, but none of captions.

    Raises:
      UnusableClipError: If the file is not UTF-8, or a `.json` file does not hold a JSON object.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnusableClipError(f"{name!r} is not UTF-8 ({error.reason} at byte {error.start})") from error
    if not name.lower().endswith(".json"):
        return [text]
    try:
        fields = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError) as error:
        raise UnusableClipError(f"{name!r} is not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise UnusableClipError(f'{name!r} holds a {type(fields).__name__}; write {{"caption": "…"}}')
    return read_caption_fields(fields) if not fields or any(field in fields for field in CAPTION_FIELDS) else None
