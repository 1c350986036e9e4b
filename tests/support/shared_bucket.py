"""A bucket that several processes share: a folder of this machine, addressed as `gs://`."""

import os
import shutil
import tempfile
from pathlib import Path

from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import register_implementation

VARIABLE = "DIT_VIDEO_TEST_BUCKET"
"""Environment variable of the folder."""


class SharedBucket(DirFileSystem):
    """A file system in which `gs://bucket/x` is `bucket/x` in the folder; a file appears when it is complete."""

    protocol = ("gs", "gcs")
    sep = "/"
    cachable = False

    def __init__(self, **_):
        super().__init__(path=os.environ[VARIABLE], fs=LocalFileSystem(auto_mkdir=True))

    @classmethod
    def _strip_protocol(cls, path):
        return str(path).removeprefix("gs://").removeprefix("gcs://").strip("/")

    def put_file(self, lpath, rpath, **_):
        """Copy a local file to the bucket."""
        target = Path(self._join(rpath))
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=os.environ[VARIABLE], delete=False) as file:
            file.write(Path(lpath).read_bytes())
        shutil.move(file.name, target)

    def pipe_file(self, path, value, **_):
        """Write bytes to the bucket."""
        with tempfile.NamedTemporaryFile() as file:
            Path(file.name).write_bytes(value)
            self.put_file(file.name, path)


def register() -> None:
    """Open addresses of `gs://` as the shared bucket in this process."""
    for name in SharedBucket.protocol:
        register_implementation(name, SharedBucket, clobber=True)
