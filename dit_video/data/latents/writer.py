"""Writer of cached latents: part by part, by any number of processes, and the table once all parts exist."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float32, UInt64

from dit_video.core.errors import UserError
from dit_video.core.files import atomic_path
from dit_video.core.storage import StoragePath, is_remote, read_document, write_document
from dit_video.data.latents.cache import (
    DATASET_NAME,
    KIND,
    PLAN,
    SIZE_COLUMNS,
    TEXT_FEATURES,
    TEXTS,
    VERSION,
    Identity,
    LatentExample,
    Skipped,
    StorageDtype,
    check_identity,
    encode_values,
    get_record_name,
    make_features,
)
from dit_video.data.records import SPLITS, get_file_name, get_part_name, write_metadata, write_records
from dit_video.data.tables import (
    INDEX_FOLDER,
    MANIFEST,
    compute_row_id,
    list_parquet,
    map_threads,
    read_parquet,
    write_column,
    write_manifest,
    write_part,
)
from dit_video.tokens import Field, Grid

_PLACE = {"offset": pa.int64(), "length": pa.int64(), "crc32": pa.uint32()}
_SCHEMA = pa.schema(
    {
        "id": pa.uint64(),
        **dict.fromkeys(("name", "clip", "payload", "outcome", "reason"), pa.string()),
        "written_captions": pa.list_(pa.string()),
        **dict.fromkeys((*SIZE_COLUMNS, "channels"), pa.int32()),
        **_PLACE,
    }
)
_TEXT_SCHEMA = pa.schema({"id": pa.uint64(), "tokens": pa.int32(), "width": pa.int32(), **_PLACE})
_MAX_SCALE = 127


@dataclass(frozen=True, kw_only=True)
class LatentWriter:
    """A writer of a data set of latents. Any number of processes write its parts, in any order, each part once.

    Once all parts are written, further ones may be added by a writer with another plan.

    Raises:
      UserError: If the folder holds something else, or unfinished parts of another plan.
    """

    folder: StoragePath
    identity: Identity
    """Identity of the autoencoder and of all else that latents depend on; `LatentSource` checks it."""
    num_files: int
    """Number of the parts that are added."""
    plan_hash: str = ""
    """Hash of the examples of each part."""
    dtype: StorageDtype = "bfloat16"
    fields: tuple[Field, ...] = ()
    """Further fields, which every example has."""

    def __post_init__(self):
        options = {
            "version": VERSION,
            "identity": self.identity if isinstance(self.identity, str) else dict(self.identity),
            "dtype": self.dtype,
            "fields": [_describe_field(field) for field in self.fields],
        }
        if not (self.folder / PLAN).exists():
            # A name that begins with a dot is a file that another process is writing at this moment.
            others = self.folder.exists() and any(not path.name.startswith(".") for path in self.folder.iterdir())
            if not (self.folder / PLAN).exists():  # another process may have written it in the meantime
                if others:
                    raise UserError(f"{self.folder} exists and holds no latents. Use a folder that does not exist.")
                write_document(self.folder / PLAN, options | {"files": [self.num_files], "plans": [self.plan_hash]})
        written = _read_plan(self.folder)
        check_identity(self.folder, written["identity"], self.identity)
        files, plans = written.pop("files"), written.pop("plans")
        is_new = self.num_files > 0 and (files[-1], plans[-1]) != (self.num_files, self.plan_hash)
        count = len(list_parquet(self.folder / INDEX_FOLDER)) if is_new else 0
        if written != options or (is_new and count not in (sum(files), sum(files[:-1]))):
            raise UserError(
                f"{self.folder} was started with other options ({files[-1]} files of {written['dtype']}, plan "
                f"{plans[-1]}; now {self.num_files} of {self.dtype}, plan {self.plan_hash}). Use the same options and "
                f"clips, or another folder, or remove index/train-{sum(files[:-1]):05d}.parquet and all after it."
            )
        if is_new:
            if count < sum(files):  # of the last plan nothing is written
                files, plans = files[:-1], plans[:-1]
            files, plans = [*files, self.num_files], [*plans, self.plan_hash]
            write_document(self.folder / PLAN, options | {"files": files, "plans": plans})

    def has_file(self, number: int) -> bool:
        """Return whether a part is written."""
        return (self.folder / INDEX_FOLDER / f"{self._get_part(number)}.parquet").exists()

    def write(
        self,
        number: int,
        examples: Iterable[LatentExample | Skipped],
        texts: Iterable[tuple[str, Float32[np.ndarray, "_ e"]]] = (),
    ) -> None:
        """Write one part atomically.

        Args:
          number: Number of the part, among those that are added.
          examples: Its examples.
          texts: Captions and their embeddings, in addition to those of the examples.

        Raises:
          UserError: If latents are empty, not finite, or differ in channels from those before them.
        """
        part, widths = self._get_part(number), _ExampleShapes(self.fields)
        rows: list[dict[str, Any]] = []
        embeddings: dict[str, Float32[np.ndarray, "s e"]] = {}

        def records() -> Iterator[dict[str, Any]]:
            for example in examples:
                if isinstance(example, Skipped):
                    rows.append(_make_row(example, outcome="unreadable", reason=example.reason))
                    continue
                captions = _get_captions(example)
                widths.check(example, captions)
                embeddings.update(zip(captions, example.text, strict=bool(example.text)) if example.text else ())
                size = dict(zip((*SIZE_COLUMNS, "channels"), example.latents.shape, strict=True))
                rows.append(_make_row(example, outcome="kept", written_captions=list(captions), **size))
                yield self._make_record(example)

        name = get_file_name(DATASET_NAME, part)
        places = iter(write_records(self.folder / name, make_features(self.fields), records()))
        rows = [row | next(places)._asdict() if row["outcome"] == "kept" else row for row in rows]
        for caption, text in texts:
            widths.check_text(caption, text)
            embeddings[caption] = text
        if embeddings:
            self._write_texts(part, embeddings)
        # Last, as its existence marks the part as finished.
        write_part(self.folder, part, pa.Table.from_pylist(rows, schema=_SCHEMA))

    def finish(self, *, captions: Callable[[int], Sequence[str] | None] | None = None) -> bool:
        """Write the table once all parts exist: every process calls this, and the last one succeeds.

        Args:
          captions: Function from the id of an example to its captions now, or to None if it is no longer used; by
            default all are used, with the captions with which they were written.

        Returns:
          True if the data set is finished.

        Raises:
          UserError: If no clip could be encoded, or the parts disagree on the number of channels.
        """
        count = sum(_read_plan(self.folder)["files"])
        if not _is_complete(self.folder, count):
            return False
        parts = [get_part_name(SPLITS[0], number) for number in range(count)]
        tables = _read_parts(self.folder, parts)
        rows = pa.concat_tables(tables)
        own = [texts or () for texts in rows["written_captions"].to_pylist()]
        texts = own if captions is None else list(map(captions, rows["id"].to_pylist()))
        is_chosen = [each is not None for each in texts]
        is_used = pc.and_(pc.equal(rows["outcome"], "kept"), pa.array(is_chosen))
        if not pc.any(is_used).as_py():
            skipped = rows.filter(pc.equal(rows["outcome"], "unreadable")).slice(0, 1).to_pylist()
            reason = f": {skipped[0]['name']}: {skipped[0]['reason']}" if skipped else ". Encode at least one clip."
            raise UserError(f"{self.folder} gets no latents, {len(rows)} clips could not be read{reason}")
        channels = self._get_only(rows.filter(is_used)["channels"], "channels")
        ids = [None if each is None else list(map(compute_row_id, each)) for each in texts]
        columns = {
            "id": rows["id"],
            "chosen": is_chosen,
            "captions": pa.array(texts, pa.list_(pa.string())),
            "caption_ids": pa.array(ids, pa.list_(pa.uint64())),
        }
        has_texts = self._finish_texts()  # before the captions, so that a reader finds the embeddings of all
        write_column(self.folder, "captions", columns)
        counts = [pc.sum(pc.equal(table["outcome"], "kept")).as_py() or 0 for table in tables]
        write_metadata(self.folder, DATASET_NAME, {SPLITS[0]: counts}, features=make_features(self.fields))
        settings = {
            "identity": self.identity if isinstance(self.identity, str) else dict(self.identity),
            "dtype": self.dtype,
            "channels": channels,
            "fields": [_describe_field(field) for field in self.fields],
            "has_texts": has_texts,
        }
        write_manifest(self.folder, KIND, settings, parts)
        return True

    def _finish_texts(self) -> bool:
        parts = list_parquet(self.folder / TEXTS / INDEX_FOLDER)
        if parts:
            widths = pa.concat_tables(_read_parts(self.folder / TEXTS, parts, ["width"]))["width"]
            write_manifest(self.folder / TEXTS, TEXTS, {"width": self._get_only(widths, "text width")}, parts)
        return bool(parts)

    def _get_only(self, values: pa.ChunkedArray, name: str) -> int:
        distinct = sorted(pc.unique(values).to_pylist())
        if len(distinct) > 1:
            raise UserError(f"the files of {self.folder} disagree on {name} ({distinct}). Encode into another folder.")
        return distinct[0]

    def _write_texts(self, part: str, embeddings: Mapping[str, Float32[np.ndarray, "s e"]]) -> None:
        examples = ({"text": encode_values(text, self.dtype), "caption": each} for each, text in embeddings.items())
        places = write_records(self.folder / TEXTS / get_file_name(TEXTS, part), TEXT_FEATURES, examples)
        rows = [
            {"id": compute_row_id(caption), "tokens": len(text), "width": text.shape[1], **place._asdict()}
            for (caption, text), place in zip(embeddings.items(), places, strict=True)
        ]
        write_part(self.folder / TEXTS, part, pa.Table.from_pylist(rows, schema=_TEXT_SCHEMA))

    def _make_record(self, example: LatentExample) -> dict[str, Any]:
        latents, scale = example.latents, b""
        if self.dtype == "int8":
            steps = np.maximum(np.abs(latents).max(axis=(0, 1, 2)) / _MAX_SCALE, np.finfo(np.float32).tiny)
            scale = encode_values(steps, "float32")
            content = np.rint(latents / steps).astype(np.int8).tobytes()
        else:
            content = encode_values(latents, self.dtype)
        return {
            "latents": content,
            "scale": scale,
            "shape": np.asarray(latents.shape, np.int32),
            "name": example.name,
            **{
                get_record_name(field): encode_values(example.fields[field.name], self.dtype, field.dtype)
                for field in self.fields
            },
        }

    def _get_part(self, number: int) -> str:
        files = _read_plan(self.folder)["files"]
        return get_part_name(SPLITS[0], sum(files[:-1]) + number)


def read_encoded(folder: StoragePath) -> tuple[UInt64[np.ndarray, " n"], UInt64[np.ndarray, " m"]]:
    """Return the ids of the examples and of the captions that a folder holds, of plans all of whose parts are written.

    Parts of a plan that is not finished do not count, so that the same plan is made again.
    """
    if not (folder / PLAN).exists():
        return np.zeros(0, np.uint64), np.zeros(0, np.uint64)
    files = _read_plan(folder)["files"]
    count = sum(files) if _is_complete(folder, sum(files)) else sum(files[:-1])
    parts = [get_part_name(SPLITS[0], number) for number in range(count)]
    text_parts = sorted({*parts} & {*list_parquet(folder / TEXTS / INDEX_FOLDER)})
    return _read_ids(folder, parts), _read_ids(folder / TEXTS, text_parts)


def _read_ids(folder: StoragePath, parts: Sequence[str]) -> UInt64[np.ndarray, " n"]:
    tables = _read_parts(folder, parts, ["id"])
    return pa.concat_tables(tables)["id"].to_numpy() if tables else np.zeros(0, np.uint64)


def _read_parts(folder: StoragePath, parts: Sequence[str], columns: Sequence[str] | None = None) -> list[pa.Table]:
    return map_threads(lambda part: read_parquet(folder / INDEX_FOLDER / f"{part}.parquet", columns), parts)


def _read_plan(folder: StoragePath) -> dict[str, Any]:
    written = read_document(folder / PLAN)
    if not isinstance(written, dict) or written.get("version") != VERSION:
        raise UserError(f"{folder / PLAN} is not of version {VERSION}. Encode the clips into another folder.")
    return written


def _is_complete(folder: StoragePath, count: int) -> bool:
    return len(list_parquet(folder / INDEX_FOLDER)) == count


def _make_row(example: LatentExample | Skipped, **values: Any) -> dict[str, Any]:
    """Return a row of the index; numbers that it does not have are 0."""
    numbers = dict.fromkeys((field.name for field in _SCHEMA if pa.types.is_integer(field.type)), 0)
    texts = {"name": example.name, "clip": example.clip or example.name, "payload": example.payload, "reason": ""}
    return numbers | texts | {"id": compute_row_id(example.name, example.payload)} | values


def write_latents(
    destination: str | os.PathLike,
    examples: Iterable[LatentExample],
    *,
    identity: Identity,
    fields: Sequence[Field] = (),
    dtype: StorageDtype = "bfloat16",
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Write the data set `destination` in one file, atomically. Latents in that folder are replaced.

    Args:
      destination: A local folder.
      examples: The examples, read once, one at a time, in order.
      identity: Identity of the autoencoder; `LatentSource` checks it.
      fields: Further fields, which every example has.
      dtype: Stored type of the values; they are read as float32.
      progress: Called with the number of examples done.

    Raises:
      UserError: If there are no examples; latents are empty, not finite, or differ in channels from those before them;
        or the destination holds something other than latents.
    """
    if is_remote(destination):
        raise UserError(f"{destination} is an address. Write it with `LatentWriter`, or use a folder on this machine.")
    destination = Path(destination)
    is_used = destination.is_file() or (destination.is_dir() and any(destination.iterdir()))
    if is_used and not (destination / MANIFEST).is_file():
        raise UserError(f"{destination} exists and holds no latents. Use a folder that does not exist.")

    def counted() -> Iterator[LatentExample]:
        done = 0
        for done, example in enumerate(examples, 1):
            yield example
            progress(done)
        if not done:
            raise UserError(f"there are no latents to write to {destination}. Encode at least one clip.")

    with atomic_path(destination) as folder:
        writer = LatentWriter(folder=folder, identity=identity, num_files=1, dtype=dtype, fields=tuple(fields))
        writer.write(0, counted())
        writer.finish()


