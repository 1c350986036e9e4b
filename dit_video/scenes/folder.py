"""Folders of rendered clips with captions, in the layout of a user's own clips."""

import csv
import functools
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32

from dit_video.core import files
from dit_video.core.errors import UserError
from dit_video.scenes.draw import ACTION_PIXELS, FPS, SIZES, SceneKind, draw_kind
from dit_video.scenes.render import render
from dit_video.scenes.scene import Scene
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
    kind: SceneKind = "levels",
    depth: Path | None = None,
    actions: Path | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Path:
    """Write scenes 0 … count-1, of the levels in turn or of another kind, and return the folder.

    The clips are `clips/000000.mp4` (`.png` for one frame), their captions are in `metadata.csv`, and what they hold in
    `scenes.jsonl`. Repeating an interrupted call completes it. The folder `depth`, if there is one, gets the depth of
    each clip under the clip's name, and `actions` those of steered objects for `FrameActions`. `progress(done, total)`
    is called after every clip, and after the depth of every clip.

    Raises:
      UserError: If there are no clips, levels or sizes, or the folder holds clips of other arguments.
    """
    if count < 1 or not levels:
        raise UserError(f"count={count} of {len(levels)} levels is invalid: use at least one clip and one level")
    options: dict[str, Any] = {"seed": seed, "sizes": sizes, "fps": fps}
    scenes = [draw_kind(kind, index, level=levels[index % len(levels)], **options) for index in range(count)]
    kinds = list(levels) if kind == "levels" else [kind]
    recipe = {"seed": seed, "levels": kinds, "sizes": [list(size) for size in sizes], "fps": fps}
    entries = [ClipEntry(scene.caption, scene.size.t, functools.partial(_render_clip, scene)) for scene in scenes]
    names = write_clip_folder(folder, entries, recipe=recipe, progress=progress)
    documents = ({"file_name": name} | asdict(scene) for name, scene in zip(names, scenes, strict=True))
    files.write_text(folder / "scenes.jsonl", "".join(f"{json.dumps(each)}\n" for each in documents))
    for index, (name, scene) in enumerate(zip(names, scenes, strict=True)):
        if depth is not None and not (depth / name).exists():
            render(scene).depth_clip.save(depth / name)
            progress(index + 1, count)
        if actions is not None:
            path = actions / f"{name}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, get_actions(scene))
    return folder


def get_actions(scene: Scene) -> Float32[np.ndarray, "T 2"]:
    """Return the actions of a scene's frames, relative to a step; that of the first frame is none."""
    steps = np.reshape(scene.actions, (-1, 2)) / ACTION_PIXELS
    return np.concatenate([np.zeros((scene.size.t - len(steps), 2)), steps]).astype(np.float32)


def _render_clip(scene: Scene) -> Clip:
    return render(scene).clip


class ClipEntry(NamedTuple):
    """A clip that is rendered when its file is missing."""

    caption: str
    frames: int
    render: Callable[[], Clip]


def format_clip_name(index: int, *, frames: int) -> str:
    """Return the name of clip `index` in its folder: a video, or a picture for one frame."""
    return f"clips/{index:06d}.{'png' if frames == 1 else 'mp4'}"


def write_clip_folder(
    folder: Path,
    entries: Sequence[ClipEntry],
    *,
    recipe: dict[str, Any],
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> list[str]:
    """Write clips and `metadata.csv` (`file_name,text`) into a folder, and return the names of the clips.

    A clip whose file exists is not rendered again, and `metadata.csv` is written last, so that repeating an interrupted
    call completes it.

    Args:
      folder: The folder, which may hold a part of the same clips.
      entries: The clips.
      recipe: Values that the clips are a function of, as JSON; they are written to `recipe.json`.
      progress: Called with the numbers of written and of all clips after each.

    Raises:
      UserError: If the folder holds clips of another recipe.
    """
    path = folder / "recipe.json"
    if not path.exists():
        files.write_json(path, recipe)
    elif files.read_json(path) != recipe:
        raise UserError(f"{folder} holds clips of another seed or other sizes ({path.name}). Use another folder.")
    table, names = io.StringIO(), []
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(("file_name", "text"))
    for index, entry in enumerate(entries):
        names.append(format_clip_name(index, frames=entry.frames))
        if not (folder / names[-1]).exists():
            entry.render().save(folder / names[-1])
        writer.writerow((names[-1], entry.caption))
        progress(index + 1, len(entries))
    files.write_text(folder / "metadata.csv", table.getvalue())
    return names
