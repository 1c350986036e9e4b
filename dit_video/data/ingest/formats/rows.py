"""The rows of a list of clips and captions: CSV with a line of column names, or JSON Lines.

The clip's path is in the column `file_name` (as Hugging Face's folders have it) or `path` (as Open-Sora's tools write
it: `path,text,num_frames,height,width,aspect_ratio,fps,resolution`), its captions in `text`, `caption` or `captions`;
other columns are ignored. In JSON Lines a caption may be a list of captions.

A row that is not well formed costs itself alone. What follows a bad row of CSV is read from the line after the one in
which that row begins: a quote that is never closed would else swallow all rows after it. (Of a bad row that has several
lines the later ones are then taken for rows; they are as bad, each on its own.)
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dit_video.core.errors import UserError
from dit_video.data.ingest.formats import captions
from dit_video.data.ingest.formats.listed import Unusable, shown

TABLES = (".csv", ".jsonl")
NAMES = ("file_name", "path")
"""The columns that may name the clip; the first that is there does."""


class Row(NamedTuple):
    """What a row says."""

    line: int
    """in which it begins, from 1"""
    name: str
    """of its clip, as it is written; empty where the row cannot be read"""
    texts: tuple[str, ...] = ()
    """captions as they are written"""
    problem: str = ""
    """Why it cannot be used; empty where it can. Of a row with a name it is about the captions."""

    def captions(self) -> tuple[str, ...]:
        """Those that are kept.

        Raises:
          Unusable: they cannot be used.
        """
        if self.problem:
            raise Unusable(self.problem)
        return captions.tidy(self.texts)


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a list, in its order. Bytes that are not UTF-8 come as half surrogate pairs in names and captions.

    Raises:
      UserError: the list cannot be read, or has no column, in JSON Lines in none of its lines, for names or captions.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a regular file; write the list into one")
    try:
        yield from _csv_rows(path) if path.suffix.lower() == ".csv" else _json_rows(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); make it readable") from error


def is_list(path: Path) -> bool:
    """Whether its first line is that of a list of clips and captions."""
    if path.suffix.lower() not in TABLES or not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            line = file.readline(1 << 20).decode("utf-8-sig", "replace")
        first: Iterable[str] = _json_object(line) if path.suffix.lower() == ".jsonl" else next(csv.reader([line]), [])
    except (OSError, Unusable, csv.Error):
        return False
    columns = {column.strip() for column in first}
    return not columns.isdisjoint(NAMES) and not columns.isdisjoint(captions.FIELDS)


def _csv_rows(path: Path) -> Iterator[Row]:
    text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
    rows = _csv_fields(list(io.StringIO(text, newline="")))  # line ends as they are: a caption in quotes may have some
    _, first = next(rows, (1, []))
    columns = [column.strip() for column in first] if isinstance(first, list) else []
    name_at, text_at = _columns(path, columns)
    for line, fields in rows:
        if isinstance(fields, csv.Error):
            yield Row(line, "", problem=f'is no row of CSV ({fields}); write captions in double quotes, "" for a quote')
        elif len(fields) != len(columns):
            problem = f"fields: {len(fields)}, columns: {len(columns)}; put captions that hold commas in double quotes"
            yield Row(line, "", problem=problem)
        elif not (name := fields[name_at].strip()):
            yield Row(line, "", problem=f"names no file: its {columns[name_at]} is empty")
        else:
            yield Row(line, name, tuple(fields[at] for at in text_at))


def _csv_fields(lines: list[str]) -> Iterator[tuple[int, list[str] | csv.Error]]:
    """(number of its first line, its fields or what is wrong) of every row that is not blank."""
    begin = 0
    while begin < len(lines):
        # Strict: else a quote that is never closed makes one caption of the rest of the file, and says nothing.
        reader, base = csv.reader(map(lines.__getitem__, range(begin, len(lines))), strict=True), begin
        try:
            for fields in reader:
                if fields:
                    yield begin + 1, fields
                begin = base + reader.line_num
        except csv.Error as error:
            yield begin + 1, error
            begin += 1


def _columns(path: Path, columns: list[str]) -> tuple[int, list[int]]:
    """Where the clip's name and its captions are."""
    names = [columns.index(name) for name in NAMES if name in columns]
    texts = [at for field in captions.FIELDS for at, column in enumerate(columns) if column == field]
    absent = ([] if names else ["file_name"]) + ([] if texts else ["text"])
    if absent:
        raise UserError(
            f"{path} has no column {' and '.join(absent)}, its first line is {shown(','.join(columns))[:200]!r}; "
            "it must name the columns file_name,text or path,text, in UTF-8"
        )
    return names[0], texts


def _json_rows(path: Path) -> Iterator[Row]:
    read, captioned = 0, False
    with path.open("rb") as file:
        for line, content in enumerate(file, 1):
            text = content.decode("utf-8-sig" if line == 1 else "utf-8", "surrogateescape")
            if not text.strip():
                continue
            try:
                fields = _json_object(text)
            except Unusable as error:
                yield Row(line, "", problem=str(error))
                continue
            read += 1
            captioned = captioned or any(field in fields for field in captions.FIELDS)
            yield _json_row(line, fields)
    if read and not captioned:
        raise UserError(
            f'{path} has no field text in any of its {read} objects; write {{"file_name": "…", "text": "…"}} '
            '("text": null for a clip without a caption)'
        )


def _json_row(line: int, fields: dict[str, Any]) -> Row:
    name = next((fields[field] for field in NAMES if fields.get(field)), None)
    if not isinstance(name, str) or not name.strip():
        return Row(line, "", problem='names no file; write {"file_name": "…", "text": "…"}')
    try:
        return Row(line, name.strip(), tuple(captions.of_fields(fields)))
    except Unusable as error:
        return Row(line, name.strip(), problem=str(error))


def _json_object(text: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unusable(f"is not JSON ({error}); it must be one object") from error
    if not isinstance(fields, dict):
        raise Unusable(f'is a {type(fields).__name__}; write {{"file_name": "…", "text": "…"}}')
    return fields
