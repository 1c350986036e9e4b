"""Lists of clips and captions: CSV or TSV with a header line, JSON Lines, JSON or Parquet.

The clip's path is in the column `file_name` (Hugging Face's folders), `path` (as written by Open-Sora's tools), `video`
(OpenVid-1M, DiffSynth-Studio), `video_path` or `image_path` (musubi-tuner), `file_path` (VideoX-Fun) or `media_path`
(LTX-Video's trainer), its captions are in `text`, `caption`, `captions`, `prompt` and `cap` (Open-Sora-Plan), and its
split in `split`, if there is one; other columns are ignored. In JSON and Parquet a caption may be a list of captions.
JSON holds a list of objects, alone or as the only one in an object, or an object of captions by path.

A malformed row is rejected alone. After a bad CSV row, parsing resumes at the line after the row's first line, as
otherwise a quote that is never closed would swallow all following rows. (The later lines of a bad row that has several
are then parsed as rows, and each of them is rejected on its own.)
"""

import contextlib
import csv
import io
import json
import os
import posixpath
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from upath import UPath

from dit_video.core.errors import UserError
from dit_video.core.storage import StoragePath, open_file, read_range
from dit_video.data.ingest.formats.listing import (
    CAPTION_FIELDS,
    MEDIA,
    SPLITS,
    ListColumns,
    ListedClip,
    Listing,
    ListingOptions,
    Rejection,
    UnusableClipError,
    check_name,
    clean_captions,
    escape_name,
    get_suffix,
    make_listing,
    read_caption_fields,
    reject_unusable,
)
from dit_video.data.ingest.formats.scan import list_file, scan_folder

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
"""Suffixes of lists of clips."""
NAME_COLUMNS = ("file_name", "path", "video", "video_path", "file_path", "media_path", "image_path")
"""Columns that may hold the clip's path; the first one that exists is used."""
SPLIT_COLUMN = "split"
MAX_LINE_BYTES = 4 << 20
"""Maximum size of a line in bytes (of a CSV, in characters): a file of one line may have any size."""


class ListRow(NamedTuple):
    """A row of a list of clips."""

    location: str
    """Location of the row in messages, such as "line 3", from 1."""
    name: str
    """Name of the clip as written; empty if the row cannot be read."""
    texts: tuple[str, ...] = ()
    """Captions as written."""
    problem: str = ""
    """Reason why the row cannot be used, empty if it can. If the row has a name, the problem is about its captions."""
    split: str = ""
    """Split as written; empty if there is none."""

    def clean_captions(self) -> tuple[str, ...]:
        """Return the cleaned captions.

        Raises:
          UnusableClipError: If the captions cannot be used.
        """
        if self.problem:
            raise UnusableClipError(self.problem)
        return clean_captions(self.texts)

    def find_split(self) -> str:
        """Return the split, empty if the row says none.

        Raises:
          UnusableClipError: If there is no such split.
        """
        if not self.split:
            return ""
        if (word := self.split.lower()) not in SPLITS:
            raise UnusableClipError(f"its split {self.split!r} is unknown; use train, validation or test")
        return SPLITS[word]


class ClipTable(NamedTuple):
    """Rows of a list, or of several lists, grouped by clip."""

    rows: dict[str, list[ListRow]]
    """Rows of each clip by its normalised name, in the order in which clips are first named."""
    rejected: list[Rejection]
    """Rows that belong to no clip, by file and line."""
    is_merged: bool = False
    """True if messages name the list of each row, as there are several."""

    def add(self, name: str, rows: Iterable[ListRow], key: Callable[[str], str]) -> None:
        """Add the rows of a list.

        Args:
          name: Name of the list in messages.
          rows: Its rows.
          key: Normalises a name, so that a clip has one key; raises `UnusableClipError` for an invalid name.

        Raises:
          UserError: If the list is unusable as a whole, see `read_rows`.
        """
        for row in rows:
            if not row.name:
                self.rejected.append((f"{name}, {row.location}", row.problem))
                continue
            if self.is_merged:
                row = row._replace(location=f"{name}, {row.location}")
            with reject_unusable(self.rejected, row.name, f"{row.location}: "):
                check_name(row.name)
                self.rows.setdefault(key(row.name), []).append(row)