def _describe_field(field: Field) -> dict[str, Any]:
    return vars(field) | {"shape": list(field.shape)}


def _get_captions(example: LatentExample) -> tuple[str, ...]:
    if isinstance(example.captions, str):
        return (example.captions,) if example.captions else ()
    return tuple(example.captions)


class _ExampleShapes:
    """Sizes that must be equal for all examples.

    They are the channels of the latents, the width of caption embeddings (0 without any), and the shapes of the fields.
    """

    def __init__(self, fields: Sequence[Field]) -> None:
        self.channels = self.text = 0
        self._fields = fields

    def check(self, example: LatentExample, captions: tuple[str, ...]) -> None:
        """Raise `UserError` for an example of other sizes, or with values that are not finite."""
        name, shape = example.name, example.latents.shape
        if len(shape) != 4 or 0 in shape or shape[-1] != (self.channels or shape[-1]):
            expected = self.channels or (shape[-1] if shape else 0)
            raise UserError(f"latents of {name} have the shape {list(shape)}, but all must be [t h w {expected}]")
        if not np.isfinite(example.latents).all():
            raise UserError(f"latents of {name} are not finite. Check the autoencoder that encoded them.")
        self.channels = shape[-1]
        self._check_fields(example)
        if example.text and len(example.text) != len(captions):
            raise UserError(f"{name} has {len(captions)} captions and {len(example.text)} embeddings. Give as many.")
        for text in example.text:
            self.check_text(name, text)

    def check_text(self, name: str, text: np.ndarray) -> None:
        """Raise `UserError` for an embedding of another width, or with values that are not finite."""
        expected = self.text or text.shape[-1]
        if text.ndim != 2 or 0 in text.shape or text.shape[-1] != expected or not np.isfinite(text).all():
            raise UserError(f"{name} has an embedding of shape {list(text.shape)}; use finite [s {expected}]")
        self.text = expected

    def _check_fields(self, example: LatentExample) -> None:
        """Raise `UserError` for an example that lacks a field, or has one of another shape or with other values."""
        names, own = {field.name for field in self._fields}, set(example.fields)
        if names != own:
            raise UserError(
                f"{example.name} has the fields {', '.join(sorted(own)) or 'none'}, but the data set has "
                f"{', '.join(sorted(names)) or 'none'}. Give every example the fields of the data set."
            )
        for field in self._fields:
            values = example.fields[field.name]
            shape = field.get_shape(Grid(*example.latents.shape[:3]))
            if values.shape != shape:
                raise UserError(
                    f"the field {field.name} of {example.name} has the shape {list(values.shape)}, not {list(shape)}. "
                    "Encode all clips with the same options."
                )
            if not np.isfinite(values).all():
                raise UserError(f"the field {field.name} of {example.name} is not finite. Check its encoder.")
