"""Cached latents: what an autoencoder made of the clips, stamped with that autoencoder's identity."""

import hashlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import ml_dtypes
import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Float32

from dit_video.data import builder
from dit_video.errors import MissingError, UserError
from dit_video.files import atomic_path, read_json, write_json
from dit_video.tokens import Grid

INDEX = "latents.json"
VERSION = 1
Identity = str | Mapping[str, Any]
"""What makes latents comparable: the autoencoder's weights, the sizes, whatever else they depend on (JSON)."""
Storage = Literal["bfloat16", "float32"]
_DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}


class LatentExample(NamedTuple):
    """One clip, encoded."""

    name: str
    caption: str
    latents: Float32[np.ndarray, "t h w c"]
    """normalised per channel"""


def identity_hash(identity: Identity) -> str:
    """Equal for equal identities, whatever the order of their keys."""
    text = identity if isinstance(identity, str) else json.dumps(identity, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_latents(
    destination: str | os.PathLike,
    examples: Iterable[LatentExample],
    *,
    identity: Identity,
    dtype: Storage = "bfloat16",
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write the data set `destination`, whole or not at all. Latents that are there are replaced.

    Args:
      destination: the folder.
      examples: read once, one at a time, in order.
      identity: of the autoencoder; `LatentSource` asks for it again.
      dtype: how values are stored; they are read as float32.
      progress: called with the number of examples done.

    Raises:
      UserError: no examples; latents that are empty, not finite, or of another number of channels than those before
        them; a destination that holds something else than latents.
    """
    destination = Path(destination)
    if destination.exists() and not (destination / INDEX).is_file() and not _is_empty(destination):
        raise UserError(f"{destination} exists and holds no latents; name a folder that does not exist")
    examples = iter(examples)
    first = next(examples, None)
    if first is None:
        raise UserError(f"no latents to write to {destination}; encode at least one clip")
    channels = int(first.latents.shape[-1])
    columns: dict[str, list] = {"name": [], "caption": [], "size": []}

    def shard() -> Iterator[dict[str, Any]]:
        for done, example in enumerate(itertools.chain([first], examples), 1):
            size = _checked_size(example, channels)
            for column, value in (("name", example.name), ("caption", example.caption), ("size", list(size))):
                columns[column].append(value)
            stored = np.ascontiguousarray(example.latents.astype(_DTYPES[dtype]))
            yield {
                "latents": _little_endian(stored).tobytes(),
                "shape": np.asarray(example.latents.shape, np.int32),
                "name": example.name,
                "caption": example.caption,
            }
            if progress is not None:
                progress(done)

    features = {
        "latents": builder.content(),
        "shape": tfds.features.Tensor(shape=(4,), dtype=np.int32),
        "name": tfds.features.Text(),
        "caption": tfds.features.Text(),
    }
    index = {
        "version": VERSION,
        "identity": identity if isinstance(identity, str) else dict(identity),
        "hash": identity_hash(identity),
        "dtype": dtype,
        "channels": channels,
        "examples": columns,
    }
    with atomic_path(destination) as folder:
        builder.write_records(folder, builder.Latents, features=features, shards=[shard])
        write_json(folder / INDEX, index)


class LatentSource:
    """Random access to cached latents.

    The files are opened at the first read, in each process anew: a source can be pickled to workers.

    Args:
      folder: what `write_latents` made.
      identity: of the autoencoder that the latents must be of; None takes any.

    Raises:
      MissingError: no such folder.
      UserError: the folder holds no latents of this version, or those of another autoencoder.
    """

    def __init__(self, folder: str | os.PathLike, *, identity: Identity | None = None):
        self.folder = Path(folder)
        index = _read_index(self.folder)
        if identity is not None and index["hash"] != identity_hash(identity):
            raise UserError(
                f"{self.folder} holds latents of autoencoder {_named(index['identity'])}, "
                f"{_named(identity)} was asked for; encode the clips again"
            )
        self.identity: Identity = index["identity"]
        self.hash: str = index["hash"]
        self.channels: int = index["channels"]
        self.names: tuple[str, ...] = tuple(index["examples"]["name"])
        self.captions: tuple[str, ...] = tuple(index["examples"]["caption"])
        self.sizes: tuple[Grid, ...] = tuple(Grid(*size) for size in index["examples"]["size"])
        """of the latents: latent frames, rows, columns"""
        self._dtype = _DTYPES[index["dtype"]]
        self._records: Sequence[dict[str, Any]] | None = None

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> Float32[np.ndarray, "t h w c"]:
        """The latents of one clip."""
        if self._records is None:
            self._records = builder.open_records(self.folder)
        values = _little_endian(np.frombuffer(self._records[index]["latents"], self._dtype))
        return values.astype(np.float32).reshape(*self.sizes[index], self.channels)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_records": None}


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _checked_size(example: LatentExample, channels: int) -> Grid:
    shape = example.latents.shape
    if len(shape) != 4 or 0 in shape or shape[-1] != channels:
        raise UserError(f"latents of {example.name} have the shape {list(shape)}, all must be [t h w {channels}]")
    if not np.isfinite(example.latents).all():
        raise UserError(f"latents of {example.name} are not finite; the autoencoder that made them is broken")
    return Grid(*shape[:3])


def _little_endian(values: np.ndarray) -> np.ndarray:
    """Files are little-endian; the exchange is its own inverse."""
    return values if sys.byteorder == "little" else values.byteswap()


def _named(identity: Identity) -> str:
    digest = identity_hash(identity)
    text = identity if isinstance(identity, str) else json.dumps(identity, sort_keys=True)
    return text if len(text) <= 64 else f"{text[:48]}… ({digest})"


def _read_index(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise MissingError(f"no such folder of latents: {folder}")
    if not (folder / INDEX).is_file():
        raise UserError(f"{folder} holds no latents, it has no {INDEX}; encode clips first")
    index = read_json(folder / INDEX)
    if not isinstance(index, dict) or index.get("version") != VERSION:
        raise UserError(f"{folder / INDEX} is not of version {VERSION}; encode the clips again")
    return index