def list_table(source: StoragePath, options: ListingOptions) -> Listing:
    """Return the clips of a list whose paths are absolute, or relative to its folder; in a bucket, below its folder.

    A clip is named by its path relative to that folder. If any clip lies outside of it, all are named by their paths
    relative to the deepest folder that contains all of them. Rejected rows keep the name that is in the list.

    Raises:
      UserError: If there is no clip, or the list is unusable as a whole, see `read_rows`.
    """
    if not isinstance(source, Path):
        return _list_remote_table(source, options)
    root = os.path.abspath(source.parent)
    table = ClipTable({}, [])
    table.add(source.name, read_rows(source, options.columns), lambda name: os.path.normpath(os.path.join(root, name)))
    found_clips, rejected = find_clips(table, lambda path: list_file(_make_relative(path, root), path))
    if not found_clips:
        check_is_usable(source, table)
    folders = {os.path.dirname(clip.path) for clip in found_clips}
    if found_clips and os.path.commonpath([root, *folders]) != root:
        root = os.path.commonpath(folders)
    clips: list[ListedClip] = []
    for clip in found_clips:
        with reject_unusable(rejected, clip.name):  # if a folder between the root and the clip has an invalid name
            check_name(name := _make_relative(clip.path, root))
            clips.append(clip._replace(name=name))
    return make_listing(source, "table", clips, rejected=rejected)


def _list_remote_table(source: UPath, options: ListingOptions) -> Listing:
    scan, root = scan_folder(source.parent), str(source.parent).rstrip("/") + "/"

    def find_name(name: str) -> str:
        path = posixpath.normpath(name.removeprefix(root))
        if "://" in name.removeprefix(root) or path.startswith(("/", "../")):
            raise UnusableClipError(f"lies outside of {root}; a list in a bucket names files below its folder")
        return path

    table = ClipTable({}, [])
    table.add(source.name, read_rows(source, options.columns), find_name)
    clips, rejected = find_clips(table, scan.make_clip)
    if not clips:
        check_is_usable(source, table)
    return make_listing(source, "table", clips, rejected=rejected)


def _make_relative(path: str, home: str) -> str:
    return os.path.relpath(path, home).replace(os.sep, "/")


def find_clips(table: ClipTable, find: Callable[[str], ListedClip]) -> tuple[list[ListedClip], list[Rejection]]:
    """Return the clips of a list with their captions, and the entries of the list that cannot be used.

    Args:
      table: The list.
      find: Returns the clip of a key of the table; raises `FileNotFoundError` or `UnusableClipError`.
    """
    clips: list[ListedClip] = []
    rejected = [*table.rejected]
    for key, rows in table.rows.items():
        location = rows[0].location
        try:
            clip = find(key)
            texts: list[str] = []
            splits: list[str] = []
            for row in rows:
                location = row.location
                texts += row.clean_captions()
                splits += filter(None, [row.find_split()])
            if len(set(splits)) > 1:
                raise UnusableClipError(
                    f"is in the splits {' and '.join(sorted(set(splits)))}; name it for one of them"
                )
            clips.append(clip._replace(captions=clean_captions(texts), split=splits[0] if splits else ""))
        except FileNotFoundError:
            rejected.append((rows[0].name, f"{location} names it, but it is not there"))
        except UnusableClipError as error:
            rejected.append((rows[0].name, f"{location}: {error}"))
    return clips, rejected


def check_is_usable(path: StoragePath, table: ClipTable) -> None:
    """Refuse a list of which no clip is found, where the reason is the whole list's.

    Raises:
      UserError: If the list has no rows, or holds media itself.
    """
    if not table.rows and not table.rejected:
        raise UserError(f"{path} has no rows; write one for each clip, with its file_name and text")
    check_no_media(path)


def check_no_media(path: StoragePath, columns: ListColumns | None = None) -> None:
    """Refuse a Parquet table that holds media itself, as Hugging Face's hub writes them, instead of naming files.

    Args:
      path: A list of any kind.
      columns: Columns with other names than the known ones; None if no file has a name that the list has.

    Raises:
      UserError: If the column of names, or any where there is none or no such file, holds bytes.
    """
    if path.suffix.lower() != ".parquet":
        return
    try:
        with _open_parquet(path) as file:
            schema = file.schema_arrow
    except (OSError, UserError):  # which reading the list explains
        return
    _check_schema(path, schema, columns)


