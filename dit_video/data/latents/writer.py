"""Writer of cached latents: file by file, by any number of processes, and the index once all files exist."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Float32

from dit_video.core.errors import UserError
from dit_video.core.files import atomic_path
from dit_video.core.storage import StoragePath, is_remote, read_document, write_document
from dit_video.data.latents.cache import (
    DATASET_NAME,
    DTYPES,
    INDEX,
    PLAN,
    VERSION,
    Identity,
    LatentExample,
    Skipped,
    StorageDtype,
    check_identity,
    get_record_name,
    hash_identity,
    to_little_endian,
)
from dit_video.data.records import shards
from dit_video.tokens import Field, Grid


@dataclass(frozen=True, kw_only=True)
class LatentWriter:
    """A writer of a data set of latents. Any number of processes write its files, in any order, each file once.

    Raises:
      UserError: the folder holds something else, or files of another encoding.
    """

    folder: StoragePath
    identity: Identity
    """Identity of the autoencoder and of all else that latents depend on; `LatentSource` checks it."""
    num_files: int
    plan_hash: str = ""
    """Hash of the examples of each file."""
    dtype: StorageDtype = "bfloat16"
    fields: tuple[Field, ...] = ()
    """Further fields, which every example has."""

    def __post_init__(self):
        expected = {
            "version": VERSION,
            "identity": self.identity if isinstance(self.identity, str) else dict(self.identity),
            "dtype": self.dtype,
            "files": self.num_files,
            "plan": self.plan_hash,
            "fields": [_describe_field(field) for field in self.fields],
        }
        if not (self.folder / PLAN).exists():
            # A name that begins with a dot is a file that another process is writing at this moment.
            others = self.folder.exists() and any(not path.name.startswith(".") for path in self.folder.iterdir())
            if not (self.folder / PLAN).exists():  # another process may have written it in the meantime
                if others:
                    raise UserError(f"{self.folder} exists and holds no latents. Use a folder that does not exist.")
                write_document(self.folder / PLAN, expected)
        written = read_document(self.folder / PLAN)
        if not isinstance(written, dict) or written.get("version") != VERSION:
            raise UserError(f"{self.folder / PLAN} is not of version {VERSION}. Encode the clips into another folder.")
        check_identity(self.folder, written["identity"], self.identity)
        if written != expected:
            raise UserError(
                f"{self.folder} was started with other options ({written['files']} files of {written['dtype']}, plan "
                f"{written['plan']}; now {self.num_files} of {self.dtype}, plan {self.plan_hash}). Use the same "
                "options or another folder."
            )

    def count_examples(self, number: int) -> int | None:
        """Return the number of examples of a finished file, with skipped ones; None if it is not finished."""
        part = self._get_part_path(number)
        if not part.exists():
            return None
        written = read_document(part)
        return len(written["examples"]["name"]) + len(written["left_out"])

    def write(self, number: int, examples: Iterable[LatentExample | Skipped]) -> None:
        """Write one file atomically.

        Raises:
          UserError: latents are empty, not finite, or differ in channels from those before them.
        """
        columns: dict[str, list] = {name: [] for name in _COLUMNS}
        skipped: list[Skipped] = []
        widths = _ExampleShapes(self.fields)

        def records() -> Iterator[dict[str, Any]]:
            for example in examples:
                if isinstance(example, Skipped):
                    skipped.append(example)
                    continue
                captions = _get_captions(example)
                widths.check(example, captions)
                columns["name"].append(example.name)
                columns["clip"].append(example.clip or example.name)
                columns["captions"].append(list(captions))
                columns["size"].append(list(example.latents.shape[:3]))
                columns["text"].append([len(text) for text in example.text])
                yield {
                    "latents": self._to_bytes(example.latents),
                    "shape": np.asarray(example.latents.shape, np.int32),
                    "text": b"".join(self._to_bytes(text) for text in example.text),
                    "name": example.name,
                    "captions": list(captions),
                    **{
                        get_record_name(field): self._to_bytes(example.fields[field.name], field.dtype)
                        for field in self.fields
                    },
                }

        features = _make_features(self.fields)
        shards.write_file(self.folder, DATASET_NAME, number, self.num_files, features=features, examples=records())
        part = {
            "channels": widths.channels,
            "text_width": widths.text,
            "examples": columns,
            "left_out": skipped,
        }
        write_document(self._get_part_path(number), part)  # last: its existence marks the file as finished

    def finish(self, *, empty_text: Float32[np.ndarray, "s e"] | None = None) -> bool:
        """Write the index once all files exist: every process calls this, and the last one succeeds.

        Args:
          empty_text: embedding of the empty caption, if captions are embedded.

        Returns:
          True if the data set is finished.

        Raises:
          UserError: no clip could be encoded, or the files disagree on the number of channels.
        """
        if (self.folder / INDEX).exists():
            return True
        paths = [self._get_part_path(number) for number in range(self.num_files)]
        if not all(path.exists() for path in paths):
            return False
        parts = [read_document(path) for path in paths]
        columns = {name: [value for part in parts for value in part["examples"][name]] for name in _COLUMNS}
        skipped = [one for part in parts for one in part["left_out"]]
        if not columns["name"]:
            reason = f": {skipped[0][0]}: {skipped[0][1]}" if skipped else ". Encode at least one clip."
            raise UserError(f"{self.folder} gets no latents, {len(skipped)} clips could not be read{reason}")
        channels = {part["channels"] for part in parts} - {0}
        text_widths = {part["text_width"] for part in parts} - {0}  # 0 where no clip has a caption
        if len(channels) > 1 or len(text_widths) > 1:
            raise UserError(
                f"the files of {self.folder} disagree on channels ({sorted(channels)}) or text width "
                f"({sorted(text_widths)}). Encode into another folder."
            )
        counts = [len(part["examples"]["name"]) for part in parts]
        shards.remove_partial_files(self.folder)
        shards.write_metadata(self.folder, DATASET_NAME, {shards.SPLIT: counts}, features=_make_features(self.fields))
        index = {
            "version": VERSION,
            "identity": self.identity if isinstance(self.identity, str) else dict(self.identity),
            "hash": hash_identity(self.identity),
            "dtype": self.dtype,
            "channels": channels.pop(),
            "text_width": max(text_widths, default=0),
            "empty_text": None if empty_text is None else empty_text.tolist(),
            "fields": [_describe_field(field) for field in self.fields],
            "examples": columns,
            "left_out": skipped,
        }
        write_document(self.folder / INDEX, index)
        return True

    def _get_part_path(self, number: int) -> StoragePath:
        return self.folder / "shards" / f"{number:05d}.json"

    def _to_bytes(self, values: np.ndarray, dtype: str = "float32") -> bytes:
        stored = DTYPES[self.dtype] if dtype == "float32" else dtype
        return to_little_endian(np.ascontiguousarray(values.astype(stored))).tobytes()


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
      destination: a local folder.
      examples: the examples, read once, one at a time, in order.
      identity: identity of the autoencoder; `LatentSource` checks it.
      fields: further fields, which every example has.
      dtype: stored type of the values; they are read as float32.
      progress: called with the number of examples done.

    Raises:
      UserError: there are no examples; latents are empty, not finite, or differ in channels from those before them; or
        the destination holds something other than latents.
    """
    if is_remote(destination):
        raise UserError(f"{destination} is an address. Write it with `LatentWriter`, or use a folder on this machine.")
    destination = Path(destination)
    is_used = destination.is_file() or (destination.is_dir() and any(destination.iterdir()))
    if is_used and not (destination / INDEX).is_file():
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


_COLUMNS = ("name", "clip", "captions", "size", "text")


def _describe_field(field: Field) -> dict[str, Any]:
    return vars(field) | {"shape": list(field.shape)}


def _make_features(fields: Sequence[Field]) -> dict[str, Any]:
    return {
        "latents": shards.make_bytes_feature(),
        "shape": tfds.features.Tensor(shape=(4,), dtype=np.int32),
        "text": shards.make_bytes_feature(),
        "name": tfds.features.Text(),
        "captions": tfds.features.Sequence(tfds.features.Text()),
        **{get_record_name(field): shards.make_bytes_feature() for field in fields},
    }


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
