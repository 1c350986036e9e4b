"""The files of animated emoji: fetched by npm, and made into captioned clips that loop.

A clip has 8 frames a second and 1 + 4k of them, as autoencoders have a temporal stride of 4. Its last frame is its
first one, so that a whole period is in it, which is played a few percent faster or slower to be a multiple of half a
second.
"""

import contextlib
import csv
import functools
import io
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from dit_video.core.errors import DecodeError, UserError
from dit_video.core.files import atomic_path, write_text
from dit_video.core.storage import StoragePathLike
from dit_video.data.tables import write_column
from dit_video.emoji.names import LANGUAGES, EmojiName, choose_held_out, read_names
from dit_video.video.reader import Video

PACKAGES = {f"fluent-emoji-anim-{number}": count for number, count in enumerate((999, 767, 706, 919), 1)}
"""Number of files of each package of npm's scope @lobehub."""
VERSION = "1.0.0"
LICENCE = "Fluent Emoji, copyright Microsoft Corporation, MIT licence, in @lobehub/fluent-emoji-anim of npm"
FPS = 8
SIDE = 128
"""Height and width of the clips, in pixels."""
STRIDE = 4
"""Frames of a clip are one more than a multiple of it."""
HELD_OUT_SPLIT = "validation"
SUFFIX = ".webp"
_PACK = f"npm pack {' '.join(f'@lobehub/{name}@{VERSION}' for name in PACKAGES)}"
_CHUNK = 16
"""Number of files that a process gets at once."""


class Preparation(NamedTuple):
    """Clips of emoji in a folder, and what they show."""

    names: Mapping[str, EmojiName]
    """Name of each clip by its stem."""
    held_out: Mapping[str, str]
    """Kind of pair, "tone" or "person", for each stem that is held out, see `names.choose_held_out`."""
    unknown: tuple[str, ...]
    """Stems of files that have no name."""
    damaged: Mapping[str, str]
    """Reason for each stem of a file that cannot be read."""


