"""Lists of clips and captions: CSV with a line of column names, or JSON Lines.

The clip's path is in the column `file_name` (as Hugging Face's folders have it) or `path` (as Open-Sora's tools write
it: `path,text,num_frames,height,width,aspect_ratio,fps,resolution`), its captions in `text`, `caption` or `captions`;
other columns are ignored. In JSON Lines a caption may be a list of captions. A clip that is named again gets another
caption. A list that is not well formed is an error as a whole: nobody knows what else is wrong with it.
"""

import csv
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from dit_video.data.ingest.listing import captions
from dit_video.data.ingest.listing.listed import Listed, Listing, Unusable, check_name, finished, some
from dit_video.data.ingest.listing.scan import list_file
from dit_video.errors import UserError

TABLES = (".csv", ".jsonl")
NAMES = ("file_name", "path")
"""The columns that may name the clip; the first that is there does."""


class Row(NamedTuple):
    """All that a list says of one clip."""

    texts: list[str]
    problems: list[str]

    def captions(self) -> tuple[str, ...]:
        """Those that are kept.

        Raises:
          Unusable: one of its lines has a caption that cannot be used.
        """
        if self.problems:
            raise Unusable(self.problems[0])
        return captions.tidy(self.texts)


def read_table(path: Path, normal: Callable[[str], str]) -> dict[str, Row]:
    """The rows of a list by clip, in the order in which clips are first named; `normal` makes one name of many.

    Raises:
      UserError: the list cannot be read, is not UTF-8 (CSV), lacks a column, has a line that is not one of it.
    """
    rows: dict[str, Row] = {}
    if not path.is_file():
        raise UserError(f"{path} is not a regular file; write the list into one")
    try:
        for name, texts, problem in _csv_rows(path) if path.suffix.lower() == ".csv" else _json_rows(path):
            row = rows.setdefault(normal(name), Row([], []))
            row.texts.extend(texts)
            row.problems.extend([problem] if problem else [])
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); make it readable") from error
    return rows


def list_table(source: Path) -> Listing:
    """The clips of a list whose paths are absolute, or relative to its folder.

    A clip is named by its path relative to that folder; where one of the clips lies outside of it, all are named by
    their paths relative to the deepest folder that holds them all.

    Raises:
      UserError: see `read_table`; files that don't exist.
    """
    home = os.path.abspath(source.parent)
    rows = read_table(source, lambda name: os.path.normpath(os.path.join(home, name)))
    folders = {os.path.dirname(path) for path in rows}
    if rows and os.path.commonpath([home, *folders]) != home:
        home = os.path.commonpath(folders)
    clips: list[Listed] = []
    rejected: list[tuple[str, str]] = []
    missing: list[str] = []
    for path, row in rows.items():
        name = os.path.relpath(path, home).replace(os.sep, "/")
        try:
            check_name(name)
            clips.append(list_file(name, path)._replace(captions=row.captions()))
        except FileNotFoundError:
            missing.append(name)
        except Unusable as error:
            rejected.append((name, str(error)))
    if missing:
        raise UserError(
            f"{source} names {len(rows)} files, {len(missing)} of them do not exist in {home} ({some(missing)}); "
            "fix the paths, which are absolute or relative to the list's folder"
        )
    return finished(source, "table", clips, rejected=rejected)


def is_list(path: Path) -> bool:
    """Whether its first line is that of a list of clips and captions."""
    if path.suffix.lower() not in TABLES or not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            line = file.readline(1 << 20).decode("utf-8-sig", "replace")
        first = _json_object(line, "") if path.suffix.lower() == ".jsonl" else next(csv.reader([line]), [])
    except (OSError, UserError, csv.Error):
        return False
    columns = {column.strip() for column in first}
    return not columns.isdisjoint(NAMES) and not columns.isdisjoint(captions.FIELDS)


_Rows = Iterator[tuple[str, list[str], str | None]]
"""(name, captions, what is wrong with them)"""


def _csv_rows(path: Path) -> _Rows:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from error
    # Strict: a quote that is never closed would otherwise swallow the rest of the file as one caption.
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = [column.strip() for column in next(reader, [])]
        name_at, text_at = _columns(path, columns)
        for fields in reader:
            if not fields:
                continue
            if len(fields) > len(columns):
                raise UserError(
                    f"{path}, line {reader.line_num}: {len(fields)} fields, but {len(columns)} columns; "
                    "put captions that hold commas in double quotes"
                )
            fields += [""] * (len(columns) - len(fields))
            if not (name := fields[name_at].strip()):
                raise UserError(
                    f"{path}, line {reader.line_num}: {columns[name_at]} is empty; name a file or remove the line"
                )
            yield name, [fields[at] for at in text_at], None
    except csv.Error as error:
        raise UserError(
            f"{path} is not a CSV file (line {reader.line_num}: {error}); write it as file_name,text, with captions "
            'in double quotes, and double quotes in them as ""'
        ) from error


def _columns(path: Path, columns: list[str]) -> tuple[int, list[int]]:
    """Where the clip's name and its captions are."""
    names = [columns.index(name) for name in NAMES if name in columns]
    texts = [at for field in captions.FIELDS for at, column in enumerate(columns) if column == field]
    absent = ([] if names else ["file_name"]) + ([] if texts else ["text"])
    if absent:
        raise UserError(
            f"{path} has no column {' and '.join(absent)}, its first line is {','.join(columns)[:200]!r}; "
            "it must name the columns file_name,text or path,text"
        )
    return names[0], texts


def _json_rows(path: Path) -> _Rows:
    captioned = lines = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            # Bytes that are not UTF-8 become lone surrogates: the names and captions that hold them are found by these.
            text = line.decode("utf-8-sig" if number == 1 else "utf-8", "surrogateescape").strip()
            if not text:
                continue
            where = f"{path}, line {number}"
            fields = _json_object(text, where)
            name = next((fields[field] for field in NAMES if fields.get(field)), None)
            if not isinstance(name, str) or not name.strip():
                raise UserError(f'{where} names no file; write {{"file_name": "…", "text": "…"}}')
            lines += 1
            captioned += any(field in fields for field in captions.FIELDS)
            try:
                yield name.strip(), captions.of_fields(fields), None
            except Unusable as error:
                yield name.strip(), [], f"line {number}: {error}"
    if lines and not captioned:
        raise UserError(
            f'{path} has no field text in any of its {lines} lines; write {{"file_name": "…", "text": "…"}} '
            '("text": null for a clip without a caption)'
        )


def _json_object(text: str, where: str) -> dict:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error}); it must hold one object a line") from error
    if not isinstance(fields, dict):
        raise UserError(f'{where} is a {type(fields).__name__}; write {{"file_name": "…", "text": "…"}}')
    return fields
