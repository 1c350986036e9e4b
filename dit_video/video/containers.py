"""Facts about a file that ffmpeg does not check or tell: claims of mp4 tables, cropping, and parts that are missing."""

import io
import struct
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from dit_video.core.errors import DecodeError

File = io.BytesIO | io.FileIO | io.BufferedReader
_MP4_STARTS = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")
"""Kinds of the first box of mp4 and mov files."""
_MATROSKA_START = b"\x1a\x45\xdf\xa3"
_SEGMENT = b"\x18\x53\x80\x67"
"""ID of the element of Matroska that holds all others."""
_CLUSTER = b"\x1f\x43\xb6\x75"
"""ID of the element of Matroska that holds packets."""
_TRANSPORT_SIZES = (188, 192, 204)
"""Sizes of a packet of MPEG-TS: as such, with a time before it (.m2ts), and with a checksum after it."""
_SYNC = 0x47
"""First byte of a packet of MPEG-TS."""
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


def check_is_gapless(file: File, format: str, stream: int, name: str) -> None:
    """Raise `DecodeError` if a part of the packets of an MPEG-TS, Matroska, FLV or AVI file is overwritten or lost.

    ffmpeg looks for the next packet that it can read and sets no flag, and decoders show something in place of the
    frames that are missing. Where one packet leads to the next, zeros in its place are damage; any other oddity may be
    some writer's. The whole file is read, as far as packets lead.

    Args:
      file: The file.
      format: ffmpeg's name of the format.
      stream: Number that the format gives the video stream.
      name: Name of the file, for the message.
    """
    file.seek(0)
    gap = None
    if format == "mpegts":
        gap = _find_transport_gap(file, stream)
    elif format.startswith("matroska"):
        gap = _find_zeros(file, 0, 12, _skip_element)
    elif format == "flv":
        gap = _find_zeros(file, int.from_bytes(file.read(9)[5:], "big") + 4, 11, _skip_tag)
    elif format == "avi":
        gap = _find_zeros(file, 0, 8, _skip_chunk)
    if gap is not None:
        raise DecodeError(f"{name} is damaged: packets are missing at byte {gap}; copy it again, or remove it")


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


def _find_zeros(file: File, offset: int, size: int, skip: Callable[[bytes, int], int]) -> int | None:
    """Return the offset of the first header that is zero, in a chain of headers of so many bytes.

    Args:
      file: The file.
      offset: Offset of the first header.
      size: Bytes of a header.
      skip: Function that returns, for a header and its offset, the next one's offset; 0 for a header of no known kind.
    """
    while True:
        file.seek(offset)
        header = file.read(size)
        if len(header) < size:
            return None
        if not any(header):
            return offset
        if (offset := skip(header, offset)) == 0:
            return None


def _skip_element(header: bytes, offset: int) -> int:
    element = next(_read_elements(io.BytesIO(header), _Box(b"", 0, _ENDLESS)), None)
    if element is None:
        return 0
    return offset + (element.start if element.kind in (_SEGMENT, _CLUSTER) else element.stop)


def _skip_tag(header: bytes, offset: int) -> int:
    """Skip a tag of FLV (Video File Format Specification, annex E): sound, pictures, or properties."""
    return offset + 15 + int.from_bytes(header[1:4], "big") if header[0] & 0x1F in (8, 9, 18) else 0


def _skip_chunk(header: bytes, offset: int) -> int:
    """Skip a chunk of AVI, or go into a list of them."""
    size = int.from_bytes(header[4:], "little")
    if not header[:4].strip().isalnum():
        return 0
    return offset + (12 if header[:4] in (b"RIFF", b"LIST") else 8 + size + size % 2)


def _find_transport_gap(file: File, stream: int) -> int | None:
    """Return the offset of the first packet of MPEG-TS without its first byte, or after a lost one of this stream.

    Packets of a stream are counted (ISO/IEC 13818-1, 2.4.3.3). The count may begin anew at a key frame: files of
    MPEG-TS are joined by appending one to the other.
    """
    head = np.frombuffer(file.read(5 * max(_TRANSPORT_SIZES)), np.uint8)
    places = [(size, first) for size in _TRANSPORT_SIZES for first in range(size)]
    size, first = next((place for place in places if (head[place[1] :: place[0]] == _SYNC).all()), (0, 0))
    if not size or len(head) < size:
        return None
    file.seek(first)
    parts = []
    while len(part := file.read(size << 12)) >= size:
        parts.append(np.frombuffer(part, np.uint8, len(part) // size * size).reshape(-1, size)[:, :6].copy())
    headers = np.concatenate(parts)
    high, low = divmod(stream, 256)
    numbers = np.flatnonzero((headers[:, 1] & 0x1F == high) & (headers[:, 2] == low))
    own = headers[numbers]
    has_fields = (own[:, 3] & 0x20 > 0) & (own[:, 4] > 0)
    fields = np.where(has_fields, own[:, 5], 0)  # 0x80: the count is discontinuous; 0x40: a key frame
    is_start = (own[:, 1] & 0x40 > 0) & (fields & 0x40 > 0) | (fields & 0x80 > 0)
    steps = (own[1:, 3] - own[:-1, 3]) & 0xF
    # A packet without payload does not count, and one may be there twice.
    is_lost = (steps != (own[1:, 3] >> 4 & 1)) & (steps != 0) & ~is_start[1:]
    lost = [*np.flatnonzero(headers[:, 0] != _SYNC)[:1], *numbers[1:][is_lost][:1]]
    return first + int(min(lost)) * size if lost else None


def check_gif_packet(content: bytes, width: int) -> None:
    """Check what ffmpeg shows in silence, wrongly: an image that ends early, or is wider than the canvas.

    Args:
      content: A packet of a GIF (GIF89a, 20 to 24).
      width: Width of the canvas.

    Raises:
      ValueError: If the packet has such an image.
    """
    offset = 0
    if content.startswith(b"GIF8"):
        offset = 13 + _measure_colours(content[10:11])
    while offset < len(content):
        kind = content[offset : offset + 1]
        if kind == b"!":  # an extension: its label, and blocks
            offset += 2
        elif kind == b",":  # an image: its place, its colours, the size of its codes, and blocks
            if int.from_bytes(content[offset + 5 : offset + 7], "little") > width:
                raise ValueError("an image is wider than the canvas")
            offset += 11 + _measure_colours(content[offset + 9 : offset + 10])
        elif kind == b";":
            return
        else:
            break
        while (size := content[offset : offset + 1]) not in (b"", b"\0"):
            offset += 1 + size[0]
        offset += 1
    if offset != len(content):
        raise ValueError("an image ends early")


def _measure_colours(flags: bytes) -> int:
    """Return the length of the table of colours that these flags announce."""
    return 3 << (flags[0] & 7) + 1 if flags and flags[0] & 0x80 else 0
