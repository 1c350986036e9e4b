"""Read a file at an address whose service fails; the argument is the number of the system's error."""

import os
import sys

from fsspec.implementations.memory import MemoryFileSystem

from dit_video.core import storage
from dit_video.core.errors import script
from dit_video.core.storage import read_range, to_storage_path, write_text

storage.RETRY_SECONDS = (0.0,)


def fail(*_, **__):
    """Raise the error."""
    raise OSError(int(sys.argv[1]), os.strerror(int(sys.argv[1])))


@script
def main() -> None:
    """Write the file, and read it."""
    write_text(to_storage_path("memory://bucket/x"), "text")
    MemoryFileSystem.cat_file = fail
    read_range("memory://bucket/x")


main()
