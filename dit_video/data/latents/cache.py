"""Cached latents of clips, and embeddings of their captions, with the identity of the encoders that computed them.

table.json, index/, columns/      the table of the examples, see `data.tables`
latents-train-00000.array_record  their latents; with TFDS's dataset_info.json and features.json
texts/                            the table of the captions' embeddings, each caption once, and its records
plan.json                         identity and options of the encoding, so that only the same encoding is continued

Captions are a column: other captions leave latents as they are, and only new captions are embedded.
"""

import hashlib
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tensorflow_datasets as tfds
from jaxtyping import Float, Float32, Int32, Int64, UInt64

from dit_video.core.errors import DecodeError, UserError
from dit_video.core.shared_array import SharesArrays
from dit_video.core.storage import StoragePath, StoragePathLike, read_document, to_storage_path
from dit_video.data.captions import CaptionLengths
from dit_video.data.records import RecordReader, make_bytes_feature, read_row
from dit_video.data.tables import INDEX_FOLDER, MANIFEST, Table, TableColumn, compute_row_id, list_parquet
from dit_video.tokens import Field, Grid

DATASET_NAME = KIND = "latents"
TEXTS = "texts"
"""Folder of the embeddings of captions, and the kind of its table."""
PLAN = "plan.json"
VERSION = 3
Identity = str | Mapping[str, Any]
"""Identity of latents, as JSON values: the autoencoder's weights, the sizes, and all else that latents depend on. The
parts of a mapping are compared one by one, e.g. `autoencoder`, `text` (the encoder of cached embeddings), `image`."""
StorageDtype = Literal["bfloat16", "float32", "int8"]
"""Type in which values are stored. "int8" holds latents in steps of a 127th of the largest value of each channel of an
example, and all else in bfloat16."""
DTYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "int8": np.dtype(ml_dtypes.bfloat16),
}
SIZE_COLUMNS = ("latent_frames", "latent_rows", "latent_columns")
TEXT_FEATURES = {"text": make_bytes_feature(), "caption": tfds.features.Text()}


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
    payload: str = ""
    """SHA-256 of the clip's bytes, and of its values in the columns that conditioning reads. With another one, the same
    name is another example."""


class Skipped(NamedTuple):
    """An example that could not be encoded, with the reason."""

    name: str
    reason: str
    payload: str = ""
    clip: str = ""


