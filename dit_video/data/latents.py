"""Cached latents: what an autoencoder (and a text encoder) made of the clips, stamped with their identity.

latents.json              the index: names, captions, sizes, what was left out and why; it is written last
plan.json                 what the files are to hold, so that only the same encoding is continued
shards/00000.json         the index of one file
latents-train.array_record-00000-of-00008, …    and TFDS's dataset_info.json, features.json
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import ml_dtypes
import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from jaxtyping import Float32

from dit_video.data import builder, shards
from dit_video.errors import MissingError, UserError
from dit_video.files import atomic_path
from dit_video.tokens import Grid

NAME = "latents"
INDEX, PLAN = "latents.json", "plan.json"
VERSION = 2
Identity = str | Mapping[str, Any]
"""What makes latents comparable: the autoencoder's weights, the sizes, whatever else they depend on (JSON). The parts
of a mapping are compared one by one: `autoencoder`, `text` (the encoder of cached embeddings), …"""
Storage = Literal["bfloat16", "float32"]
_DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}


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


class LeftOut(NamedTuple):
    """An example that could not be made."""

    name: str
    reason: str


def identity_hash(identity: Identity) -> str:
    """Equal for equal identities, whatever the order of their keys."""
    text = identity if isinstance(identity, str) else json.dumps(identity, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class LatentFiles:
    """A data set of latents in the making. Any number of processes write its files, in any order, each once.

    Raises:
      UserError: the folder holds something else, or the files of another encoding.
    """

    folder: epath.Path
    identity: Identity
    """of the autoencoder and all else that latents depend on; `LatentSource` asks for it again"""
    files: int
    plan: str = ""
    """A hash of what each file holds."""
    dtype: Storage = "bfloat16"

    def __post_init__(self):
        wanted = {
            "version": VERSION,
            "identity": self.identity if isinstance(self.identity, str) else dict(self.identity),
            "dtype": self.dtype,
            "files": self.files,
            "plan": self.plan,
        }
        if not (self.folder / PLAN).exists():
            # What begins with a dot another process is writing at this moment.
            if self.folder.exists() and any(not path.name.startswith(".") for path in self.folder.iterdir()):
                raise UserError(f"{self.folder} exists and holds no latents; name a folder that does not exist")
            shards.write_document(self.folder / PLAN, wanted)
            return
        found = shards.read_document(self.folder / PLAN)
        if not isinstance(found, dict) or found.get("version") != VERSION:
            raise UserError(f"{self.folder / PLAN} is not of version {VERSION}; encode the clips into another folder")
        check_identity(self.folder, found["identity"], self.identity)
        if found != wanted:
            raise UserError(
                f"{self.folder} was begun with other options ({found['files']} files of {found['dtype']}, plan "
                f"{found['plan']}; now {self.files} of {self.dtype}, plan {self.plan}); use the same ones or another "
                "folder"
            )

    def done(self, number: int) -> int | None:
        """How many examples, with those that were left out, a finished file has; None while it isn't finished."""
        part = self._part(number)
        if not part.exists():
            return None
        written = shards.read_document(part)
        return len(written["examples"]["name"]) + len(written["left_out"])

    def write(self, number: int, examples: Iterable[LatentExample | LeftOut]) -> None:
        """Write one file, whole or not at all.

        Raises:
          UserError: latents that are empty, not finite, or of another number of channels than those before them.
        """
        columns: dict[str, list] = {name: [] for name in ("name", "clip", "captions", "size", "text")}
        left_out: list[LeftOut] = []
        widths: set[tuple[int, int]] = set()

        def records() -> Iterator[dict[str, Any]]:
            for example in examples:
                if isinstance(example, LeftOut):
                    left_out.append(example)
                    continue
                captions = _captions(example)
                widths.add(_checked_widths(example, captions, widths))
                columns["name"].append(example.name)
                columns["clip"].append(example.clip or example.name)
                columns["captions"].append(list(captions))
                columns["size"].append(list(example.latents.shape[:3]))
                columns["text"].append([len(text) for text in example.text])
                yield {
                    "latents": self._stored(example.latents),
                    "shape": np.asarray(example.latents.shape, np.int32),
                    "text": b"".join(self._stored(text) for text in example.text),
                    "name": example.name,
                    "captions": list(captions),
                }

        shards.write_file(self.folder, NAME, number, self.files, features=_features(), examples=records())
        channels, text_width = next(iter(widths), (0, 0))
        # Last: the file is finished when this is there.
        shards.write_document(
            self._part(number),
            {"channels": channels, "text_width": text_width, "examples": columns, "left_out": left_out},
        )

    def finish(self, *, empty_text: Float32[np.ndarray, "s e"] | None = None) -> bool:
        """Write the index when all files are there: every process does, and the last one succeeds.

        Args:
          empty_text: the embedding of the empty caption, where texts are embedded.

        Returns:
          whether the data set is finished.

        Raises:
          UserError: no example could be made, or files that disagree on the number of channels.
        """
        if (self.folder / INDEX).exists():
            return True
        if not all(self._part(number).exists() for number in range(self.files)):
            return False
        parts = [shards.read_document(self._part(number)) for number in range(self.files)]
        columns = {name: [value for part in parts for value in part["examples"][name]] for name in _COLUMNS}
        left_out = [one for part in parts for one in part["left_out"]]
        if not columns["name"]:
            reason = f": {left_out[0][0]}: {left_out[0][1]}" if left_out else "; encode at least one clip"
            raise UserError(f"no latents for {self.folder}, {len(left_out)} clips could not be read{reason}")
        widths = {(part["channels"], part["text_width"]) for part in parts if part["examples"]["name"]}
        if len(widths) > 1:
            raise UserError(f"the files of {self.folder} disagree on channels and text width ({sorted(widths)})")
        channels, text_width = widths.pop()
        counts = [len(part["examples"]["name"]) for part in parts]
        shards.remove_partial(self.folder)
        shards.finish(self.folder, NAME, counts, features=_features())
        index = {
            "version": VERSION,
            "identity": self.identity if isinstance(self.identity, str) else dict(self.identity),
            "hash": identity_hash(self.identity),
            "dtype": self.dtype,
            "channels": channels,
            "text_width": text_width,
            "empty_text": None if empty_text is None else empty_text.tolist(),
            "examples": columns,
            "left_out": left_out,
        }
        shards.write_document(self.folder / INDEX, index)
        return True

    def _part(self, number: int) -> epath.Path:
        return self.folder / "shards" / f"{number:05d}.json"

    def _stored(self, values: np.ndarray) -> bytes:
        return _little_endian(np.ascontiguousarray(values.astype(_DTYPES[self.dtype]))).tobytes()


