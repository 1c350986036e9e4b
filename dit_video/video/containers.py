"""Facts about a file that ffmpeg does not check or tell: claims of mp4 tables, cropping, files that end early."""

import io
import struct
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import NamedTuple

from dit_video.core.errors import DecodeError

File = io.BytesIO | io.FileIO
_MP4_STARTS = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")
"""Kinds of the first box of mp4 and mov files."""
_MATROSKA_START = b"\x1a\x45\xdf\xa3"
_SEGMENT = b"\x18\x53\x80\x67"
"""ID of the element of Matroska that holds all others."""
_ENDLESS = 1 << 62
"""End of an element whose size is unknown."""
_MAX_BOXES = 100_000
"""Maximum number of boxes read inside another: enough for hours of fragmented video, and read at once."""


class Crop(NamedTuple):
    """Numbers of stored pixels on each side of a picture that are not shown."""

    left: int
    top: int
    right: int
    bottom: int


class _Box(NamedTuple):
    """A box of mp4 (ISO/IEC 14496-12, 4.2), or an element of Matroska (RFC 8794)."""

    kind: bytes
    start: int
    """Offset of the content."""
    stop: int
    """Offset of its end."""


_Reader = Callable[[File, _Box], Iterator[_Box]]


def check_mp4_header(file: File, name: str) -> None:
    """Raise `DecodeError` if a video track claims more frames of one size than the file has bytes for.

    A few bytes of header can claim any number of frames of one size, and ffmpeg keeps an entry of tens of bytes for
    each: up to two gigabytes and half a minute (ISO/IEC 14496-12, 8.7.3). The file is left at its beginning.
    """
    length = file.seek(0, 2)
    for track in _find_video_tracks(file):
        for box in _find(_read_boxes, file, track, b"mdia", b"minf", b"stbl", b"stsz"):
            content = _read_content(file, box, 12)
            size, count = int.from_bytes(content[4:8], "big"), int.from_bytes(content[8:12], "big")
            if size * count > length:
                raise DecodeError(
                    f"{name} claims {count} frames of {size} bytes in {length} bytes; remove it or replace it"
                )
    file.seek(0)


def check_is_whole(file: File, name: str) -> None:
    """Raise `DecodeError` if a Matroska or AVI file ends before it says that it does.

    ffmpeg shows the frames that are there. A stream that was never finished does not say where it ends. The file is
    left at its beginning.
    """
    length, stop = file.seek(0, 2), 0
    file.seek(0)
    head = file.read(12)
    if head[:4] == _MATROSKA_START:
        segment = next(_find(_read_elements, file, _Box(b"", 0, _ENDLESS), _SEGMENT), None)
        stop = 0 if segment is None or segment.stop == _ENDLESS else segment.stop
    elif head[:4] == b"RIFF" and head[8:] == b"AVI ":
        stop = 8 + int.from_bytes(head[4:8], "little")
    file.seek(0)
    if stop > length:
        raise DecodeError(f"{name} is cut short: it has {length} of {stop} bytes; copy it again, or remove it")


def read_crops(file: File) -> list[Crop]:
    """Return what mp4, mov and Matroska crop of the pictures of each video track; an empty list of other files.

    These are mp4's clean aperture (ISO/IEC 14496-12, 12.1.4), and the PixelCrop elements of Matroska (RFC 9559,
    5.1.4.1.28). The file is left at its beginning.
    """
    crops = [_read_clean_aperture(file, track) for track in _find_video_tracks(file)]
    file.seek(0)
    if file.read(4) == _MATROSKA_START:
        root = _Box(b"", 0, file.seek(0, 2))
        tracks = next(_find(_read_elements, file, root, _SEGMENT, b"\x16\x54\xae\x6b"), _Box(b"", 0, 0))
        for track in _find(_read_elements, file, tracks, b"\xae"):
            if _read_numbers(file, track).get(b"\x83") == 1:  # its type: pictures
                crops.append(_read_pixel_crop(file, track))
    file.seek(0)
    return crops


def _find_video_tracks(file: File) -> Iterator[_Box]:
    """Yield the tracks of pictures of an mp4 or mov file."""
    file.seek(4)
    if file.read(4) not in _MP4_STARTS:
        return
    for track in _find(_read_boxes, file, _Box(b"", 0, file.seek(0, 2)), b"moov", b"trak"):
        if any(
            _read_content(file, box, 12)[8:] == b"vide" for box in _find(_read_boxes, file, track, b"mdia", b"hdlr")
        ):
            yield track


