"""A clip in a folder: its exact frames, and the files that browsers ask for, made when they first do."""

import functools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dit_video.core.errors import MissingError
from dit_video.core.files import atomic_path, write_json
from dit_video.video import Clip

FILES = {
    "clip.mp4": "video/mp4",
    "clip.webm": "video/webm",
    "clip.gif": "image/gif",
    "clip.apng": "image/apng",
    "clip.png": "image/png",
}
"""Names of the files of a clip, and their media types; the PNG is its first frame."""
_FRAMES, _CLIP = "frames.npy", "clip.json"


@dataclass(frozen=True)
class StoredClip:
    """A clip in a folder."""

    folder: Path

    @staticmethod
    def write(folder: Path, clip: Clip) -> "StoredClip":
        """Write a clip's frames and recipe to a folder, and return it."""
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(folder / _FRAMES) as temporary, temporary.open("wb") as file:
            np.save(file, clip.frames)
        values = {"fps": clip.fps, "caption": clip.caption, "recipe": dict(clip.recipe)}
        write_json(folder / _CLIP, values | {"size": list(clip.frames.shape[:3])})
        return StoredClip(folder)

    def read(self) -> Clip:
        """Return the clip.

        Raises:
          MissingError: its files are gone.
        """
        try:
            frames, values = np.load(self.folder / _FRAMES, allow_pickle=False), self._values
        except (OSError, ValueError) as error:
            raise MissingError("this clip has been deleted. Use another one.") from error
        return Clip(frames, fps=values["fps"], caption=values["caption"], recipe=values["recipe"])

    @property
    def size(self) -> tuple[int, int, int]:
        """Return the number of frames, the height and the width."""
        frames, height, width = self._values["size"]
        return frames, height, width

    @property
    def fps(self) -> float:
        """Return the frame rate."""
        return float(self._values["fps"])

    def list_files(self) -> tuple[str, ...]:
        """Return the names of the files that the clip can be written to: H.264 needs even sizes."""
        frames, height, width = self.size
        if frames == 1:
            return ("clip.png",)
        is_even = height % 2 == 0 and width % 2 == 0
        return tuple(name for name in FILES if is_even or name != "clip.mp4")

    def make_file(self, name: str) -> Path:
        """Return a file of the clip, written now if it is not there.

        Raises:
          MissingError: the clip has no such file.
        """
        if name not in self.list_files():
            raise MissingError(f"{name} does not exist for this clip. Use {', '.join(self.list_files())}.")
        path = self.folder / name
        if not path.is_file():
            clip = self.read()
            (replace(clip, frames=clip.frames[:1]) if name == "clip.png" else clip).save(path)
        return path

    @functools.cached_property
    def _values(self) -> dict[str, Any]:
        return json.loads((self.folder / _CLIP).read_text(encoding="utf-8"))