def write_latents(
    destination: str | os.PathLike,
    examples: Iterable[LatentExample],
    *,
    identity: Identity,
    dtype: Storage = "bfloat16",
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write the data set `destination` in one file, whole or not at all. Latents that are there are replaced.

    Args:
      destination: the folder, a local one.
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

    def counted() -> Iterator[LatentExample]:
        done = 0
        for done, example in enumerate(examples, 1):
            yield example
            if progress is not None:
                progress(done)
        if not done:
            raise UserError(f"no latents to write to {destination}; encode at least one clip")

    with atomic_path(destination) as folder:
        made = LatentFiles(folder=epath.Path(folder), identity=identity, files=1, dtype=dtype)
        made.write(0, counted())
        made.finish()


class LatentSource:
    """Random access to cached latents.

    The files are opened at the first read, in each process anew: a source can be pickled to workers.

    Args:
      folder: what `LatentFiles` or `write_latents` made; local, or remote as `gs://…`.
      identity: that the latents must be of; None takes any. Of a mapping, every part must be the same there.
      cache: where files of a remote folder are copied to, `~/.cache/dit_video` by default.

    Raises:
      MissingError: no such folder.
      UserError: the folder holds no latents of this version, unfinished ones, or those of another autoencoder or
        text encoder.
    """

    def __init__(
        self, folder: str | os.PathLike, *, identity: Identity | None = None, cache: str | os.PathLike | None = None
    ):
        self.folder = os.fspath(folder)
        self._cache = None if cache is None else Path(cache)
        index = _read_index(epath.Path(folder))
        if identity is not None:
            check_identity(folder, index["identity"], identity)
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
        self.left_out: tuple[LeftOut, ...] = tuple(LeftOut(*one) for one in index["left_out"])
        """what could not be encoded, and why"""
        self._dtype = _DTYPES[index["dtype"]]
        self._version = identity_hash(index) if shards.is_remote(self.folder) else ""
        self._records: Sequence[dict[str, Any]] | None = None

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> Float32[np.ndarray, "t h w c"]:
        """The latents of one example."""
        return self._values(index, "latents").reshape(*self.sizes[index], self.channels)

    def text(self, index: int, caption: int = 0) -> Float32[np.ndarray, "s e"]:
        """The embedding of one caption of an example.

        Raises:
          UserError: the example has no such caption, or the data set no embeddings.
        """
        lengths = self.text_lengths[index]
        if not 0 <= caption < len(lengths):
            raise UserError(f"{self.names[index]} has {len(lengths)} embedded captions, number {caption} was asked for")
        rows = self._values(index, "text").reshape(sum(lengths), self.text_width)
        return rows[sum(lengths[:caption]) : sum(lengths[: caption + 1])]

    def _values(self, index: int, field: str) -> Float32[np.ndarray, " n"]:
        if self._records is None:
            self._records = shards.open_anywhere(epath.Path(self.folder), cache=self._cache, version=self._version)
        return _little_endian(np.frombuffer(self._records[index][field], self._dtype)).astype(np.float32)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_records": None}


def check_identity(folder: str | os.PathLike, found: Identity, wanted: Identity) -> None:
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
            f"{os.fspath(folder)} holds latents of {name} {_named(old)}, {_named(new)} was asked for; "
            "encode the clips again, into another folder"
        )


