"""Uploaded images and clips of a user: how they are fitted to what a model can sample, and stored."""

import functools
import json
import math
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dit_video.core.errors import MissingError, UserError
from dit_video.core.files import atomic_path, write_json
from dit_video.core.resize import compute_fitted_size, resize_and_crop
from dit_video.video import Clip

MAX_IMAGE_SIDE = 1280
"""Maximum pixels of a side of an uploaded image, which every task fits to the size of its clip."""


@dataclass(frozen=True, kw_only=True)
class ClipFit:
    """The rate, length and sizes of uploaded clips that a model can sample."""

    fps: float
    max_frames: int
    """Number of frames that are used of a longer clip."""
    stride: int
    """Temporal stride: clips have `1 + k * stride` frames."""
    multiple: tuple[int, int]
    """Numbers that height and width are multiples of."""
    area: int
    """Number of pixels of a frame, about."""
    planes: tuple[tuple[int, int], ...]
    """Heights and widths that are preferred."""

    def to_json(self) -> dict[str, Any]:
        """Return the values as JSON."""
        return asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> "ClipFit":
        """Return the fit of `to_json`."""
        planes = tuple((height, width) for height, width in values["planes"])
        return ClipFit(**(values | {"planes": planes, "multiple": tuple(values["multiple"])}))

    def choose_plane(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width for frames of another size.

        Frames that the model can sample keep their size. Others get the size with the nearest aspect ratio, among the
        preferred ones and the multiples with about the model's number of pixels.
        """
        is_multiple = height % self.multiple[0] == 0 and width % self.multiple[1] == 0
        if is_multiple and height * width <= 1.5 * self.area:
            return height, width
        candidates = [*self.planes, compute_fitted_size(height, width, area=self.area, multiple=self.multiple)]
        return min(candidates, key=lambda plane: abs(math.log(plane[0] * width / (plane[1] * height))))

    def round_length(self, frames: int) -> int:
        """Return the number of frames that are used of a clip."""
        used = min(frames, self.max_frames)
        return 1 + (used - 1) // self.stride * self.stride

    def fit_clip(self, clip: Clip) -> Clip:
        """Return a clip at a size that the model can sample; its frame rate stays."""
        frames = clip.frames[: self.round_length(len(clip.frames))]
        plane = self.choose_plane(clip.height, clip.width)
        return Clip(resize_and_crop(frames, *plane), fps=clip.fps, caption=clip.caption, recipe=clip.recipe)


def limit_side(height: int, width: int) -> tuple[int, int]:
    """Return the height and width of an uploaded image, reduced to at most `MAX_IMAGE_SIDE`."""
    scale = min(1.0, MAX_IMAGE_SIDE / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


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
          MissingError: If its files are gone.
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
          MissingError: If the clip has no such file.
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


MAX_UPLOADS = 50
"""Maximum number of uploads of a user; a new one takes the place of the oldest."""
DECODE_SECONDS = 120
"""Seconds after which decoding of an upload ends."""
_INFO = "upload.json"
_ID = re.compile(r"[0-9a-f]{16}")


class TooLargeError(UserError):
    """An upload of more bytes than the server accepts."""


def make_id() -> str:
    """Return a new random name of a folder."""
    return secrets.token_hex(8)


def get_folder(parent: Path, name: str) -> Path:
    """Return the folder of a name that `make_id` returned.

    Raises:
      MissingError: If there is none, or the name is another text, such as a path.
    """
    folder = parent / name
    if not _ID.fullmatch(name) or not folder.is_dir():
        raise MissingError("this clip does not exist, or has been deleted. Use another one.")
    return folder


@dataclass(frozen=True)
class Uploads:
    """The uploads in a user's folder."""

    folder: Path
    fit: ClipFit

    def add(self, source: Path, name: str, kind: str) -> dict[str, Any]:
        """Decode an uploaded file, keep the frames that the model can sample, and return its description.

        Args:
          source: The file.
          name: Its name on the user's machine, for the page.
          kind: `clip`, or `image` for the first frame alone.

        Raises:
          UserError: If the file is no readable image or video, or is too large.
        """
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / "frames.npy"
            answer = _run_decoder(source, out, kind, self.fit)
            if (error := answer.get("error")) is not None:
                raise UserError(error.replace(str(source), name))
            frames = np.load(out, allow_pickle=False)
        self._drop_oldest()
        upload = make_id()
        fps = 1.0 if answer["fps"] is None else self.fit.fps
        StoredClip.write(self.folder / upload, Clip(frames, fps=fps, caption=answer["caption"]))
        write_json(self.folder / upload / _INFO, {"name": name[:200], "kind": kind, **answer})
        return self.describe(upload)

    def describe(self, upload: str) -> dict[str, Any]:
        """Return the description of an upload for the page.

        Raises:
          MissingError: If there is no such upload.
        """
        folder = get_folder(self.folder, upload)
        info, clip = json.loads((folder / _INFO).read_text(encoding="utf-8")), StoredClip(folder)
        used = dict(zip(("frames", "height", "width"), clip.size, strict=True))
        files = {name.partition(".")[2]: f"media/uploads/{upload}/{name}" for name in clip.list_files()}
        described = {"upload": upload, "note": _make_note(info, used), "used": used, "files": files}
        return info | described

    def open_clip(self, upload: str) -> Clip:
        """Return the clip of an upload.

        Raises:
          MissingError: If there is no such upload.
        """
        return StoredClip(get_folder(self.folder, upload)).read()

    def _drop_oldest(self) -> None:
        """Delete the oldest uploads where there are too many; jobs hold the frames that they were sent with."""
        folders = sorted(self.folder.glob("*"), key=lambda path: path.stat().st_mtime) if self.folder.is_dir() else []
        for folder in folders[: max(0, len(folders) + 1 - MAX_UPLOADS)]:
            shutil.rmtree(folder, ignore_errors=True)


def _run_decoder(source: Path, out: Path, kind: str, fit: ClipFit) -> dict[str, Any]:
    """Return the answer of `upload_decoder`, which runs in a process of its own."""
    arguments = [str(source), str(out), kind, json.dumps(fit.to_json())]
    command = [sys.executable, "-m", "dit_video.apps.studio.upload_decoder", *arguments]
    try:
        result = subprocess.run(command, capture_output=True, timeout=DECODE_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"the file took longer than {DECODE_SECONDS} s to decode. Use a shorter or smaller one."}
    try:
        return json.loads(result.stdout)
    except ValueError:  # the decoder was ended by the file
        return {"error": "the file is damaged: its decoder ended. Remove it or replace it."}


def _make_note(info: dict[str, Any], used: dict[str, int]) -> str:
    """Return a sentence about what of the file is used; empty if all of it is."""
    if (info["width"], info["height"]) == (used["width"], used["height"]) and info["fps"] is None:
        return ""
    size = f"{used['width']}×{used['height']}"
    if info["kind"] == "image":
        return f"{info['width']}×{info['height']} pixels, used at {size}"
    native = f"{info['width']}×{info['height']}" + ("" if info["fps"] is None else f" at {info['fps']:.4g} fps")
    count = used["frames"]
    return f"{native}; used: {count} frame{'' if count == 1 else 's'} of {size}"
