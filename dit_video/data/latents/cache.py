"""Cached latents (and caption embeddings) of clips, with the identity of the encoders that computed them.

latents.json              the index: names, captions, sizes, skipped clips and the reasons; it is written last
plan.json                 identity and options of the encoding, so that only the same encoding is continued
shards/00000.json         the index of one file
latents-train.array_record-00000-of-00008, …    and TFDS's dataset_info.json, features.json
"""

import hashlib
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Float32

from dit_video.core.errors import DecodeError, MissingError, UserError
from dit_video.core.storage import StoragePath, StoragePathLike, is_remote, read_document, to_storage_path
from dit_video.data.records import shards
from dit_video.tokens import Field, Grid

DATASET_NAME = "latents"
INDEX, PLAN = "latents.json", "plan.json"
VERSION = 2
Identity = str | Mapping[str, Any]
"""Identity of latents, as JSON values: the autoencoder's weights, the sizes, and all else that latents depend on. The
parts of a mapping are compared one by one, e.g. `autoencoder`, `text` (the encoder of cached embeddings), `image`."""
StorageDtype = Literal["bfloat16", "float32"]
DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}


class LatentExample(NamedTuple):
    """An encoded clip, or one of several encoded views of a clip."""

    name: str
    captions: tuple[str, ...] | str
    """All captions of the clip, or its only one."""
    latents: Float32[np.ndarray, "t h w c"]
    """Latents, normalised per channel."""
    clip: str = ""
    """Name of the clip that this is a view of; the example's own name if empty."""
    text: tuple[Float32[np.ndarray, "s e"], ...] = ()
    """Embedding of each caption, without padding."""
    fields: Mapping[str, np.ndarray] = {}
    """Arrays of the data set's further fields: `t h w *shape` of one on the latents' grid, see `Field` for others."""


class Skipped(NamedTuple):
    """An example that could not be encoded, with the reason."""

    name: str
    reason: str


