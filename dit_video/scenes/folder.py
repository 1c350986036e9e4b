"""Scenes as a folder of video files with captions, read by the path of a user's clips."""

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from dit_video.core import files
from dit_video.core.errors import UserError
from dit_video.scenes.clip_folder import ClipEntry, write_clip_folder
from dit_video.scenes.description import Scene
from dit_video.scenes.draw import FPS, SIZES, draw_scene
from dit_video.scenes.render import render
from dit_video.tokens import Grid
from dit_video.video import Clip


def write_folder(
    folder: Path,
    *,
    count: int,
    seed: int,
    levels: Sequence[int] = (1, 2),
    sizes: Sequence[Grid] = SIZES,
    fps: float = FPS,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Path:
    """Write scenes 0 … count-1, of the levels in turn, and `scenes.jsonl` with what they hold; return the folder.

    The clips are `clips/000000.mp4` (`.png` for one frame), their captions are in `metadata.csv`. Repeating an
    interrupted call completes it; `progress(done, total)` is called after every clip.

    Raises:
      UserError: no clips, levels or sizes, or a folder that holds clips of other arguments.
    """
    if count < 1 or not levels:
        raise UserError(f"count={count} of {len(levels)} levels is invalid: use at least one clip and one level")
    scenes = [
        draw_scene(index, seed=seed, level=levels[index % len(levels)], sizes=sizes, fps=fps) for index in range(count)
    ]
    recipe = {"seed": seed, "levels": list(levels), "sizes": [list(size) for size in sizes], "fps": fps}
    entries = [ClipEntry(scene.caption, scene.size.t, functools.partial(_render_clip, scene)) for scene in scenes]
    names = write_clip_folder(folder, entries, recipe=recipe, progress=progress)
    documents = ({"file_name": name} | asdict(scene) for name, scene in zip(names, scenes, strict=True))
    files.write_text(folder / "scenes.jsonl", "".join(f"{json.dumps(each)}\n" for each in documents))
    return folder


def _render_clip(scene: Scene) -> Clip:
    return render(scene).clip
