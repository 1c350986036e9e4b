"""References to the bytes of clips in their original files, used until they are written into a data set."""

import hashlib
from typing import NamedTuple

from etils import epath

from dit_video.core.errors import UserError

MAX_EXAMPLE_BYTES = (1 << 31) - (1 << 20)
"""Maximum size of a clip: an example is one protocol buffer, which holds less than 2 GiB."""


class ChangedError(UserError):
    """An error for a file that has changed since its clips were inspected.

    Args:
      path: path of the file.
      reason: error message of the operating system, if the file cannot be read at all.
    """

    def __init__(self, path: str, reason: str = ""):
        suffix = f" ({reason})" if reason else ""
        super().__init__(f"{path} has changed since it was inspected{suffix}. Start again; do not modify the source.")
        self.path, self.reason = path, reason


class ClipReference(NamedTuple):
    """A reference to the bytes of a clip, with their SHA-256 hash."""

    path: str
    offset: int | None
    """Offset of the bytes in a tar archive; None if the clip is a file of its own."""
    size: int
    sha256: str

    def read(self) -> bytes:
        """Return the bytes.

        Raises:
          ChangedError: the bytes cannot be read any more, or have changed.
        """
        try:
            with epath.Path(self.path).open("rb") as file:
                if self.offset is not None:
                    file.seek(self.offset)
                content = file.read(self.size + (self.offset is None))
        except OSError as error:
            raise ChangedError(self.path, error.strerror or str(error)) from error
        if len(content) != self.size or hashlib.sha256(content).hexdigest() != self.sha256:
            raise ChangedError(self.path)
        return content
