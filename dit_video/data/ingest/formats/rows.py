"""Parsing of a list of clips and captions: CSV with a header line, or JSON Lines.

The clip's path is in the column `file_name` (as in Hugging Face's folders) or `path` (as written by Open-Sora's tools:
`path,text,num_frames,height,width,aspect_ratio,fps,resolution`), its captions in `text`, `caption` or `captions`;
other columns are ignored. In JSON Lines a caption may be a list of captions.

A malformed row is rejected alone. After a bad CSV row, parsing resumes at the line after the row's first line, as
otherwise a quote that is never closed would swallow all following rows. (The later lines of a bad row that has several
are then parsed as rows, and each of them is rejected on its own.)
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dit_video.core.errors import UserError
from dit_video.data.ingest.formats import captions
from dit_video.data.ingest.formats.types import UnusableClipError, escape_name

TABLE_SUFFIXES = (".csv", ".jsonl")
"""Suffixes of lists of clips."""
NAME_COLUMNS = ("file_name", "path")
"""Columns that may hold the clip's path; the first one that exists is used."""


class ListRow(NamedTuple):
    """A row of a list of clips."""

    line: int
    """Number of the line in which the row begins, from 1."""
    name: str
    """Name of the clip as written; empty if the row cannot be read."""
    texts: tuple[str, ...] = ()
    """Captions as written."""
    problem: str = ""
    """Reason why the row cannot be used, empty if it can. If the row has a name, the problem is about its captions."""

    def clean_captions(self) -> tuple[str, ...]:
        """Return the cleaned captions.

        Raises:
          UnusableClipError: the captions cannot be used.
        """
        if self.problem:
            raise UnusableClipError(self.problem)
        return captions.clean_captions(self.texts)


def read_rows(path: Path) -> Iterator[ListRow]:
    """Yield the rows of a list in its order.

    Bytes that are not UTF-8 become surrogates in names and captions, and are rejected later, clip by clip.

    Raises:
      UserError: the list cannot be read, or no column (in JSON Lines: no field of any line) holds names or captions.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a regular file; write the list into a regular file")
    try:
        yield from _read_csv_rows(path) if path.suffix.lower() == ".csv" else _read_json_rows(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); make it readable") from error


def is_list(path: Path) -> bool:
    """Return whether the first line of a file is that of a list of clips and captions."""
    if path.suffix.lower() not in TABLE_SUFFIXES or not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            line = file.readline(1 << 20).decode("utf-8-sig", "replace")
        is_json = path.suffix.lower() == ".jsonl"
        header: Iterable[str] = _parse_json_object(line) if is_json else next(csv.reader([line]), [])
    except (OSError, UnusableClipError, csv.Error):
        return False
    columns = {column.strip() for column in header}
    return not columns.isdisjoint(NAME_COLUMNS) and not columns.isdisjoint(captions.CAPTION_FIELDS)


def _read_csv_rows(path: Path) -> Iterator[ListRow]:
    text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
    rows = _parse_csv(list(io.StringIO(text, newline="")))  # newline="" keeps line ends inside quoted captions
    _, header = next(rows, (1, []))
    columns = [column.strip() for column in header] if isinstance(header, list) else []
    name_index, text_indices = _find_columns(path, columns)
    for line, fields in rows:
        if isinstance(fields, csv.Error):
            problem = f'is not a valid CSV row ({fields}); write captions in double quotes, "" for a quote'
            yield ListRow(line, "", problem=problem)
        elif len(fields) != len(columns):
            problem = f"fields: {len(fields)}, columns: {len(columns)}; put captions that hold commas in double quotes"
            yield ListRow(line, "", problem=problem)
        elif not (name := fields[name_index].strip()):
            yield ListRow(line, "", problem=f"names no file: its {columns[name_index]} is empty")
        else:
            yield ListRow(line, name, tuple(fields[index] for index in text_indices))


def _parse_csv(lines: list[str]) -> Iterator[tuple[int, list[str] | csv.Error]]:
    """Yield (number of the first line, fields or the error) of every row that is not blank."""
    start = 0
    while start < len(lines):
        # Strict, as otherwise a quote that is never closed silently turns the rest of the file into one caption. A new
        # reader after each error continues at the next line.
        reader, reader_start = csv.reader(map(lines.__getitem__, range(start, len(lines))), strict=True), start
        try:
            for fields in reader:
                if fields:
                    yield start + 1, fields
                start = reader_start + reader.line_num
        except csv.Error as error:
            yield start + 1, error
            start += 1


def _find_columns(path: Path, columns: list[str]) -> tuple[int, list[int]]:
    """Return the index of the column of names, and those of the columns of captions."""
    name_indices = [columns.index(name) for name in NAME_COLUMNS if name in columns]
    text_indices = [index for name in captions.CAPTION_FIELDS for index, column in enumerate(columns) if column == name]
    missing = ([] if name_indices else ["file_name"]) + ([] if text_indices else ["text"])
    if missing:
        header, fix = escape_name(",".join(columns))[:200], "name the columns file_name,text or path,text, in UTF-8"
        raise UserError(f"{path} has no column {' and '.join(missing)}, its first line is {header!r}; {fix}")
    return name_indices[0], text_indices


def _read_json_rows(path: Path) -> Iterator[ListRow]:
    count, has_captions = 0, False
    with path.open("rb") as file:
        for line, content in enumerate(file, 1):
            text = content.decode("utf-8-sig" if line == 1 else "utf-8", "surrogateescape")
            if not text.strip():
                continue
            try:
                fields = _parse_json_object(text)
            except UnusableClipError as error:
                yield ListRow(line, "", problem=str(error))
                continue
            count += 1
            has_captions = has_captions or any(field in fields for field in captions.CAPTION_FIELDS)
            yield _parse_json_row(line, fields)
    if count and not has_captions:
        fix = 'write {"file_name": "…", "text": "…"} ("text": null for a clip without a caption)'
        raise UserError(f"{path} has no field text in any of its {count} objects; {fix}")


def _parse_json_row(line: int, fields: dict[str, Any]) -> ListRow:
    name = next((fields[field] for field in NAME_COLUMNS if fields.get(field)), None)
    if not isinstance(name, str) or not name.strip():
        return ListRow(line, "", problem='names no file; write {"file_name": "…", "text": "…"}')
    try:
        return ListRow(line, name.strip(), tuple(captions.read_fields(fields)))
    except UnusableClipError as error:
        return ListRow(line, name.strip(), problem=str(error))


def _parse_json_object(text: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UnusableClipError(f"is not JSON ({error}); it must be one object") from error
    if not isinstance(fields, dict):
        raise UnusableClipError(f'is a {type(fields).__name__}; write {{"file_name": "…", "text": "…"}}')
    return fields
