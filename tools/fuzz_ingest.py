"""Send mutated files through the inspection of an ingest, and count what becomes of each."""

from dit_video.core.platform.scripts import prepare_script

prepare_script(__name__, huge_pages=False)

import dataclasses
import io
import json
import resource
import struct
import tarfile
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, cast

import av
import numpy as np
import tyro
from PIL import Image
from rich import print as show
from rich.table import Table

from dit_video.core import rng
from dit_video.core.command_line import check_minimum, parse_arguments
from dit_video.core.errors import UserError, script
from dit_video.curation.screening import ScreeningConfig
from dit_video.data.ingest.formats import ListedClip, list_clips
from dit_video.data.ingest.inspection import Inspection, InspectionConfig
from dit_video.data.ingest.workers import Workers, count_cores
from dit_video.video import Clip, encode

_BATCH = 500
_LISTS = ("tar", "csv", "jsonl")
"""Kinds of files that name or hold clips, and are listed in this process."""
_OUTCOMES = ("used", "quarantined", "slow", "crashed", "refused")
"""A file is `slow` if it takes more than the time limit twice, `crashed` if it ends the process that decodes it, and
`refused` if it is a list of clips that cannot be used as a whole; all but the first are listed with reasons."""
_NUMBERS = (0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x10000000)
"""Numbers at which sizes and counts overflow, or claim much."""


@dataclasses.dataclass
class FuzzResult:
    """Outcomes of mutated files."""

    counts: Counter[tuple[str, str]] = dataclasses.field(default_factory=Counter)
    """Number of files by kind and outcome."""
    members: int = 0
    """Clips that the lists and tars among them name, which are inspected, too."""
    lost: int = 0
    """Files and clips without an outcome."""
    slowest: float = 0.0
    """Seconds of the slowest list or tar, in this process."""
    problems: list[str] = dataclasses.field(default_factory=list)
    """Names of files that were slow or crashed, with their reasons."""


def main(
    count: Annotated[int, tyro.conf.Positional] = 10_000,
    seed: int = 0,
    workers: int | None = None,
    time_limit: float = 5.0,
    keep: Path | None = None,
) -> None:
    """Send mutated files through the inspection of an ingest, and print a table of outcomes.

    For example:

        python tools/fuzz_ingest.py 300
        python tools/fuzz_ingest.py 10000 --seed 1 --keep crashes

    The files are of all common formats, with bits flipped, parts missing, repeated or of another file, and numbers at
    their limits. The command fails if a file or a clip is lost, or if a list takes more than the time limit.

    Args:
        count: Number of files.
        seed: Seed of the mutations; file number N of a seed is always the same.
        workers: Processes; one per core by default.
        time_limit: Seconds that a file may take.
        keep: Folder for files that are slow or end their process.
    """
    check_minimum(1, count=count, workers=workers)
    started, memory = time.monotonic(), _get_peak_memory()
    result = fuzz(count, seed, workers or count_cores(), time_limit, keep)
    table = Table("kind", *_OUTCOMES)
    for kind in sorted({kind for kind, _ in result.counts}):
        table.add_row(kind, *(str(result.counts[kind, outcome]) for outcome in _OUTCOMES))
    totals = {o: sum(n for (_, outcome), n in result.counts.items() if outcome == o) for o in _OUTCOMES}
    table.add_row("all", *map(str, totals.values()))
    show(table)
    for problem in result.problems:
        print(problem)
    grown = (_get_peak_memory() - memory) >> 20
    print(
        f"{count} files and {result.members} clips of lists in {time.monotonic() - started:.0f} s; {result.lost} lost; "
        f"slowest list {result.slowest:.2f} s; this process grew by {grown} MiB"
    )
    if result.lost or result.slowest > time_limit:
        raise UserError("files were lost, or a list took too long; see the lines above")


def fuzz(count: int, seed: int, workers: int, time_limit: float, keep: Path | None = None) -> FuzzResult:
    """Return the outcomes of mutated files, batch by batch through one pool of processes."""
    originals, result = make_originals(), FuzzResult()
    config = InspectionConfig(screening=ScreeningConfig(min_motion=0, max_black=1.0, max_letterbox=1.0))
    with Workers(workers, config, time_limit) as pool:
        for first in range(0, count, _BATCH):
            with tempfile.TemporaryDirectory() as folder:
                _fuzz_batch(Path(folder), range(first, min(first + _BATCH, count)), seed, originals, pool, result, keep)
    result.lost += count - sum(result.counts.values())
    return result


def _fuzz_batch(
    folder: Path,
    numbers: range,
    seed: int,
    originals: dict[str, bytes],
    pool: Workers,
    result: FuzzResult,
    keep: Path | None,
) -> None:
    for name in ("a.mp4", "b.gif"):  # named by the lists
        (folder / name).write_bytes(originals[name.split(".")[1]])
    kinds = sorted(originals)
    clips: list[tuple[str, ListedClip]] = []
    for number in numbers:
        kind = kinds[number % len(kinds)]
        generator = rng.make_generator(seed, "mutation", number)
        content = mutate(generator, originals[kind], originals[kinds[int(generator.integers(len(kinds)))]])
        path = folder / f"{number:06}.{kind}"
        path.write_bytes(content)
        if kind not in _LISTS:
            clips.append((kind, ListedClip(path.name, (), len(content), str(path))))
            continue
        started = time.monotonic()
        try:
            members = list_clips(path).clips
        except UserError:
            result.counts[kind, "refused"] += 1
        else:
            result.counts[kind, "used"] += 1
            result.members += len(members)
            clips += [("", clip) for clip in members]
        result.slowest = max(result.slowest, time.monotonic() - started)
    tasks = [clip for _, clip in clips]
    verdicts = dict(pool.inspect(enumerate(tasks)))
    verdicts |= dict(pool.inspect_again((n, tasks[n]) for n, verdict in [*verdicts.items()] if verdict.transient))
    result.lost += len(tasks) - len(verdicts)
    for number, verdict in verdicts.items():
        kind, clip = clips[number]
        outcome = classify(verdict)
        if kind:
            result.counts[kind, outcome] += 1
        if outcome in ("slow", "crashed"):
            result.problems.append(f"{clip.name}: {verdict.reason}")
            if keep is not None:
                keep.mkdir(parents=True, exist_ok=True)
                (keep / Path(clip.path).name).write_bytes(Path(clip.path).read_bytes())


