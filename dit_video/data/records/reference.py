"""A clip's bytes by where they lie, until they are written into a data set."""

import hashlib
from typing import NamedTuple

from etils import epath

from dit_video.core.errors import UserError


class ChangedError(UserError):
    """A file is another one than when its clips were inspected.

    Args:
      path: the file.
      reason: what the system says, if it cannot be read at all.
    """

    def __init__(self, path: str, reason: str = ""):
        said = f" ({reason})" if reason else ""
        super().__init__(
            f"{path} has changed since it was inspected{said}; leave the source alone and start the command again"
        )
        self.path, self.reason = path, reason


class Reference(NamedTuple):
    """Where the bytes of a clip lie, and their SHA-256."""

    path: str
    offset: int | None
    """in a tar; None for a file of its own"""
    size: int
    sha256: str

    def read(self) -> bytes:
        """The bytes.

        Raises:
          ChangedError: they can't be read any more, or are others.
        """
        try:
            with epath.Path(self.path).open("rb") as file:
                if self.offset is not None:
                    file.seek(self.offset)
                found = file.read(self.size + (self.offset is None))
        except OSError as error:
            raise ChangedError(self.path, error.strerror or str(error)) from error
        if len(found) != self.size or hashlib.sha256(found).hexdigest() != self.sha256:
            raise ChangedError(self.path)
        return found
