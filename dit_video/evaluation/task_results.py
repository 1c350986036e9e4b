"""Task results in a folder: one file and one line of JSON each, and a contact sheet."""

import contextlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from dit_video.core.errors import UserError
from dit_video.sampling import Sampling
from dit_video.sampling.pipeline import Pipeline
from dit_video.sampling.request import Request
from dit_video.sampling.tasks.task_file import TaskEntry
from dit_video.video import Clip

LINES_FILE, SHEET_FILE = "samples.jsonl", "contact_sheet.png"
_SHEET_FRAMES, _GAP = 6, 2


def write_task_results(
    pipeline: Pipeline,
    entries: Sequence[TaskEntry],
    folder: str | Path,
    *,
    options: Request,
    sampling: Sampling | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Path]:
    """Run tasks, and write each result as soon as it is finished; written results stay if the run is stopped.

    `samples.jsonl` has a line with the recipe of each file; `contact_sheet.png` has a row of frames for each.

    Args:
      pipeline: The model.
      entries: The tasks.
      folder: Folder of the results, which does not exist or is empty.
      options: Options of all tasks, of which each has its own seed; see `Pipeline.run_many`.
      sampling: Steps, solver and guidance; the pipeline's own by default.
      progress: Called with the number of finished results.

    Raises:
      UserError: If the folder holds files, a task does not fit the model, or the disk is full.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not an empty folder; use another one")
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    clips: list[Clip] = []
    count = max(1, 4 * pipeline.config.batch)
    try:
        for start in range(0, len(entries), count):
            part = entries[start : start + count]
            tasks, own = [entry.task for entry in part], [replace(options, seed=entry.seed) for entry in part]
            for clip in pipeline.run_many(tasks, own, sampling=sampling):
                paths.append(_write_clip(clip, folder, len(paths)))
                clips.append(clip)
                if progress is not None:
                    progress(len(paths))
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written after {len(paths)} results ({error}). Free space on the disk"
        ) from error
    finally:
        if clips:
            with contextlib.suppress(OSError):  # the disk may be full, which is reported already
                make_contact_sheet(clips).save(folder / SHEET_FILE)
    return paths


def _write_clip(clip: Clip, folder: Path, number: int) -> Path:
    slug = re.sub(r"[^a-z0-9]+", "-", clip.caption.lower()).strip("-")[:40] or "unconditional"
    has_odd_side = clip.height % 2 or clip.width % 2
    suffix = "png" if len(clip.frames) == 1 else "webm" if has_odd_side else "mp4"
    path = folder / f"{number:03d}-{slug}.{suffix}"
    clip.save(path)
    line = {"file": path.name, "frames": len(clip.frames), "height": clip.height, "width": clip.width, "fps": clip.fps}
    with (folder / LINES_FILE).open("a") as file:
        file.write(json.dumps(line | {"recipe": clip.recipe}) + "\n")
    return path


def make_contact_sheet(clips: Sequence[Clip]) -> Clip:
    """Return an image with a row of up to six frames of each clip, equally far apart in time."""
    height, width = max(clip.height for clip in clips) + _GAP, max(clip.width for clip in clips) + _GAP
    sheet = np.full((len(clips) * height, _SHEET_FRAMES * width, 3), 255, np.uint8)
    for row, clip in enumerate(clips):
        numbers = np.unique(np.linspace(0, len(clip.frames) - 1, _SHEET_FRAMES).round().astype(int))
        for column, frame in enumerate(clip.frames[numbers]):
            top, left = row * height, column * width
            sheet[top : top + clip.height, left : left + clip.width] = frame
    return Clip(sheet[None], fps=1.0)
