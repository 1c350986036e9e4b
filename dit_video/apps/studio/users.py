"""The files of one user: uploads and gallery, in a folder whose name does not tell the user's cookie."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_video.apps.studio.clip_fit import ClipFit
from dit_video.apps.studio.gallery import Gallery
from dit_video.apps.studio.uploads import Uploads
from dit_video.core.errors import UserError
from dit_video.video import Clip


@dataclass(frozen=True)
class UserFiles:
    """The files of a user."""

    folder: Path
    fit: ClipFit

    @staticmethod
    def open(root: Path, user: str, fit: ClipFit) -> "UserFiles":
        """Return the files of the user with a cookie.

        Args:
          root: folder of all users.
          user: value of the cookie.
          fit: what the model can sample.
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
          UserError: there is none of this user.
        """
        for kind, folder in (("upload", self.uploads), ("item", self.gallery)):
            if isinstance(name := reference.get(kind), str):
                return folder.open_clip(name)
        raise UserError("it must name an upload or a clip of the gallery.")

    def fit_image(self, image: Clip) -> Clip:
        """Return an image at a size that the model can sample."""
        return self.fit.fit_clip(image)
