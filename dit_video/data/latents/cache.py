"""Cached latents: what an autoencoder (and a text encoder) made of the clips, stamped with their identity.

latents.json              the index: names, captions, sizes, what was left out and why; it is written last
plan.json                 what the files are to hold, so that only the same encoding is continued
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
from dit_video.core.storage import Address, Place, is_remote, place, read_document
from dit_video.data.records import shards
from dit_video.tokens import Grid

NAME = "latents"
INDEX, PLAN = "latents.json", "plan.json"
VERSION = 2
Identity = str | Mapping[str, Any]
"""What makes latents comparable: the autoencoder's weights, the sizes, whatever else they depend on (JSON). The parts
of a mapping are compared one by one: `autoencoder`, `text` (the encoder of cached embeddings), `image`, …"""
Storage = Literal["bfloat16", "float32"]
DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}


class LatentExample(NamedTuple):
    """One clip, or one of several views of a clip, encoded."""

    name: str
    captions: tuple[str, ...] | str
    """all of the clip, or its only one"""
    latents: Float32[np.ndarray, "t h w c"]
    """normalised per channel"""
    clip: str = ""
    """The name of the clip that this is a view of; its own name if empty."""
    text: tuple[Float32[np.ndarray, "s e"], ...] = ()
    """the embedding of each caption: real tokens only"""
    shown: Float32[np.ndarray, "t h w c"] | None = None
    """latents of the same clip with all that comes after its first frame grey, for denoisers that read these"""
    image: Float32[np.ndarray, "i F"] | None = None
    """an image encoder's tokens of its first frame"""


class LeftOut(NamedTuple):
    """An example that could not be made."""

    name: str
    reason: str


