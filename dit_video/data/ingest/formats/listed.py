"""What a listing is: clips by name, their captions, and where their bytes lie."""

from collections.abc import Iterable
from typing import Literal, NamedTuple

from dit_video.core.errors import UserError

Format = Literal["folder", "table", "webdataset", "ucf101", "msrvtt"]

VIDEOS = frozenset(
    ".mp4 .m4v .mov .3gp .mkv .webm .avi .mpg .mpeg .ts .mts .m2ts .ogv .wmv .flv".split()  # noqa: SIM905
)
IMAGES = frozenset(".gif .apng .png .jpg .jpeg .webp .bmp .tif .tiff".split())  # noqa: SIM905
MEDIA = VIDEOS | IMAGES

Rejected = tuple[str, str]
"""(name, reason) of what cannot be a clip"""


class Listed(NamedTuple):
    """A clip that is to be ingested."""

    name: str
    """Its path inside the source, with forward slashes; unique. In a folder of tars it begins with its tar's."""
    captions: tuple[str, ...]
    size: int
    """bytes"""
    path: str
    """The file that holds it: itself, or a tar."""
    offset: int | None = None
    """Where it begins in a tar; None for a file of its own."""
    split: str = "train"
    """"train", "validation" or "test"; a source that knows of none has everything in "train"."""

    def read(self) -> bytes:
        """Its bytes.

        Raises:
          OSError: the file cannot be read, or has become shorter.
        """
        with open(self.path, "rb") as file:
            if self.offset is None:
                return file.read()
            file.seek(self.offset)
            content = file.read(self.size)
        if len(content) != self.size:
            raise OSError(f"{self.path} has become shorter")
        return content


class Listing(NamedTuple):
    """What a source holds."""

    clips: tuple[Listed, ...]
    """in the order of the source's list, or else of their names: the same on every machine"""
    unlisted: tuple[str, ...] = ()
    """Files that are left out: of a folder with a list the media that it doesn't name; without one all that is neither
    a clip by its suffix nor a clip's caption."""
    rejected: tuple[Rejected, ...] = ()
    """Entries outside of their tar, rows of a list that are not well formed, captions that are not UTF-8, …"""
    format: Format = "folder"
    """how the source was read"""


class Unusable(Exception):
    """Why one clip, or what should be one, is rejected. Caught where a source is listed; never seen by a user."""


def shown(name: str) -> str:
    r"""A name that may hold bytes that are not UTF-8 (as Python's surrogates), with those bytes as `\udcXX`."""
    return name.encode("utf-8", "backslashreplace").decode()


def quoted(name: str) -> str:
    """A name inside a reason. Reasons that differ in what is in quotes alone are counted as one kind."""
    return repr(name)


def check_name(name: str) -> None:
    """Refuse a name that is not UTF-8, which neither the index nor a record could hold, and one with a null byte.

    Raises:
      Unusable: it is not.
    """
    if shown(name) != name:
        raise Unusable("its name is not UTF-8; rename it")
    if "\0" in name:
        raise Unusable("its name holds a null byte")


def finished(
    source: object,
    format: Format,
    clips: Iterable[Listed],
    *,
    unlisted: Iterable[str] = (),
    rejected: Iterable[Rejected] = (),
) -> Listing:
    """The listing, if there is a clip in it.

    Raises:
      UserError: there is none.
    """
    listing = Listing(
        tuple(clips), tuple(map(shown, unlisted)), tuple((shown(n), shown(r)) for n, r in rejected), format
    )
    if listing.clips:
        return listing
    if listing.rejected:
        name, reason = listing.rejected[0]
        raise UserError(
            f"none of the {len(listing.rejected)} entries of {source} can be used (first: {name}: {reason}); fix them"
        )
    raise UserError(
        f"{source} holds no clips; put videos or images there, with captions in metadata.csv (file_name,text)"
    )
