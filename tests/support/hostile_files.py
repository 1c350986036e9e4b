"""Small files that claim much: packets, frames, pixels and headers that take gigabytes of memory to read."""

import io
import struct
import tarfile
import zlib
from pathlib import Path

import av
import numpy as np

GIB = 1 << 30


def make_mp4(*, fragmented: bool = False) -> bytes:
    """Return a file with three frames and a moment of sound."""
    file = io.BytesIO()
    options = {"movflags": "frag_keyframe+empty_moov"} if fragmented else {}
    with av.open(file, "w", format="mp4", options=options) as container:
        video = container.add_stream("libx264", rate=10)
        video.width, video.height, video.pix_fmt = 48, 32, "yuv420p"
        audio = container.add_stream("aac", rate=16000, layout="mono")
        for number in range(3):
            frame = av.VideoFrame.from_ndarray(np.full((32, 48, 3), 40 * number, np.uint8), format="rgb24")
            frame.pts = number
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate, sound.pts = 16000, 0
        container.mux(audio.encode(sound))
        container.mux(audio.encode(None))
    return file.getvalue()


def put(content: bytes, offset: int, value: int) -> bytes:
    """Return the content with four bytes replaced by a number."""
    return content[:offset] + struct.pack(">I", value) + content[offset + 4 :]


def claim_audio_packets(count: int = 85_000_000) -> bytes:
    """Return an mp4 whose sound has so many packets of one byte, all in one chunk."""
    content = make_mp4()
    start = content.index(b"soun")
    content = put(content, content.index(b"stts", start) + 12, count)
    content = put(content, content.index(b"stsc", start) + 16, count)
    sizes = content.index(b"stsz", start)
    return put(put(content, sizes + 8, 1), sizes + 12, count)


def claim_fragment(count: int = 85_000_000) -> bytes:
    """Return an mp4 whose first fragment has so many packets, of which it says nothing else."""
    content = make_mp4(fragmented=True)
    run = content.index(b"trun")
    content = put(content, run + 4, 1)  # an offset of the data alone, which all packets share
    return put(content, run + 8, count)


def claim_keys(count: int = 400_000_000) -> bytes:
    """Return an mp4 whose metadata has so many keys."""
    content = make_mp4()
    keys = struct.pack(">I4sII", 16, b"keys", 0, count)
    handler = struct.pack(">I4sI4s4s12xx", 33, b"hdlr", 0, bytes(4), b"mdta")
    meta = struct.pack(">I4s", 8 + len(handler) + len(keys), b"meta") + handler + keys
    start = content.index(b"moov") - 4
    size = struct.unpack(">I", content[start : start + 4])[0]
    return put(content, start, size + len(meta))[: start + size] + meta + content[start + size :]


def make_png(height: int, width: int) -> bytes:
    """Return a black picture, of any size."""
    packer, data = zlib.compressobj(), []
    data += [packer.compress(bytes(1 + 3 * width)) for _ in range(height)] + [packer.flush()]
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    written = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in [(b"IHDR", header), (b"IDAT", b"".join(data)), (b"IEND", b"")]
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(written)


def make_mkv(seconds: float, padding: int) -> bytes:
    """Return a file of three frames whose header claims a duration, with so many bytes of padding."""
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        video = container.add_stream("ffv1", rate=10)
        video.width, video.height, video.pix_fmt = 48, 32, "yuv420p"
        for _ in range(3):
            container.mux(video.encode(av.VideoFrame.from_ndarray(np.zeros((32, 48, 3), np.uint8), format="rgb24")))
        container.mux(video.encode(None))
    content = file.getvalue()
    start = content.index(b"\x44\x89\x88") + 3
    content = content[:start] + struct.pack(">d", 1000 * seconds) + content[start + 8 :]
    return content + b"\xec" + struct.pack(">Q", 1 << 56 | padding) + bytes(padding)


def write_sparse_tar(path: Path, kind: bytes, size: int = GIB) -> None:
    """Write a tar whose first header claims a name, or attributes, of a gigabyte, which takes 4 KiB of the disk."""
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = kind, size
    with path.open("wb") as file:
        file.write(header.tobuf(tarfile.GNU_FORMAT))
        file.truncate(512 + size + 1024)
