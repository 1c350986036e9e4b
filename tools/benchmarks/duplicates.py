"""Recall and precision of near-duplicates on rendered clips whose copies are known.

Of every scene there is one clip. Of some there are copies: trimmed by a fifth at either end, mirrored, re-encoded with
fewer pixels at low quality, or all of that. Others have a second take: the same objects start and move otherwise.
"""

import dataclasses
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from dit_video.core.resize import resize
from dit_video.curation.annotator import ClipFile
from dit_video.curation.clip_scores import ClipScores
from dit_video.curation.near_duplicates import Duplicates
from dit_video.data.clips import ClipInfo
from dit_video.scenes import Scene, draw_scene, render
from dit_video.tokens import Grid
from dit_video.video import Clip, encode

_SIZES = (Grid(25, 64, 64), Grid(25, 64, 96), Grid(25, 96, 64))
_CRF, _LOW_CRF = 18, 32


class KnownClip(NamedTuple):
    """An encoded clip and what it is a copy of."""

    clip: ClipFile
    original: int
    """Number of the first clip of its source, which is its own number if it is no copy."""
    edit: str


def _trim_start(clip: Clip) -> Clip:
    return Clip(frames=clip.frames[len(clip.frames) // 5 :], fps=clip.fps)


def _trim_end(clip: Clip) -> Clip:
    return Clip(frames=clip.frames[: -(len(clip.frames) // 5)], fps=clip.fps)


def _mirror(clip: Clip) -> Clip:
    return Clip(frames=np.ascontiguousarray(clip.frames[:, :, ::-1]), fps=clip.fps)


def _shrink(clip: Clip) -> Clip:
    height, width = (side * 3 // 8 * 2 for side in clip.frames.shape[1:3])
    return Clip(frames=resize(clip.frames, height, width), fps=clip.fps)


EDITS: dict[str, tuple[Callable[[Clip], Clip], int]] = {
    "first fifth cut": (_trim_start, _CRF),
    "last fifth cut": (_trim_end, _CRF),
    "mirrored": (_mirror, _CRF),
    "re-encoded": (_shrink, _LOW_CRF),
    "all": (lambda clip: _shrink(_mirror(_trim_start(clip))), _LOW_CRF),
}
"""Edits of a clip, each with the quality at which its result is encoded."""


def make_known_clips(scenes: int, *, seed: int = 0) -> list[KnownClip]:
    """Return the clips of scenes, every second one with a copy of each edit, the others with a second take."""
    known: list[KnownClip] = []
    for index in range(scenes):
        scene = draw_scene(index, seed=seed, level=1 + index % 3, sizes=_SIZES)
        clip, original = render(scene).clip, len(known)
        known.append(KnownClip(_encode(clip, _CRF, len(known)), original, "original"))
        if index % 2:
            take = render(_draw_second_take(scene, index, seed)).clip
            known.append(KnownClip(_encode(take, _CRF, len(known)), len(known), "second take"))
            continue
        for name, (edit, crf) in EDITS.items():
            known.append(KnownClip(_encode(edit(clip), crf, len(known)), original, name))
    return known


def measure(folder: Path, *, scenes: int = 200) -> dict[str, Any]:
    """Return recall by edit, precision, and the share of second takes that are kept, with and without thumbnails.

    Args:
      folder: CLIP of `tools/train_scene_clip.py`.
      scenes: Number of scenes.
    """
    known, annotator = make_known_clips(scenes), ClipScores(folder=str(folder))
    rows = [annotator.annotate(each.clip) for each in known]
    types = {name: column.type for name, column in annotator.columns.items()}
    columns = {
        name: pa.chunked_array([pa.array([row[name] for row in rows], types[name])])
        for name in ("embedding", "thumbnails")
    }
    duplicates = Duplicates()
    return {
        "clips": len(known),
        "default": count(known, columns, duplicates),
        "embeddings alone": count(known, columns, dataclasses.replace(duplicates, min_match=0.0)),
    }


def measure_trained() -> dict[str, Any]:
    """Return `measure` with a CLIP of `tools/train_scene_clip.py`, which is trained first, in ten minutes."""
    with tempfile.TemporaryDirectory(prefix="dit-video-benchmark-") as folder:
        command = [sys.executable, str(Path(__file__).parents[1] / "train_scene_clip.py"), folder]
        subprocess.run(command, check=True, stdout=sys.stderr)
        return measure(Path(folder))


def count(known: list[KnownClip], columns: dict[str, pa.ChunkedArray], duplicates: Duplicates) -> dict[str, Any]:
    """Return the figures of near-duplicates by these columns and settings."""
    names = [each.clip.info.name for each in known]
    matches = duplicates.annotate_table(names, columns)["near_duplicate_of"]
    originals = np.array([-1 if match is None else names.index(match) for match in matches])
    is_copy = np.array([each.original != number for number, each in enumerate(known)])
    # A copy of a copy is one of the original, too.
    is_right = np.array(
        [match >= 0 and known[match].original == each.original for each, match in zip(known, originals, strict=True)]
    )
    edits = np.array([each.edit for each in known])
    return {
        "threshold": duplicates.threshold,
        "min_match": duplicates.min_match,
        "recall": float(is_right[is_copy].mean(axis=0)),
        "precision": float(is_right[originals >= 0].mean(axis=0)) if (originals >= 0).any() else 1.0,
        "second takes kept": float((originals[edits == "second take"] < 0).mean(axis=0)),
        "recall by edit": {name: float(is_right[edits == name].mean(axis=0)) for name in EDITS},
    }


def _draw_second_take(scene: Scene, index: int, seed: int) -> Scene:
    """Return a scene with the same objects in other places, with other motion."""
    for attempt in range(1000):
        other = draw_scene(index + 1000 * (attempt + 1), seed=seed, level=scene.level, sizes=(scene.size,))
        if len(other.objects) == len(scene.objects):
            objects = tuple(
                dataclasses.replace(each, start=moved.start, velocity=moved.velocity, spin=moved.spin)
                for each, moved in zip(scene.objects, other.objects, strict=True)
            )
            return dataclasses.replace(scene, objects=objects)
    raise AssertionError("no scene has as many objects")


def _encode(clip: Clip, crf: int, number: int) -> ClipFile:
    frames, fps = len(clip.frames), float(clip.fps)
    seconds, name = (frames - 1) / fps, f"{number:06d}.mp4"
    info = ClipInfo(name, (), clip.height, clip.width, frames=frames, fps=fps, seconds=seconds)
    return ClipFile(info, encode(clip, "mp4", crf=crf))
