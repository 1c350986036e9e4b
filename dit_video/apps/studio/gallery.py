"""Files of a user: the gallery of finished clips, with their recipes and what they were made of, and the uploads."""

import hashlib
import json
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_video.apps.studio.uploads import ClipFit, StoredClip, Uploads, get_folder, make_id
from dit_video.core.errors import MissingError, UserError
from dit_video.core.files import write_json
from dit_video.video import Clip

MAX_ITEMS = 500
"""Maximum number of clips of a user."""
_ITEM = "item.json"
_INPUT = re.compile(r"[a-z_]{1,40}")


@dataclass(frozen=True)
class Gallery:
    """The finished clips in a user's folder."""

    folder: Path

    def check_room(self) -> None:
        """Check that the gallery has room.

        Raises:
          UserError: If it is full.
        """
        if self.folder.is_dir() and sum(1 for _ in self.folder.iterdir()) >= MAX_ITEMS:
            raise UserError(f"the gallery is full: it holds {MAX_ITEMS} clips. Delete some.")

    def add(self, clip: Clip, values: Mapping[str, Any], inputs: Mapping[str, Clip]) -> str:
        """Add a clip, and return the identifier of its item.

        Args:
          clip: The clip.
          values: What the page shows of it and fills the form with again, JSON values.
          inputs: Clips and images that it was made of, by the names of their fields.
        """
        item = make_id()
        folder = self.folder / item
        for name, source in inputs.items():
            StoredClip.write(folder / "inputs" / name, source)
        StoredClip.write(folder, clip)
        recipe = {"recipe": dict(clip.recipe), "created": time.time(), "inputs": sorted(inputs)}
        write_json(folder / _ITEM, {**values, **recipe})  # last: what has no such file is not listed
        return item

    def list_items(self) -> list[dict[str, Any]]:
        """Return the descriptions of all items for the page, the newest first."""
        names = [path.parent.name for path in self.folder.glob(f"*/{_ITEM}")]
        return sorted(map(self.describe, names), key=lambda item: item["created"], reverse=True)

    def describe(self, item: str) -> dict[str, Any]:
        """Return the description of an item for the page.

        Raises:
          MissingError: If there is no such item.
        """
        folder = get_folder(self.folder, item)
        values, clip = json.loads((folder / _ITEM).read_text(encoding="utf-8")), StoredClip(folder)
        frames, height, width = clip.size
        address = f"media/items/{item}"
        files = {name.partition(".")[2]: f"{address}/{name}" for name in clip.list_files()}
        inputs = [self._describe_input(folder, address, name) for name in values["inputs"]]
        size = {"frames": frames, "height": height, "width": width, "fps": clip.fps}
        return {**values, "id": item, **size, "files": files, "inputs": inputs}

    def open_clip(self, item: str) -> Clip:
        """Return the clip of an item.

        Raises:
          MissingError: If there is no such item.
        """
        return StoredClip(get_folder(self.folder, item)).read()

    def get_input(self, item: str, name: str) -> StoredClip:
        """Return a clip or image that an item was made of.

        Raises:
          MissingError: If there is no such item or input.
        """
        folder = get_folder(self.folder, item) / "inputs" / name
        if not _INPUT.fullmatch(name) or not folder.is_dir():
            raise MissingError("this clip was not made of such a file.")
        return StoredClip(folder)

    def delete(self, item: str) -> None:
        """Delete an item.

        Raises:
          MissingError: If there is no such item.
        """
        shutil.rmtree(get_folder(self.folder, item))

    def _describe_input(self, folder: Path, address: str, name: str) -> dict[str, str]:
        file = get_input_file(StoredClip(folder / "inputs" / name).size)
        return {"name": f"{name}.{file}", "url": f"{address}/inputs/{name}/clip.{file}"}


def get_input_file(size: Sequence[int]) -> str:
    """Return the suffix of the lossless file of an input of a size: frames, height, width."""
    return "png" if size[0] == 1 else "apng"


@dataclass(frozen=True)
class UserFiles:
    """The files of a user."""

    folder: Path
    fit: ClipFit

    @staticmethod
    def open(root: Path, user: str, fit: ClipFit) -> "UserFiles":
        """Return the files of the user with a cookie.

        Args:
          root: Folder of all users.
          user: Value of the cookie.
          fit: What the model can sample.
        """
        return UserFiles(root / hashlib.sha256(user.encode()).hexdigest()[:24], fit)

    @property
    def gallery(self) -> Gallery:
        """Return the finished clips."""
        return Gallery(self.folder / "items")

    @property
    def uploads(self) -> Uploads:
        """Return the uploads."""
        return Uploads(self.folder / "uploads", self.fit)

    def open_clip(self, reference: Mapping[str, Any]) -> Clip:
        """Return the clip of `{"upload": ID}`, or of `{"item": ID}` at a size that the model can sample.

        Raises:
          UserError: If this user has no such clip.
        """
        for kind, folder in (("upload", self.uploads), ("item", self.gallery)):
            if isinstance(name := reference.get(kind), str):
                return folder.open_clip(name)
        raise UserError("it must name an upload or a clip of the gallery.")

    def fit_image(self, image: Clip) -> Clip:
        """Return an image at a size that the model can sample."""
        return self.fit.fit_clip(image)