def classify(verdict: Inspection) -> str:
    """Return the outcome of an inspection."""
    if "takes more than" in verdict.reason:
        return "slow"
    if "ends the process" in verdict.reason:
        return "crashed"
    return "quarantined" if verdict.reason else "used"


def mutate(generator: np.random.Generator, content: bytes, other: bytes) -> bytes:
    """Return a file with one to three mutations."""
    data = bytearray(content)
    for _ in range(int(generator.integers(1, 4))):
        length = len(data)
        start, stop = sorted(int(place) for place in generator.integers(0, length + 1, 2))
        head = min(length, 400)
        match int(generator.integers(8)):
            case 0:  # bits
                for place in generator.integers(0, length, int(generator.integers(1, 40))):
                    data[place] ^= 1 << int(generator.integers(8))
            case 1:  # bits of the header
                for place in generator.integers(0, head, int(generator.integers(1, 6))):
                    data[place] ^= 1 << int(generator.integers(8))
            case 2:  # the end is missing
                del data[max(stop, 1) :]
            case 3:  # a part is missing, or is there twice
                data[start:stop] = b"" if generator.integers(2) else data[start:stop] * 2
            case 4:  # a number at a limit
                place = int(generator.integers(0, length))
                number = int(generator.choice(_NUMBERS))
                data[place : place + 4] = struct.pack(">I" if generator.integers(2) else "<I", number)
            case 5:  # a part of another file
                place = int(generator.integers(len(other)))
                data[start:start] = other[place : place + int(generator.integers(1, 2000))]
            case 6:  # the header of another file
                size = int(generator.integers(4, 200))
                data[:size] = other[:size]
            case _:  # a box of the same or of another file, in place of another one
                boxes = _find_boxes(data)
                spliced = _find_boxes(other) or boxes
                if boxes:
                    first, last = boxes[int(generator.integers(len(boxes)))]
                    begin, end = spliced[int(generator.integers(len(spliced)))]
                    data[first:last] = (other if spliced is not boxes else bytes(data))[begin:end]
        data = data or bytearray(b"\0")
    return bytes(data)


def _find_boxes(content: bytes | bytearray) -> list[tuple[int, int]]:
    """Return the places of parts that have a size before a name of four letters: boxes, and chunks of PNG."""
    boxes = []
    for start in range(min(len(content), 20_000) - 8):
        size = int.from_bytes(content[start : start + 4], "big")
        if 8 <= size <= len(content) - start and bytes(content[start + 4 : start + 8]).isalpha():
            boxes.append((start, start + size))
    return boxes


def make_originals() -> dict[str, bytes]:
    """Return a small whole file of each kind, by suffix."""
    pixels = rng.make_generator(0, "fuzzed clip").integers(0, 255, (12, 6, 8, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    clip, picture = Clip(frames=pixels, fps=12), Image.fromarray(pixels[0])
    files = {format: encode(clip, format) for format in ("webm", "gif", "apng")}
    files["mp4"] = _write_video(pixels, "mp4", "libx264", "yuv420p", "aac")
    files["mkv"] = _write_video(pixels, "matroska", "ffv1", "yuv420p", "aac")
    files["avi"] = _write_video(pixels, "avi", "mjpeg", "yuvj420p", "pcm_s16le")
    for suffix, format in (("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP"), ("avif", "AVIF")):
        file = io.BytesIO()
        picture.save(file, format)
        files[suffix] = file.getvalue()
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, content in {"a.mp4": files["mp4"], "a.txt": b"first", "b.gif": files["gif"], "b.json": b"{}"}.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    files["tar"] = archive.getvalue()
    rows = [(name, f"caption {number}, of a clip") for number in range(40) for name in ("a.mp4", "b.gif")]
    files["csv"] = ("file_name,text\n" + "".join(f'{name},"{text}"\n' for name, text in rows)).encode()
    objects = [{"file_name": name, "text": text} for name, text in rows]
    files["jsonl"] = "".join(json.dumps(each) + "\n" for each in objects).encode()
    return files


def _write_video(pixels: np.ndarray, format: str, codec: str, pixel_format: str, audio_codec: str) -> bytes:
    """Return a file with sound."""
    file = io.BytesIO()
    with av.open(file, "w", format=format) as container:
        video = cast(av.VideoStream, container.add_stream(codec, rate=12))
        video.height, video.width, video.pix_fmt = pixels.shape[1], pixels.shape[2], pixel_format
        audio = cast(av.AudioStream, container.add_stream(audio_codec, rate=16000, layout="mono"))
        for number, picture in enumerate(pixels):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pixel_format)
            frame.pts = number
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        sample_format, dtype = ("fltp", np.float32) if audio_codec == "aac" else ("s16", np.int16)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 16000), dtype), format=sample_format, layout="mono")
        sound.sample_rate, sound.pts = 16000, 0
        container.mux(audio.encode(sound))
        container.mux(audio.encode(None))
    return file.getvalue()


def _get_peak_memory() -> int:
    """Return the peak memory of this process in bytes, on Linux."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


if __name__ == "__main__":
    script(parse_arguments, is_resumable=False)(main)