def identity_hash(identity: Identity) -> str:
    """Equal for equal identities, whatever the order of their keys."""
    text = identity if isinstance(identity, str) else json.dumps(identity, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class LatentSource:
    """Random access to cached latents.

    The files are opened at the first read, in each process anew: a source can be pickled to workers.

    Args:
      folder: what `LatentFiles` or `write_latents` made; an address (`gs://…`) too, see `data.places`.
      identity: that the latents must be of; None takes any. Of a mapping, every part must be the same there.
      cache: where files of one at an address are copied to; `shards.default_cache()` if None.

    Raises:
      MissingError: no such folder.
      UserError: the folder holds no latents of this version, unfinished ones, or those of another autoencoder or
        text encoder.
    """

    def __init__(self, folder: Address, *, identity: Identity | None = None, cache: str | os.PathLike | None = None):
        self.folder: Place = place(folder)
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
        """the first of each example; empty without any"""
        self.clips: tuple[str, ...] = tuple(examples["clip"])
        """the name of the clip that each example is a view of"""
        numbers = {clip: number for number, clip in enumerate(dict.fromkeys(self.clips))}
        self.groups: tuple[int, ...] = tuple(numbers[clip] for clip in self.clips)
        """equal for the views of one clip: 0, 1, … in the order of their first example"""
        self.sizes: tuple[Grid, ...] = tuple(Grid(*size) for size in examples["size"])
        """of the latents: latent frames, rows, columns"""
        self.text_width: int = index["text_width"]
        """of the captions' embeddings; 0 without"""
        self.text_lengths: tuple[tuple[int, ...], ...] = tuple(map(tuple, examples["text"]))
        """tokens of every caption's embedding"""
        empty = index["empty_text"]
        self.empty_text: Float32[np.ndarray, "s e"] | None = None if empty is None else np.asarray(empty, np.float32)
        """the embedding of the empty caption"""
        self.has_shown: bool = index.get("shown", False)
        """whether there are latents of first frames with grey behind them"""
        self.image_shape: tuple[int, int] | None = None if index.get("image") is None else tuple(index["image"])
        """image tokens of an example, and their width; None without"""
        self.left_out: tuple[LeftOut, ...] = tuple(LeftOut(*one) for one in index["left_out"])
        """what could not be encoded, and why"""
        self._dtype = DTYPES[index["dtype"]]
        self._version = identity_hash(index) if is_remote(self.folder) else ""
        self._records: Sequence[dict[str, Any]] | None = None
        self._read: tuple[int, dict[str, Any]] | None = None

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> Float32[np.ndarray, "t h w c"]:
        """The latents of one example.

        Raises:
          DecodeError: its record is damaged.
        """
        return self._shaped(index, "latents", (*self.sizes[index], self.channels))

    def shown(self, index: int) -> Float32[np.ndarray, "t h w c"] | None:
        """The latents of one example's first frame with grey behind it, if there are such; raises as `[index]`."""
        return self._shaped(index, "shown", (*self.sizes[index], self.channels)) if self.has_shown else None

    def image(self, index: int) -> Float32[np.ndarray, "i F"] | None:
        """An image encoder's tokens of one example's first frame, if there are such; raises as `[index]`."""
        return None if self.image_shape is None else self._shaped(index, "image", self.image_shape)

    def text(self, index: int, caption: int = 0) -> Float32[np.ndarray, "s e"]:
        """The embedding of one caption of an example.

        Raises:
          DecodeError: its record is damaged.
          UserError: the example has no such caption, or the data set no embeddings.
        """
        lengths = self.text_lengths[index]
        if not 0 <= caption < len(lengths):
            raise UserError(f"{self.names[index]} has {len(lengths)} embedded captions, number {caption} was asked for")
        values, shape = self._values(index, "text"), (sum(lengths), self.text_width)
        if values.size != math.prod(shape):
            raise DecodeError(f"the texts of {self.names[index]} have {values.size} values, not {math.prod(shape)}")
        return values.reshape(shape)[sum(lengths[:caption]) : sum(lengths[: caption + 1])]

    def _shaped(self, index: int, field: str, shape: tuple[int, ...]) -> Float32[np.ndarray, "..."]:
        values = self._values(index, field)
        if values.size != math.prod(shape):
            raise DecodeError(
                f"{self.names[index]} has {values.size} values, {math.prod(shape)} belong there ({field})"
            )
        return values.reshape(shape)

    def _values(self, index: int, field: str) -> Float32[np.ndarray, " n"]:
        if self._records is None:  # outside of the try: a data set that can't be opened is no fault of an example
            self._records = shards.open_anywhere(self.folder, cache=self._cache, version=self._version)
        try:
            read = self._read
            if read is None or read[0] != index:  # latents and text are mostly asked for one after the other
                self._read = read = index, self._records[index]
            stored = read[1][field]
            return little_endian(np.frombuffer(stored, self._dtype)).astype(np.float32)
        except (OSError, UserError):  # of a file that can't be copied here
            raise
        except Exception as error:  # ArrayRecord and protocol buffers raise many types on damaged bytes
            raise DecodeError(f"the record of {self.names[index]} is damaged ({error}); encode it again") from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_records": None, "_read": None}


def check_identity(folder: Address, found: Identity, wanted: Identity) -> None:
    """That latents are of what is asked for.

    Raises:
      UserError: they are not; it names both.
    """
    parts: list[tuple[str, Any, Any]]
    if isinstance(found, str) or isinstance(wanted, str):
        parts = [("autoencoder", found, wanted)] if identity_hash(found) != identity_hash(wanted) else []
    else:
        parts = [(name, found.get(name), value) for name, value in wanted.items() if found.get(name) != value]
    for name, old, new in parts:
        raise UserError(
            f"{folder} holds latents of {name} {_named(old)}, {_named(new)} was asked for; "
            "encode the clips again, into another folder"
        )


def little_endian(values: np.ndarray) -> np.ndarray:
    """Files are little-endian; the exchange is its own inverse."""
    return values if sys.byteorder == "little" else values.byteswap()


def _named(identity: Any) -> str:
    if identity is None:
        return "none"
    if isinstance(identity, str):
        return identity if len(identity) <= 64 else f"{identity[:48]}… ({identity_hash(identity)})"
    text = json.dumps(identity, sort_keys=True)
    return text if len(text) <= 64 else f"{text[:48]}… ({identity_hash({'': identity})})"


def _read_index(folder: Place) -> dict[str, Any]:
    if not (folder / INDEX).exists():  # asked first: not every address has folders
        if not folder.exists():
            raise MissingError(f"no such folder of latents: {folder}")
        if (folder / PLAN).exists():
            files = read_document(folder / PLAN).get("files")
            made = len(list((folder / "shards").glob("[0-9]*.json"))) if (folder / "shards").exists() else 0
            raise UserError(
                f"{folder} is not finished, {made} of {files} files are there; continue to encode the clips"
            )
        raise UserError(f"{folder} holds no latents, it has no {INDEX}; encode clips first")
    index = read_document(folder / INDEX)
    if not isinstance(index, dict) or index.get("version") != VERSION:
        raise UserError(f"{folder / INDEX} is not of version {VERSION}; encode the clips again")
    return index