def hash_identity(identity: Identity) -> str:
    """Return a hash that does not depend on the order of keys."""
    text = identity if isinstance(identity, str) else json.dumps(identity, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class LatentSource:
    """A random-access source of cached latents.

    Each process opens the files at its first read, so a source can be pickled to workers.

    Args:
      folder: folder or address (`gs://…`) that `LatentWriter` or `write_latents` wrote, see `core.storage`.
      identity: required identity of the latents; None accepts any. Every part of a mapping must be equal.
      cache: folder to which files at an address are copied; `shards.get_default_cache()` if None.

    Raises:
      MissingError: the folder does not exist.
      UserError: the folder holds no latents of this version, unfinished ones, or latents of another autoencoder or text
        encoder.
    """

    def __init__(
        self, folder: StoragePathLike, *, identity: Identity | None = None, cache: str | os.PathLike | None = None
    ):
        self.folder: StoragePath = to_storage_path(folder)
        self._cache = None if cache is None else Path(cache)
        index = _read_index(self.folder)
        if identity is not None:
            check_identity(self.folder, index["identity"], identity)
        examples = index["examples"]
        self.identity: Identity = index["identity"]
        self.hash: str = index["hash"]
        self.channels: int = index["channels"]
        self.names: tuple[str, ...] = tuple(examples["name"])
        self.all_captions: tuple[tuple[str, ...], ...] = tuple(map(tuple, examples["captions"]))
        self.captions: tuple[str, ...] = tuple(captions[0] if captions else "" for captions in self.all_captions)
        """First caption of each example; empty if it has none."""
        self.clips: tuple[str, ...] = tuple(examples["clip"])
        """Name of the clip that each example is a view of."""
        numbers = {clip: number for number, clip in enumerate(dict.fromkeys(self.clips))}
        self.groups: tuple[int, ...] = tuple(numbers[clip] for clip in self.clips)
        """Number of the clip of each example, equal for the views of one clip: 0, 1, … in order of first occurrence."""
        self.sizes: tuple[Grid, ...] = tuple(Grid(*size) for size in examples["size"])
        """Size of the latents of each example: latent frames, rows, columns."""
        self.text_width: int = index["text_width"]
        """Width of the caption embeddings; 0 if there are none."""
        self.text_lengths: tuple[tuple[int, ...], ...] = tuple(map(tuple, examples["text"]))
        """Number of tokens of every caption's embedding."""
        empty = index["empty_text"]
        self.empty_text: Float32[np.ndarray, "s e"] | None = None if empty is None else np.asarray(empty, np.float32)
        """Embedding of the empty caption."""
        self.fields: tuple[Field, ...] = tuple(
            Field(**field | {"shape": tuple(field["shape"])}) for field in index.get("fields", ())
        )
        """Further fields of every example."""
        self.skipped: tuple[Skipped, ...] = tuple(Skipped(*one) for one in index["left_out"])
        """Clips that could not be encoded, with the reasons."""
        self._dtype = DTYPES[index["dtype"]]
        self._version = hash_identity(index) if is_remote(self.folder) else ""
        self._records: Sequence[dict[str, Any]] | None = None
        self._last_record: tuple[int, dict[str, Any]] | None = None

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> Float32[np.ndarray, "t h w c"]:
        """Return the latents of one example.

        Raises:
          DecodeError: its record is damaged.
        """
        return self._read_values(index, "latents", (*self.sizes[index], self.channels))

    def read_field(self, index: int, field: Field) -> np.ndarray:
        """Return the array of one of `fields` of one example; raises like `source[index]`."""
        shape = field.get_shape(self.sizes[index])
        return self._read_values(index, get_record_name(field), shape, field.dtype)

    def read_text(self, index: int, caption: int = 0) -> Float32[np.ndarray, "s e"]:
        """Return the embedding of one caption of an example.

        Raises:
          DecodeError: its record is damaged.
          UserError: the example has no such caption, or the data set has no embeddings.
        """
        lengths = self.text_lengths[index]
        if not 0 <= caption < len(lengths):
            raise UserError(
                f"caption={caption} is invalid: {self.names[index]} has {len(lengths)} embedded captions. Use a number "
                "from 0 on, or encode the clips with a text encoder."
            )
        embeddings = self._read_values(index, "text", (sum(lengths), self.text_width))
        return embeddings[sum(lengths[:caption]) : sum(lengths[: caption + 1])]

    def _read_values(self, index: int, name: str, shape: tuple[int, ...], dtype: str = "float32") -> np.ndarray:
        values, expected = self._read_record(index, name, np.dtype(dtype)), math.prod(shape)
        if values.size != expected:
            clip = self.names[index]
            raise DecodeError(f"{clip} has {values.size} values of {name}, not {expected}. Encode it again.")
        return values.reshape(shape)

    def _read_record(self, index: int, name: str, dtype: np.dtype) -> np.ndarray:
        if self._records is None:  # outside of the try: a data set that cannot be opened is no damaged record
            self._records = shards.open_dataset(self.folder, cache=self._cache, version=self._version)
        try:
            last_record = self._last_record
            # Latents, text and image of an example are usually read one after the other: keep the last record.
            if last_record is None or last_record[0] != index:
                self._last_record = last_record = index, self._records[index]
            stored = self._dtype if dtype == np.float32 else dtype
            return to_little_endian(np.frombuffer(last_record[1][name], stored)).astype(dtype)
        except (OSError, UserError):  # the file cannot be copied to this machine
            raise
        except Exception as error:  # ArrayRecord and protocol buffers raise many types on damaged bytes
            raise DecodeError(f"the record of {self.names[index]} is damaged ({error}). Encode it again.") from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_records": None, "_last_record": None}


def get_record_name(field: Field) -> str:
    """Return the name of a field in a record, which no other entry has."""
    return f"field_{field.name}"


def check_identity(folder: StoragePathLike, actual: Identity, expected: Identity) -> None:
    """Check that latents have the expected identity.

    Raises:
      UserError: a part of the identity differs; the message names both values.
    """
    parts: list[tuple[str, Any, Any]]
    if isinstance(actual, str) or isinstance(expected, str):
        parts = [("autoencoder", actual, expected)] if hash_identity(actual) != hash_identity(expected) else []
    else:
        parts = [(name, actual.get(name), value) for name, value in expected.items() if actual.get(name) != value]
    for name, old, new in parts:
        raise UserError(
            f"{folder} holds latents of {name} {_format_identity(old)}, but {_format_identity(new)} was requested. "
            "Encode the clips again, into another folder."
        )


def to_little_endian(values: np.ndarray) -> np.ndarray:
    """Convert values from or to little-endian byte order, that of files; the conversion is its own inverse."""
    return values if sys.byteorder == "little" else values.byteswap()


def _format_identity(identity: Any) -> str:
    if identity is None:
        return "none"
    text = identity if isinstance(identity, str) else json.dumps(identity, sort_keys=True)
    hashed = identity if isinstance(identity, str) else {"": identity}
    return text if len(text) <= 64 else f"{text[:48]}… ({hash_identity(hashed)})"


def _read_index(folder: StoragePath) -> dict[str, Any]:
    if not (folder / INDEX).exists():  # checked before the folder, as object stores need not have folders
        if not folder.exists():
            raise MissingError(f"there is no folder of latents at {folder}. Encode clips first.")
        if (folder / PLAN).exists():
            files = read_document(folder / PLAN).get("files")
            finished = len(list((folder / "shards").glob("[0-9]*.json"))) if (folder / "shards").exists() else 0
            raise UserError(f"{folder} is not finished, {finished} of {files} files exist. Continue the encoding.")
        raise UserError(f"{folder} holds no latents, as it has no {INDEX}. Encode clips first.")
    index = read_document(folder / INDEX)
    if not isinstance(index, dict) or index.get("version") != VERSION:
        raise UserError(f"{folder / INDEX} is not of version {VERSION}. Encode the clips again.")
    return index
