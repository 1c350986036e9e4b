"""Uploaded images and clips of a user."""

import json
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dit_video.apps.studio.clip_fit import ClipFit
from dit_video.apps.studio.stored_clip import StoredClip
from dit_video.core.errors import MissingError, UserError
from dit_video.core.files import write_json
from dit_video.video import Clip

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
      MissingError: there is none, or the name is another text, such as a path.
    """
    folder = parent / name
    if not _ID.fullmatch(name) or not folder.is_dir():
        raise MissingError("this clip does not exist, or has been deleted. Use another one.")
    return folder


async def save_stream(stream: AsyncIterator[bytes], path: Path, *, max_bytes: int) -> None:
    """Write the bytes of a request to a file.

    Raises:
      TooLargeError: there are more than `max_bytes`.
    """
    total = 0
    with path.open("wb") as file:
        async for part in stream:
            total += len(part)
            if total > max_bytes:
                raise TooLargeError(f"the file is larger than {format_bytes(max_bytes)}. Use a smaller or shorter one.")
            file.write(part)


def format_bytes(count: int) -> str:
    """Return a number of bytes as `200 MiB`."""
    return f"{count / 2**20:.4g} MiB"


@dataclass(frozen=True)
class Uploads:
    """The uploads in a user's folder."""

    folder: Path
    fit: ClipFit

    def add(self, source: Path, name: str, kind: str) -> dict[str, Any]:
        """Decode an uploaded file, keep the frames that the model can sample, and return its description.

        Args:
          source: the file.
          name: its name on the user's machine, for the page.
          kind: `clip`, or `image` for the first frame alone.

        Raises:
          UserError: a file that is not a readable image or video, or too large.
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
        StoredClip.write(self.folder / upload, Clip(frames, fps=fps))
        write_json(self.folder / upload / _INFO, {"name": name[:200], "kind": kind, **answer})
        return self.describe(upload)

    def describe(self, upload: str) -> dict[str, Any]:
        """Return the description of an upload for the page.

        Raises:
          MissingError: there is no such upload.
        """
        folder = get_folder(self.folder, upload)
        info, clip = json.loads((folder / _INFO).read_text(encoding="utf-8")), StoredClip(folder)
        used = dict(zip(("frames", "height", "width"), clip.size, strict=True))
        files = {name.partition(".")[2]: f"/media/uploads/{upload}/{name}" for name in clip.list_files()}
        described = {"upload": upload, "note": _make_note(info, used), "used": used, "files": files}
        return info | described

    def open_clip(self, upload: str) -> Clip:
        """Return the clip of an upload.

        Raises:
          MissingError: there is no such upload.
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
