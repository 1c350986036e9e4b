"""Files that are complete or absent: written under a temporary name next to the final one, then renamed."""

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dit_video.core.errors import DISK_FULL_ERRNOS, MissingError, UserError

_MIN_FREE = 64 * 2**10
"""Number of free bytes below which a disk is full; files that work leads to are larger, with few exceptions."""


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path next to `path`, with the same suffix; it is renamed to `path` on success, else removed.

    This works for a file, or for a folder that the caller creates at the temporary path. An existing file at `path` is
    replaced, and so is a folder once the new one is complete.

    Raises:
      OSError: If it cannot be written; that of a full disk names `path`.
    """
    path = Path(path)
    temporary = _make_temporary(path)
    try:
        yield temporary
        if path.is_dir() and temporary.is_dir():
            old = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.old")
            path.rename(old)
            temporary.rename(path)
            shutil.rmtree(old)
        else:
            os.replace(temporary, path)
    except OSError as error:
        if error.errno in DISK_FULL_ERRNOS:  # whose writes name no file
            error.filename = os.fspath(path)
        raise
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


def check_writable(path: str | os.PathLike) -> None:
    """Check, before the work whose result it is, that a file can be written; its folder is created if necessary.

    Raises:
      UserError: If it is a folder, or cannot be written, or the disk is full.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; use the path of a file")
    temporary = _make_temporary(path)
    _check_free_space(path, path.parent)
    try:
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise _make_write_error(path, error.strerror) from error


def check_writable_folder(folder: str | os.PathLike) -> None:
    """Check, before the work whose result it is, that a folder is there or can be created, which this does not do.

    Raises:
      UserError: If it cannot be created or written, or the disk is full.
    """
    folder = Path(folder).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise _make_write_error(folder, "no permission" if existing.is_dir() else f"{existing} is a file")
    _check_free_space(folder, existing)


def _check_free_space(path: Path, existing: Path) -> None:
    """Raise if a folder that exists, in which `path` is to be written, has no space."""
    usage = shutil.disk_usage(existing)
    if usage.total and usage.free < _MIN_FREE:  # there are file systems that tell no sizes
        rule = f"its disk is full: {usage.free} bytes are free"
        raise UserError(f"{path} cannot be written: {rule}. Free disk space, or use a path on another disk.")


def _make_temporary(path: Path) -> Path:
    """Return a temporary path next to `path`; its folder is created if necessary."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _make_write_error(path, error.strerror) from error
    return path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.partial{path.suffix}")


def _make_write_error(path: Path, reason: str | None) -> UserError:
    return UserError(f"{path} cannot be written ({reason}); use a path in a writable folder")


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write UTF-8 `text` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | os.PathLike) -> Any:
    """Read a JSON file.

    Raises:
      MissingError: If there is no file at `path`.
      UserError: If the file is not JSON.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingError(f"no such file: {path}")
    return parse_json(path.read_bytes(), path)


def read_text(path: str | os.PathLike) -> str:
    """Read a text file, without the mark with which Windows begins files.

    Raises:
      MissingError: If there is no file at `path`.
      UserError: If the file is not UTF-8.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingError(f"no such file: {path}")
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error}). Save it as UTF-8.") from error


def parse_json(content: bytes, path: Any) -> Any:
    """Return the value in a JSON file's content.

    Raises:
      UserError: If the content is not JSON; the message calls it `path`.
    """
    try:
        return json.loads(content.decode("utf-8-sig"))  # Windows begins files with a mark
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); fix or remove it") from error


def read_document(path: str | os.PathLike, *, format: int, kind: str, fix: str) -> dict[str, Any]:
    """Read the JSON document that describes a folder, after checking its format.

    Args:
      path: The document, in the folder that it describes.
      format: Required value of its `format`.
      kind: Kind of folder, for error messages.
      fix: Advice for a folder of another format, for error messages.

    Raises:
      MissingError: If there is no file at `path`.
      UserError: If the file is not JSON, or not a document of this format.
    """
    document = read_json(path)
    version = document.get("format") if isinstance(document, dict) else None
    if version != format:
        folder = Path(path).parent
        raise UserError(f"{folder} is a {kind} of format {version}, this version reads {format}; {fix}")
    return document