def _check_schema(path: StoragePath, schema: Any, columns: ListColumns | None) -> None:
    """Check an open Parquet table as `check_no_media` does."""
    found = [each.name for each in schema if _holds_bytes(each.type)]
    names = () if columns is None else _get_name_columns(columns)
    name = next((name for name in names if name in schema.names), None)
    if found and name in (None, *found):
        rule = f"{path} names no files that are there, but holds media or other bytes in its column {', '.join(found)}"
        raise UserError(f"{rule}; media in a table are not read. Write them to files: docs/data.md, Media in a table")


def _get_name_columns(columns: ListColumns) -> tuple[str, ...]:
    """Return the columns that may hold the clip's path."""
    return NAME_COLUMNS if columns.name is None else (columns.name,)


def _holds_bytes(type: Any) -> bool:
    """Return whether values of an Arrow type are bytes, objects with bytes, as Hugging Face writes media, or lists."""
    from pyarrow import types

    if types.is_list(type) or types.is_large_list(type):
        return _holds_bytes(type.value_type)
    if types.is_struct(type):
        return type.get_field_index("bytes") >= 0
    return types.is_binary(type) or types.is_large_binary(type)


def read_rows(path: StoragePath, columns: ListColumns) -> Iterator[ListRow]:
    """Yield the rows of a list in its order.

    Bytes that are not UTF-8 become surrogates in names and captions, and are rejected later, clip by clip.

    Args:
      path: The list.
      columns: Columns with other names than the known ones.

    Raises:
      UserError: If the list cannot be read, no column (in JSON: no field of any object) holds names or captions, or it
        holds media itself.
    """
    if not path.is_file():  # first, as opening a pipe would block forever
        raise UserError(f"{path} is not a regular file; write the list into a regular file")
    readers = {
        ".csv": _read_csv_rows,
        ".tsv": _read_csv_rows,
        ".parquet": _read_parquet_rows,
        ".json": _read_json_rows,
    }
    with _convert_read_errors(path):
        yield from readers.get(path.suffix.lower(), _read_json_line_rows)(path, columns)


class _Columns(NamedTuple):
    """Columns of a list that are read."""

    name: str
    captions: tuple[str, ...]
    split: str | None

    @property
    def all(self) -> list[str]:
        return [self.name, *self.captions, *([] if self.split is None else [self.split])]