_COLUMNS = ("name", "clip", "captions", "size", "text")


def _features() -> dict[str, Any]:
    return {
        "latents": builder.content(),
        "shape": tfds.features.Tensor(shape=(4,), dtype=np.int32),
        "text": builder.content(),
        "name": tfds.features.Text(),
        "captions": tfds.features.Sequence(tfds.features.Text()),
    }


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _captions(example: LatentExample) -> tuple[str, ...]:
    if isinstance(example.captions, str):
        return (example.captions,) if example.captions else ()
    return tuple(example.captions)


def _checked_widths(example: LatentExample, captions: tuple[str, ...], before: set[tuple[int, int]]) -> tuple[int, int]:
    """The channels of the latents and the width of the embeddings (0 without), which are the same for all."""
    name, shape = example.name, example.latents.shape
    channels, text_width = next(iter(before), (shape[-1] if shape else 0, None))
    if len(shape) != 4 or 0 in shape or shape[-1] != channels:
        raise UserError(f"latents of {name} have the shape {list(shape)}, all must be [t h w {channels}]")
    if not np.isfinite(example.latents).all():
        raise UserError(f"latents of {name} are not finite; the autoencoder that made them is broken")
    if not example.text:
        return channels, text_width or 0
    if len(example.text) != len(captions):
        raise UserError(f"{name} has {len(captions)} captions and {len(example.text)} embeddings; give one each")
    for text in example.text:
        text_width = text_width or text.shape[-1]
        if text.ndim != 2 or 0 in text.shape or text.shape[-1] != text_width or not np.isfinite(text).all():
            raise UserError(
                f"an embedding of {name} has the shape {list(text.shape)}, all must be finite [s {text_width}]"
            )
    return channels, text_width or 0


def _little_endian(values: np.ndarray) -> np.ndarray:
    """Files are little-endian; the exchange is its own inverse."""
    return values if sys.byteorder == "little" else values.byteswap()


def _named(identity: Any) -> str:
    if isinstance(identity, str):
        return identity if len(identity) <= 64 else f"{identity[:48]}… ({identity_hash(identity)})"
    text = json.dumps(identity, sort_keys=True)
    return text if len(text) <= 64 else f"{text[:48]}… ({identity_hash({'': identity})})"


def _read_index(folder: epath.Path) -> dict[str, Any]:
    if not folder.exists():
        raise MissingError(f"no such folder of latents: {folder}")
    if not (folder / INDEX).exists():
        if (folder / PLAN).exists():
            files = shards.read_document(folder / PLAN).get("files")
            made = len(list((folder / "shards").glob("[0-9]*.json"))) if (folder / "shards").exists() else 0
            raise UserError(
                f"{folder} is not finished, {made} of {files} files are there; continue to encode the clips"
            )
        raise UserError(f"{folder} holds no latents, it has no {INDEX}; encode clips first")
    index = shards.read_document(folder / INDEX)
    if not isinstance(index, dict) or index.get("version") != VERSION:
        raise UserError(f"{folder / INDEX} is not of version {VERSION}; encode the clips again")
    return index
