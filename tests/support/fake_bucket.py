"""A bucket in memory, which counts what is read of it."""

from collections import Counter
from typing import ClassVar

from fsspec.implementations.memory import MemoryFileSystem


class CountingBucket(MemoryFileSystem):
    """A file system in which `gs://bucket/x` and `s3://bucket/x` are `bucket/x`, as in gcsfs and s3fs."""

    protocol = ("gs", "gcs", "s3")
    root_marker = ""
    store = {}  # noqa: RUF012  # fsspec's
    pseudo_dirs = [""]  # noqa: RUF012
    calls: ClassVar[Counter[str]] = Counter()
    """Bytes that were read, and calls by name."""

    @classmethod
    def _strip_protocol(cls, path):
        for protocol in cls.protocol:
            path = str(path).removeprefix(f"{protocol}://")
        return path.strip("/")

    def find(self, path, **options):
        self.calls["find"] += 1
        return super().find(path, **options)

    def cat_file(self, path, start=None, end=None, **options):
        content = super().cat_file(path, start, end, **options)
        self.calls["bytes"] += len(content)
        return content