@contextlib.contextmanager
def _convert_read_errors(path: StoragePath) -> Iterator[None]:
    """Turn the error that a list cannot be read into one for the user."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); make it readable") from error


def _read_text(path: StoragePath) -> str:
    return read_range(path).decode("utf-8-sig", "surrogateescape")


def read_paired_rows(names: StoragePath, texts: StoragePath) -> Iterator[ListRow]:
    """Yield the rows of two lists, of a path and of a caption in each line (finetrainers).

    Raises:
      UserError: If a list cannot be read, or they have different numbers of lines.
    """
    lines = []
    for path in (names, texts):
        with _convert_read_errors(path):
            lines.append(_read_text(path).rstrip().split("\n"))
    counts = [len(each) for each in lines]
    if counts[0] != counts[1]:
        rule = f"{names} has {counts[0]} lines, {texts} has {counts[1]}"
        raise UserError(f"{rule}; write one path and one caption a line, in the same order")
    for line, (name, text) in enumerate(zip(*lines, strict=True), 1):
        problem = "" if name.strip() else "names no file: its line is empty"
        yield ListRow(f"line {line}", name.strip(), (text,), problem)


def is_list(path: StoragePath, columns: ListColumns) -> bool:
    """Return whether a file is a list of clips and captions, by its first line, its schema or its JSON entries.

    Raises:
      UserError: If it holds media itself instead of their paths.
    """
    suffix = path.suffix.lower()
    if suffix not in TABLE_SUFFIXES or not path.is_file():
        return False
    try:
        if suffix == ".parquet":
            with _open_parquet(path) as file:
                header: Iterable[str] = file.schema_arrow.names
        elif suffix == ".json":
            return any(row.name and row.texts for row in _read_json_rows(path, columns))
        else:
            with open_file(path) as file:
                line = file.readline(1 << 20).decode("utf-8-sig", "replace")
            header = _parse_json_object(line) if suffix == ".jsonl" else next(_read_csv([line], path), [])
        _find_columns(path, [column.strip() for column in header], columns)
    except (OSError, UnusableClipError, UserError, csv.Error):
        return False
    check_no_media(path, columns)
    return True


def _find_columns(path: StoragePath, header: Sequence[str], columns: ListColumns) -> _Columns:
    """Return the columns of a list that are read.

    Raises:
      UserError: If a column is missing.
    """
    names = _get_name_columns(columns)
    split = SPLIT_COLUMN if columns.split is None else columns.split
    name = next((name for name in names if name in header), None)
    texts = [text for text in columns.captions or CAPTION_FIELDS if text in header]
    missing = [] if name else [names[0]]
    missing += [text for text in columns.captions if text not in header] or ([] if texts else ["text"])
    missing += [split] if columns.split is not None and split not in header else []
    if missing or name is None:
        first_line, fix = escape_name(",".join(header))[:200], "name the columns file_name,text or path,text, in UTF-8"
        fix += ", or ingest it with tools/ingest.py --columns.name … --columns.captions …"
        raise UserError(f"{path} has no column {' and '.join(missing)}, its first line is {first_line!r}; {fix}")
    return _Columns(name, tuple(texts), split if split in header else None)


def _read_csv_rows(path: StoragePath, columns: ListColumns) -> Iterator[ListRow]:
    # newline="" keeps line ends inside quoted captions.
    with io.TextIOWrapper(open_file(path), "utf-8-sig", "surrogateescape", newline="") as file:
        yield from _read_csv_lines(path, iter(lambda: file.readline(MAX_LINE_BYTES), ""), columns)


def _read_csv(lines: Iterable[str], path: StoragePath, *, strict: bool = False) -> Iterator[list[str]]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    return csv.reader(lines, delimiter=delimiter, strict=strict)


def _read_csv_lines(path: StoragePath, lines: Iterator[str], columns: ListColumns) -> Iterator[ListRow]:
    rows = _parse_csv(lines, path)
    _, first = next(rows, (1, []))
    header = [column.strip() for column in first] if isinstance(first, list) else []
    read = _find_columns(path, header, columns)
    name_index = header.index(read.name)
    text_indices = [index for text in read.captions for index, column in enumerate(header) if column == text]
    for line, fields in rows:
        location = f"line {line}"
        if isinstance(fields, csv.Error):
            problem = f'is not a valid CSV row ({fields}); write captions in double quotes, "" for a quote'
            yield ListRow(location, "", problem=problem)
        elif len(fields) != len(header):
            problem = f"fields: {len(fields)}, columns: {len(header)}; put captions that hold commas in double quotes"
            yield ListRow(location, "", problem=problem)
        elif not (name := fields[name_index].strip()):
            yield ListRow(location, "", problem=f"names no file: its {read.name} is empty")
        else:
            split = "" if read.split is None else fields[header.index(read.split)].strip()
            yield ListRow(location, name, tuple(fields[index] for index in text_indices), split=split)


def _parse_csv(lines: Iterator[str], path: StoragePath) -> Iterator[tuple[int, list[str] | csv.Error]]:
    """Yield (number of the first line, fields or the error) of every row that is not blank.

    The lines of one row alone are in memory: a quote that is never closed ends in an error after 128 Ki characters,
    `csv`'s limit of a field.
    """
    number, row_lines, repeated = 1, list[str](), deque[str]()

    def read_lines() -> Iterator[str]:
        while line := repeated.popleft() if repeated else next(lines, ""):
            row_lines.append(line)
            yield line

    while True:
        # Strict, as otherwise a quote that is never closed silently turns the rest of the file into one caption. A new
        # reader after each error continues at the next line.
        try:
            for fields in _read_csv(read_lines(), path, strict=True):
                if fields:
                    yield number, fields
                number += len(row_lines)
                row_lines.clear()
            return
        except csv.Error as error:
            yield number, error
            repeated.extendleft(reversed(row_lines[1:]))
            number += 1
            row_lines.clear()


@contextlib.contextmanager
def _open_parquet(path: StoragePath) -> Iterator[Any]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with open_file(path) as file:
            yield ParquetFile(file)
    except ArrowException as error:
        raise UserError(f"{path} is not a Parquet file ({error}); write it again") from error


def _read_parquet_rows(path: StoragePath, columns: ListColumns) -> Iterator[ListRow]:
    with _open_parquet(path) as file:
        _check_schema(path, file.schema_arrow, columns)
        read, number = _find_columns(path, file.schema_arrow.names, columns), 0
        for batch in file.iter_batches(batch_size=4096, columns=read.all):
            for fields in batch.to_pylist():
                number += 1
                yield _parse_object(f"row {number}", fields, columns)


def _read_json_line_rows(path: StoragePath, columns: ListColumns) -> Iterator[ListRow]:
    with open_file(path) as file:
        yield from _parse_objects(path, _read_json_lines(file), columns)


def _read_json_lines(file: io.BufferedIOBase) -> Iterator[tuple[str, str | UnusableClipError]]:
    number = 0
    while content := file.readline(MAX_LINE_BYTES):
        number += 1
        if len(content) == MAX_LINE_BYTES and not content.endswith(b"\n"):
            while (rest := file.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                pass
            yield f"line {number}", UnusableClipError(f"has more than {MAX_LINE_BYTES:,} bytes, the limit of a line")
        elif text := content.decode("utf-8-sig" if number == 1 else "utf-8", "surrogateescape").strip():
            yield f"line {number}", text


def _read_json_rows(path: StoragePath, columns: ListColumns) -> Iterator[ListRow]:
    yield from _parse_objects(path, _read_json(path, columns), columns)


def _read_json(path: StoragePath, columns: ListColumns) -> Iterable[tuple[str, Any]]:
    """Return the entries of a JSON file, parsed or as JSON text, by location; it may have one a line.

    Raises:
      UserError: If the file is not JSON, or holds no entries.
    """
    text = _read_text(path)
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        if "Extra data" in str(error):  # after a first object: one a line
            return _read_json_lines(io.BytesIO(text.encode(errors="surrogateescape")))
        raise UserError(f"{path} is not JSON ({error}); write a list of objects") from error
    if isinstance(entries, dict):
        entries = _find_entries(entries, columns)
    if not isinstance(entries, list):
        raise UserError(f'{path} holds no list of clips; write [{{"file_name": "…", "text": "…"}}, …]')
    return ((f"entry {number}", row) for number, row in enumerate(entries, 1))


def _find_entries(fields: dict[str, Any], columns: ListColumns) -> list[Any] | None:
    """Return the entries of a JSON object: of the only list of objects in it, itself, or of captions by path."""
    lists = [rows for rows in fields.values() if isinstance(rows, list) and any(isinstance(row, dict) for row in rows)]
    if len(lists) == 1:
        return lists[0]
    names, texts = (columns.name,) if columns.name else NAME_COLUMNS, columns.captions or CAPTION_FIELDS
    if not fields.keys().isdisjoint(names):
        return [fields]
    if all(get_suffix(name) in MEDIA for name in fields):
        described = ((name, value if isinstance(value, dict) else {texts[0]: value}) for name, value in fields.items())
        return [{**value, names[0]: name} for name, value in described]
    return None


def _parse_objects(path: StoragePath, rows: Iterable[tuple[str, Any]], columns: ListColumns) -> Iterator[ListRow]:
    """Yield the rows of objects, parsed or as JSON text, by location.

    Raises:
      UserError: If no object has a caption.
    """
    fields = columns.captions or CAPTION_FIELDS
    count, has_captions = 0, False
    for location, row in rows:
        try:
            parsed = _parse_json_object(row)
        except UnusableClipError as error:
            yield ListRow(location, "", problem=str(error))
            continue
        count += 1
        has_captions = has_captions or any(field in parsed for field in fields)
        yield _parse_object(location, parsed, columns)
    if count and not has_captions:
        fix = 'write {"file_name": "…", "text": "…"} ("text": null for a clip without a caption)'
        raise UserError(f"{path} has no field {fields[0]} in any of its {count} objects; {fix}")


def _parse_object(location: str, fields: Mapping[str, Any], columns: ListColumns) -> ListRow:
    names = _get_name_columns(columns)
    name = next((fields[field] for field in names if fields.get(field)), None)
    if not isinstance(name, str) or not name.strip():
        return ListRow(location, "", problem='names no file; write {"file_name": "…", "text": "…"}')
    split = fields.get(columns.split or SPLIT_COLUMN) or ""
    try:
        texts = read_caption_fields(fields, columns.captions or CAPTION_FIELDS)
    except UnusableClipError as error:
        return ListRow(location, name.strip(), problem=str(error))
    return ListRow(location, name.strip(), tuple(texts), split=str(split).strip())


def _parse_json_object(row: Any) -> dict[str, Any]:
    if isinstance(row, UnusableClipError):
        raise row
    if isinstance(row, str):
        try:
            row = json.loads(row)
        except (ValueError, RecursionError) as error:
            raise UnusableClipError(f"is not JSON ({error}); it must be one object") from error
    if not isinstance(row, dict):
        raise UnusableClipError(f'is a {type(row).__name__}; write {{"file_name": "…", "text": "…"}}')
    return row