def hash_identity(identity: Identity) -> str:
    """Return a hash that does not depend on the order of keys."""
    text = identity if isinstance(identity, str) else json.dumps(identity, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class LatentSource(SharesArrays):
    """A random-access source of cached latents, which are read in place, also from buckets.

    No files are kept open, so a source can be pickled to workers.

    Args:
      folder: Folder or address (`gs://…`) that `LatentWriter` or `write_latents` wrote, see `core.storage`.
      identity: Required identity of the latents; None accepts any. Every part of a mapping must be equal.
      cache: Folder of the columns of large data sets; `tables.get_default_cache()` if None.

    Raises:
      MissingError: If the folder does not exist.
      UserError: If the folder holds no latents of this version, unfinished ones, or latents of another autoencoder or
        text encoder.
    """

    def __init__(
        self, folder: StoragePathLike, *, identity: Identity | None = None, cache: str | os.PathLike | None = None
    ):
        self.folder: StoragePath = to_storage_path(folder)
        local = None if cache is None else Path(cache)
        try:
            self._table = table = Table(self.folder, kind=KIND, make_it="Encode clips first.", cache=local)
        except UserError:
            _check_finished(self.folder)
            raise
        settings = table.settings
        if identity is not None:
            check_identity(self.folder, settings["identity"], identity)
        self.identity: Identity = settings["identity"]
        self.hash: str = hash_identity({"identity": settings["identity"], "table": table.version})
        """Hash of the latents and their captions."""
        self.channels: int = settings["channels"]
        self.fields: tuple[Field, ...] = tuple(
            Field(**field | {"shape": tuple(field["shape"])}) for field in settings["fields"]
        )
        """Further fields of every example."""
        self._dtype: StorageDtype = settings["dtype"]
        self._rows: Int64[np.ndarray, " n"] = table.select("outcome == 'kept' and chosen")
        self.ids: UInt64[np.ndarray, " n"] = table["id"][self._rows]
        """Hash of the name and of the clip's bytes of each example."""
        self.names: Sequence[str] = TableColumn(table, "name", self._rows)
        self.clips: Sequence[str] = TableColumn(table, "clip", self._rows)
        """Name of the clip that each example is a view of."""
        self.all_captions: Sequence[tuple[str, ...]] = TableColumn(table, "captions", self._rows)
        size = [table[name][self._rows] for name in SIZE_COLUMNS]
        self.sizes: Int32[np.ndarray, "n 3"] = np.stack(size, axis=1).astype(np.int32)
        """Size of the latents of each example: latent frames, rows, columns."""
        self.skipped: tuple[Skipped, ...] = tuple(self._list_skipped())
        """Clips that could not be encoded, with the reasons."""
        self._reader = RecordReader(self.folder, make_features(self.fields))
        self._texts = _TextReader(self.folder / TEXTS, local, self._dtype) if settings["has_texts"] else None
        self.text_width: int = 0 if self._texts is None else self._texts.width
        """Width of the caption embeddings; 0 if there are none."""
        self.empty_text: Float32[np.ndarray, "s e"] | None = None if self._texts is None else self._texts.read_empty()
        """Embedding of the empty caption."""
        self.caption_counts, caption_ids = TableColumn(table, "caption_ids", self._rows).flatten()
        """Number of captions of every example."""
        self.caption_ids: UInt64[np.ndarray, " c"] = caption_ids.to_numpy()
        """Hash of every caption, example after example."""
        self._text_ends: Int64[np.ndarray, " n"] = np.cumsum(self.caption_counts)
        self._text_rows: Int64[np.ndarray, " c"] | None = None
        if self._texts is not None:
            self._text_rows = self._texts.find(self.caption_ids)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Float32[np.ndarray, "t h w c"]:
        """Return the latents of one example; raises like `read_example`."""
        return self.read_example(index)[0]

    def read_example(self, index: int) -> tuple[Float32[np.ndarray, "t h w c"], dict[str, np.ndarray]]:
        """Return the latents of one example, and the arrays of its further fields by name.

        Raises:
          DecodeError: If its record is damaged.
        """
        try:
            record = read_row(self._reader, self._table, int(self._rows[index]), DATASET_NAME)
        except DecodeError as error:
            raise DecodeError(
                f"the record of {self.names[index]}: {error}. Encode the clips into another folder."
            ) from error
        size = self.get_size(index)
        shape = (*size, self.channels)
        if self._dtype == "int8":
            steps = decode_values(record["scale"], "float32")
            latents = self._decode(index, record, "latents", shape, "int8").astype(np.float32) * steps
        else:
            latents = self._decode(index, record, "latents", shape, "float32")
        return latents, {
            field.name: self._decode(index, record, get_record_name(field), field.get_shape(size), field.dtype)
            for field in self.fields
        }

    @property
    def clip_keys(self) -> pa.ChunkedArray:
        """Return the name and the hash of the bytes of the clip that each example is a view of, separated by NUL."""
        columns = (TableColumn(self._table, name, self._rows).take_all() for name in ("clip", "payload"))
        return pc.binary_join_element_wise(*columns, "\0")

    @property
    def groups(self) -> Int32[np.ndarray, " n"]:
        """Return the number of the clip of each example, equal for its views: 0, 1, … in order of first occurrence."""
        return TableColumn(self._table, "clip", self._rows).number_values()

    @property
    def text_lengths(self) -> Int32[np.ndarray, " c"]:
        """Return the number of tokens of the embedding of every caption, example after example."""
        if self._texts is None or self._text_rows is None:
            return np.zeros(0, np.int32)
        return self._texts.lengths[self._text_rows]

    def get_size(self, index: int) -> Grid:
        """Return the size of the latents of one example."""
        return Grid(*self.sizes[index].tolist())

    def read_field(self, index: int, field: Field) -> np.ndarray:
        """Return the array of one of `fields` of one example; raises like `read_example`."""
        return self.read_example(index)[1][field.name]

    def read_text(self, index: int, caption: int = 0) -> Float32[np.ndarray, "s e"]:
        """Return the embedding of one caption of an example.

        Raises:
          DecodeError: If its record is damaged.
          UserError: If the example has no such caption, or the data set has no embeddings.
        """
        count = 0 if self._texts is None else int(self.caption_counts[index])
        if self._texts is None or self._text_rows is None or not 0 <= caption < count:
            raise UserError(
                f"caption={caption} is invalid: {self.names[index]} has {count} embedded captions. Use a number from 0 "
                "on, or encode the clips with a text encoder."
            )
        row = int(self._text_rows[self._text_ends[index] - count + caption])
        try:
            return self._texts.read(row)
        except DecodeError as error:
            raise DecodeError(
                f"the embedding of a caption of {self.names[index]}: {error}. Encode the clips into another folder."
            ) from error

    def _list_skipped(self) -> list[Skipped]:
        rows = self._table.select("outcome == 'unreadable' and chosen")
        return list(map(Skipped, *(TableColumn(self._table, name, rows) for name in Skipped._fields)))

    def _decode(
        self, index: int, record: Mapping[str, Any], name: str, shape: tuple[int, ...], dtype: str
    ) -> np.ndarray:
        values, expected = decode_values(record[name], self._dtype, dtype), math.prod(shape)
        if values.size != expected:
            clip = self.names[index]
            raise DecodeError(
                f"{clip} has {values.size} values of {name}, not {expected}. Encode the clips into another folder."
            )
        return values.reshape(shape)


class CachedCaptions:
    """Captions as embeddings that are cached with latents.

    Raises:
      UserError: If the data set has no embeddings.
    """

    def __init__(self, source: LatentSource, *, shares: Float[np.ndarray, " c"] | None = None):
        if source.empty_text is None:
            fix = "encode the clips with a text encoder, into another folder"
            raise UserError(f"{source.folder} holds no embeddings of captions; {fix}")
        self.empty, self._source = source.empty_text, source
        self.width: int = self.empty.shape[1]
        counts = source.caption_counts
        places = np.cumsum(counts)[counts == 0]  # an example without captions has the empty one
        values = np.insert(source.text_lengths, places, len(self.empty))
        self.lengths = CaptionLengths(values, np.maximum(counts, 1), shares)

    def iter_hash_bytes(self) -> Iterator[bytes]:
        """Yield the encoder, the captions and the lengths of the embeddings."""
        identity = self._source.identity
        yield repr(identity if isinstance(identity, str) else identity.get("text")).encode()
        yield self._source.caption_ids.astype("<u8").tobytes()
        yield self.lengths.hash_bytes

    def read(self, example: int, caption: int) -> Float32[np.ndarray, "s E"]:
        """Return one caption of an example.

        Raises:
          DecodeError: If its record is damaged.
        """
        return self._source.read_text(example, caption) if self._source.caption_counts[example] else self.empty


class _TextReader(SharesArrays):
    """A reader of the embeddings of captions."""

    def __init__(self, folder: StoragePath, cache: Path | None, dtype: StorageDtype):
        self._table = Table(folder, kind=TEXTS, make_it="Encode clips first.", cache=cache)
        self._reader, self._dtype = RecordReader(folder, TEXT_FEATURES), dtype
        self.width: int = self._table.settings["width"]
        self.lengths: Int32[np.ndarray, " k"] = self._table["tokens"]
        """Number of tokens of every embedding."""

    def find(self, ids: UInt64[np.ndarray, " c"]) -> Int64[np.ndarray, " c"]:
        """Return the rows of captions with these ids.

        Raises:
          UserError: If a caption has no embedding.
        """
        rows = pc.index_in(pa.array(ids), value_set=self._table.arrow("id"))
        if rows.null_count:
            raise UserError(
                f"{self._table.folder} lacks the embeddings of {rows.null_count} captions. Encode the clips again into "
                "the same folder, which embeds these alone."
            )
        return rows.to_numpy().astype(np.int64)

    def read(self, row: int) -> Float32[np.ndarray, "s e"]:
        """Return the embedding of a row."""
        content = read_row(self._reader, self._table, row, TEXTS)["text"]
        return decode_values(content, self._dtype).reshape(-1, self.width)

    def read_empty(self) -> Float32[np.ndarray, "s e"]:
        """Return the embedding of the empty caption."""
        return self.read(int(self.find(np.asarray([compute_row_id("")], np.uint64))[0]))


def encode_values(values: np.ndarray, storage: StorageDtype, dtype: str = "float32") -> bytes:
    """Return the bytes of values as they are stored: floating-point numbers in the type of the data set."""
    stored = np.ascontiguousarray(values.astype(DTYPES[storage] if dtype == "float32" else dtype))
    return _to_little_endian(stored).tobytes()


def decode_values(content: bytes, storage: StorageDtype, dtype: str = "float32") -> np.ndarray:
    """Return the values that `encode_values` wrote, as one row of numbers of type `dtype`."""
    stored = DTYPES[storage] if dtype == "float32" else np.dtype(dtype)
    return _to_little_endian(np.frombuffer(content, stored)).astype(dtype)


def make_features(fields: Sequence[Field]) -> dict[str, Any]:
    """Return the features of a record of latents."""
    return {
        "latents": make_bytes_feature(),
        "scale": make_bytes_feature(),
        "shape": tfds.features.Tensor(shape=(4,), dtype=np.int32),
        "name": tfds.features.Text(),
        **{get_record_name(field): make_bytes_feature() for field in fields},
    }


def get_record_name(field: Field) -> str:
    """Return the name of a field in a record, which no other entry has."""
    return f"field_{field.name}"


def check_identity(folder: StoragePathLike, actual: Identity, expected: Identity) -> None:
    """Check that latents have the expected identity.

    Raises:
      UserError: If a part of the identity differs; the message names both values.
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


def _to_little_endian(values: np.ndarray) -> np.ndarray:
    """Convert values from or to little-endian byte order, that of files; the conversion is its own inverse."""
    return values if sys.byteorder == "little" else values.byteswap()


def _format_identity(identity: Any) -> str:
    if identity is None:
        return "none"
    text = identity if isinstance(identity, str) else json.dumps(identity, sort_keys=True)
    hashed = identity if isinstance(identity, str) else {"": identity}
    return text if len(text) <= 64 else f"{text[:48]}… ({hash_identity(hashed)})"


def _check_finished(folder: StoragePath) -> None:
    """Raise `UserError` for latents whose encoding is not finished."""
    if (folder / PLAN).exists() and not (folder / MANIFEST).exists():
        files, finished = sum(read_document(folder / PLAN)["files"]), len(list_parquet(folder / INDEX_FOLDER))
        raise UserError(f"{folder} is not finished, {finished} of {files} files exist. Continue the encoding.")