def fetch(folder: Path) -> None:
    """Fetch the packages that a folder lacks, 730 MB in all.

    Raises:
      UserError: If npm is not installed, or cannot fetch them; the message has the commands to run instead.
    """
    missing = [name for name in PACKAGES if not (folder / name).is_dir()]
    if not missing:
        return
    fix = f"Run these two commands where it works:\n  {_PACK}\n  python experiments/emoji.py --source ."
    npm = shutil.which("npm")
    if npm is None:
        raise UserError(f"npm, which fetches the emoji, is not installed. Install it, or use other means. {fix}")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as packed:
        command = [npm, "pack", "--pack-destination", packed, *(f"@lobehub/{name}@{VERSION}" for name in missing)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
            raise UserError(f"npm cannot fetch the emoji ({lines[0].strip()}). {fix}")
        for archive in Path(packed).glob("*.tgz"):
            _unpack(archive, folder)


def find_files(source: Path, unpacked: Path) -> dict[str, Path]:
    """Return the files of emoji in a folder by their stems.

    Args:
      source: Folder with the packages in subfolders, as archives (`.tgz`), or with the files alone.
      unpacked: Folder where archives are unpacked.

    Raises:
      UserError: If there are none, an archive is damaged, or a package is there in part.
    """
    if not source.is_dir():
        raise UserError(f"no such folder: {source}. Use the one where `npm pack` has written the packages.")
    for archive in sorted(source.glob("*.tgz")):
        _unpack(archive, unpacked)
    paths = sorted(path for folder in {source, unpacked} for path in folder.rglob(f"*{SUFFIX}"))
    for name, count in PACKAGES.items():
        found = len({path.name for path in paths if name in path.parts})
        if 0 < found < count:
            raise UserError(f"{source} has {found} of the {count} files of {name}: it is half unpacked. Unpack it.")
    files = {path.stem: path for path in paths}
    if not files:
        raise UserError(f"{source} has no files of emoji ({SUFFIX}). Run there: {_PACK}")
    return files


def prepare(
    files: Mapping[str, Path],
    folder: Path,
    *,
    seed: int,
    workers: int | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Preparation:
    """Write a clip for each emoji, and `metadata.csv` with their captions and splits; a later call continues.

    Args:
      files: Files by their stems.
      folder: Folder of the clips.
      seed: Seed of what is held out.
      workers: Number of processes; None for one on each core, 0 for this one.
      progress: Called with the number of files that are done, and of all.

    Raises:
      UserError: If the package `emoji` is not installed, or no file can be used.
    """
    names, unknown = read_names(files)
    folder.mkdir(parents=True, exist_ok=True)
    missing = [stem for stem in names if not (folder / f"{stem}{SUFFIX}").is_file()]
    damaged: dict[str, str] = {}
    progress(len(names) - len(missing), len(names))
    targets = [folder / f"{stem}{SUFFIX}" for stem in missing]
    with contextlib.ExitStack() as resources:
        run: Callable[..., Iterable[str]] = map
        if workers != 0 and missing:
            pool = resources.enter_context(ProcessPoolExecutor(workers, mp_context=get_context("spawn")))
            run = functools.partial(pool.map, chunksize=_CHUNK)
        reasons = run(_prepare_file, [files[stem] for stem in missing], targets)
        for number, (stem, reason) in enumerate(zip(missing, reasons, strict=True), 1):
            if reason:
                damaged[stem] = reason
            progress(len(names) - len(missing) + number, len(names))
    usable = {stem: name for stem, name in names.items() if stem not in damaged}
    if not usable:
        first = next(iter(damaged.items()), (next(iter(unknown), "none"), "it has no name"))
        raise UserError(f"none of the {len(files)} files can be used (first: {first[0]}: {first[1]}). Use other files.")
    held_out = choose_held_out(usable, seed)
    table = io.StringIO()
    lines = csv.writer(table, lineterminator="\n")
    lines.writerow(("file_name", "text", "split"))
    lines.writerows(
        (f"{stem}{SUFFIX}", name.text, HELD_OUT_SPLIT if stem in held_out else "train") for stem, name in usable.items()
    )
    write_text(folder / "metadata.csv", table.getvalue())
    write_text(folder / "LICENCE.txt", f"{LICENCE}\n")
    return Preparation(usable, held_out, unknown, damaged)


def write_columns(dataset: StoragePathLike, preparation: Preparation) -> None:
    """Add the parts of the names, what is held out, and the captions of each language to a data set of the clips."""
    names = preparation.names
    clips = [f"{stem}{SUFFIX}" for stem in names]
    parts = {part: [getattr(name, part) for name in names.values()] for part in ("base", "tone", "person", "role")}
    held_out = [preparation.held_out.get(stem, "") for stem in names]
    write_column(dataset, "emoji", {"name": clips, **parts, "held_out": held_out})
    captions = {
        f"captions_{language}": [[name.translations[language]] for name in names.values()] for language in LANGUAGES[1:]
    }
    write_column(dataset, "languages", {"name": clips, **captions})


def count_intervals(seconds: float) -> int:
    """Return the number of frames of a period of this length, a multiple of `STRIDE`."""
    return STRIDE * max(1, round(seconds * FPS / STRIDE))


def _prepare_file(source: Path, target: Path) -> str:
    """Write the clip of a file; return the reason why it cannot be read, or nothing."""
    try:
        frames = _read_period(source)
    except DecodeError as error:
        return str(error)
    images = [_fit(frame) for frame in frames]
    with atomic_path(target) as temporary:
        images[0].save(
            temporary,
            "WEBP",
            save_all=len(images) > 1,
            append_images=images[1:],
            duration=round(1000 / FPS),
            lossless=True,
            quality=0,  # the least effort, of a lossless file
            method=0,
        )
    return ""


def _read_period(path: Path) -> Sequence[Image.Image]:
    """Return the frames of a period with transparency, and its first one again; the only one of a picture."""
    with Video(path) as video:
        timed = [(frame.time, frame.duration, frame.frame.to_ndarray(format="rgba")) for frame in video.read_frames()]
    if len(timed) == 1:
        return [Image.fromarray(timed[0][2])]
    starts = np.array([time for time, *_ in timed])
    seconds = timed[-1][0] + timed[-1][1]
    count = count_intervals(seconds)
    shown = np.searchsorted(starts, seconds * np.arange(count) / count + 1e-6, side="right") - 1
    return [Image.fromarray(timed[number][2]) for number in (*shown.tolist(), 0)]


def _fit(image: Image.Image) -> Image.Image:
    """Return an image in the middle of a transparent square of the clips' size."""
    side = max(image.size)
    if image.size != (side, side):
        square = Image.new("RGBA", (side, side))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    return image.resize((SIDE, SIDE), Image.Resampling.BOX if side >= SIDE else Image.Resampling.BICUBIC)


def _unpack(archive: Path, folder: Path) -> None:
    """Unpack the files of an archive into a folder of the package's name, if it is not there."""
    try:
        with tarfile.open(archive) as tar:
            manifest = tar.extractfile("package/package.json")
            assert manifest is not None
            name = re.sub(r".*/", "", json.load(manifest)["name"])
            if (folder / name).is_dir():
                return
            with atomic_path(folder / name) as temporary:
                tar.extractall(temporary, filter="data")
    except (tarfile.TarError, EOFError, OSError, KeyError, ValueError) as error:
        raise UserError(f"{archive} is damaged ({error}). Fetch it again.") from error