def _read_clean_aperture(file: File, track: _Box) -> Crop:
    for table in _find(_read_boxes, file, track, b"mdia", b"minf", b"stbl", b"stsd"):
        # The table's boxes follow a count, and those of a sample entry its 78 bytes of fields.
        for entry in _read_boxes(file, table._replace(start=table.start + 8)):
            stored = struct.unpack(">2H", _read_content(file, entry, 28)[24:].ljust(4, b"\0"))
            for box in _find(_read_boxes, file, entry._replace(start=entry.start + 78), b"clap"):
                numbers = struct.unpack(">8i", _read_content(file, box, 32).ljust(32, b"\0"))
                if 0 not in numbers[1::2]:
                    shown = [Fraction(*pair) for pair in zip(numbers[::2], numbers[1::2], strict=True)]
                    sides = [_crop_side(*side) for side in zip(stored, shown[:2], shown[2:], strict=True)]
                    return Crop(sides[0][0], sides[1][0], sides[0][1], sides[1][1])
            break  # further entries are for a change of the format
    return Crop(0, 0, 0, 0)


def _crop_side(stored: int, shown: Fraction, offset: Fraction) -> tuple[int, int]:
    """Return what is cropped before and after the shown pixels; `offset` is from the centre to theirs."""
    first = round((stored - shown) / 2 + offset)
    return first, stored - first - round(shown)


def _read_pixel_crop(file: File, track: _Box) -> Crop:
    for video in _find(_read_elements, file, track, b"\xe0"):
        numbers = _read_numbers(file, video)
        return Crop(*(numbers.get(b"\x54" + side, 0) for side in (b"\xcc", b"\xbb", b"\xdd", b"\xaa")))
    return Crop(0, 0, 0, 0)


def _find(read: _Reader, file: File, box: _Box, *path: bytes) -> Iterator[_Box]:
    """Yield the boxes inside of a box that are found by the kinds of a path."""
    if not path:
        yield box
        return
    for inner in read(file, box):
        if inner.kind == path[0]:
            yield from _find(read, file, inner, *path[1:])


def _read_boxes(file: File, outer: _Box) -> Iterator[_Box]:
    offset = outer.start
    for _ in range(_MAX_BOXES):
        if offset + 8 > outer.stop:
            return
        file.seek(offset)
        header = file.read(16)
        size, start = int.from_bytes(header[:4], "big"), offset + 8
        if size == 1:
            size, start = int.from_bytes(header[8:16], "big"), offset + 16
        stop = outer.stop if size == 0 else min(offset + size, outer.stop)
        if stop < start:
            return
        yield _Box(header[4:8], start, stop)
        offset = stop


def _read_elements(file: File, outer: _Box) -> Iterator[_Box]:
    """Yield the elements of a Matroska element; the leading zeros of an ID and of a size say how long they are."""
    offset = outer.start
    for _ in range(_MAX_BOXES):
        file.seek(offset)
        header = file.read(12)
        kind_length = 9 - header[:1][0].bit_length() if header else 9
        size_length = 9 - header[kind_length].bit_length() if kind_length < len(header) else 9
        start = offset + kind_length + size_length
        if kind_length > 4 or size_length > 8 or start > outer.stop:
            return
        size = int.from_bytes(header[kind_length : kind_length + size_length], "big") ^ 1 << 7 * size_length
        is_unknown = size + 1 == 1 << 7 * size_length  # of streams: the rest of the file
        stop = outer.stop if is_unknown else min(start + size, outer.stop)
        yield _Box(header[:kind_length], start, stop)
        offset = stop


def _read_numbers(file: File, outer: _Box) -> dict[bytes, int]:
    """Return the elements of an element by their IDs, as unsigned numbers; those of text and others mean nothing."""
    return {box.kind: int.from_bytes(_read_content(file, box, 8), "big") for box in list(_read_elements(file, outer))}


def _read_content(file: File, box: _Box, count: int) -> bytes:
    file.seek(box.start)
    return file.read(min(count, box.stop - box.start))


def is_whole_gif_packet(content: bytes) -> bool:
    """Return whether a packet of a GIF holds its image to the end (GIF89a, 20 to 24); ffmpeg shows what there is."""
    offset = 0
    if content.startswith(b"GIF8"):
        offset = 13 + _measure_colours(content[10:11])
    while offset < len(content):
        kind = content[offset : offset + 1]
        if kind == b"!":  # an extension: its label, and blocks
            offset += 2
        elif kind == b",":  # an image: its place, its colours, the size of its codes, and blocks
            offset += 11 + _measure_colours(content[offset + 9 : offset + 10])
        else:
            return kind == b";"
        while (size := content[offset : offset + 1]) not in (b"", b"\0"):
            offset += 1 + size[0]
        offset += 1
        if offset > len(content):
            return False
    return True


def _measure_colours(flags: bytes) -> int:
    """Return the length of the table of colours that these flags announce."""
    return 3 << (flags[0] & 7) + 1 if flags and flags[0] & 0x80 else 0
