"""Caches of text embeddings: the most recently used ones in memory, all of them on disk."""

import hashlib
import os
import threading
import warnings
from collections import OrderedDict
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from dit_video.core.files import atomic_path


class MemoryCache:
    """A cache of the most recently used embeddings, up to a number of bytes. Threads may share it."""

    def __init__(self, max_bytes: int):
        """Create a cache of up to `max_bytes`; an embedding that alone is larger is not kept."""
        self._max_bytes, self._used_bytes = max_bytes, 0
        self._values: OrderedDict[str, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, text: str) -> Float32[np.ndarray, "s e"] | None:
        """Return the embedding, or None."""
        with self._lock:
            value = self._values.get(text)
            if value is not None:
                self._values.move_to_end(text)
            return value

    def put(self, text: str, value: Float32[np.ndarray, "s e"]) -> None:
        """Store an embedding, and drop the least recently used ones over the limit."""
        if value.nbytes > self._max_bytes:
            return
        with self._lock:
            if (previous := self._values.pop(text, None)) is not None:
                self._used_bytes -= previous.nbytes
            self._values[text] = value
            self._used_bytes += value.nbytes
            while self._used_bytes > self._max_bytes:
                self._used_bytes -= self._values.popitem(last=False)[1].nbytes


class FolderCache:
    """A cache with one `.npy` file per text, named by the text's hash, in one folder per encoder.

    Processes may share a folder: files are written atomically, and two processes write the same content to a file.
    """

    def __init__(self, folder: str | os.PathLike, *, identity: str, width: int):
        self._folder, self._width = Path(folder) / identity, width

    def get_path(self, text: str) -> Path:
        """Return the file of a text. There are 256 folders, as some file systems are slow with millions of files."""
        name = hashlib.sha256(text.encode()).hexdigest()
        return self._folder / name[:2] / f"{name}.npy"

    def get(self, text: str) -> Float32[np.ndarray, "s e"] | None:
        """Return the embedding, or None; a damaged file gives a warning and counts as absent."""
        path = self.get_path(text)
        try:
            value = np.load(path, allow_pickle=False)
            if value.dtype != np.float32 or value.ndim != 2 or value.shape[1] != self._width:
                raise ValueError(f"{value.dtype} {list(value.shape)} instead of float32 [s, {self._width}]")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, EOFError) as error:
            warnings.warn(f"can't read {path} ({error}); the text is embedded again", stacklevel=2)
            return None
        return value

    def put(self, text: str, value: Float32[np.ndarray, "s e"]) -> None:
        """Write an embedding, atomically.

        Raises:
          UserError: the folder cannot be written.
        """
        with atomic_path(self.get_path(text)) as temporary:
            np.save(temporary, value, allow_pickle=False)
