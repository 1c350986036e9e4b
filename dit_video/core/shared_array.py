"""Arrays that the processes of one machine share: they are pickled as file paths, and other processes map the files."""

import functools
import hashlib
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from dit_video.core.files import atomic_path

MIN_SHARED_BYTES = 1 << 12
"""Size in bytes below which an array is pickled with its values."""


@functools.cache
def _make_folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="dit_video_", ignore_cleanup_errors=True)


def get_shared_folder() -> Path:
    """Return this process's folder for files that it shares with its workers; it is removed when the process exits."""
    return Path(_make_folder().name)


class SharedArray(NamedTuple):
    """An array that is pickled as the path of a file, named by the hash of its content, and unpickled as a map."""

    values: np.ndarray

    def __reduce__(self) -> tuple[Any, ...]:
        values = np.ascontiguousarray(self.values)
        content = hashlib.sha256(f"{values.dtype.str} {values.shape}".encode())
        content.update(values.data)
        path = get_shared_folder() / f"{content.hexdigest()}.npy"
        if not path.exists():
            save_array(path, values)
        return map_array, (os.fspath(path),)


class SharesArrays:
    """A base of objects whose large arrays are pickled as paths: each process maps the same memory."""

    def __getstate__(self) -> dict[str, Any]:
        large = {
            name: SharedArray(value)
            for name, value in vars(self).items()
            if isinstance(value, np.ndarray) and value.nbytes >= MIN_SHARED_BYTES
        }
        return vars(self) | large

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Unpickled values are already arrays; values from `copy.copy` are not.
        arrays = {name: value.values for name, value in state.items() if isinstance(value, SharedArray)}
        vars(self).update({**state, **arrays})


class SharedStrings(SharesArrays, Sequence[str]):
    """A sequence of strings that is pickled as the path of a file."""

    def __init__(self, strings: Iterable[str]):
        encoded = [string.encode("utf-8", "surrogatepass") for string in strings]
        self.content: UInt8[np.ndarray, " b"] = np.frombuffer(b"".join(encoded), np.uint8)
        self.offsets: Int[np.ndarray, " n1"] = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        """Start of every string in `content`, then the end."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        part = self.content[self.offsets[number] : self.offsets[number + 1]]
        return part.tobytes().decode("utf-8", "surrogatepass")


def save_array(path: Path, values: np.ndarray) -> None:
    """Write an array to a file, which is never incomplete."""
    with atomic_path(path) as temporary:
        np.save(temporary, values, allow_pickle=False)


def map_array(path: str | os.PathLike) -> np.ndarray:
    """Return a file's array as a map, whose pages are read when they are used and shared by all processes."""
    return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
