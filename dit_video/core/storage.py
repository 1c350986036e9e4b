"""Where data lie: one rule for clips, data sets and caches.

A name with `://` in it is an address, which fsspec opens (`gs://`, `s3://`, `memory://`, whatever else it knows); any
other name is a path on this machine. `place` makes a `Path` or a `UPath` of it. What a service answers, in as many
types of errors as there are services, becomes one line that says what to do.
"""

import contextlib
import errno
import json
import os
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import fsspec
from fsspec.registry import known_implementations
from upath import UPath

from dit_video.core import files
from dit_video.core.errors import MissingError, UserError

Place: TypeAlias = Path | UPath
Address: TypeAlias = str | os.PathLike | UPath
"""The name of a place, or the place."""

_MANGLED = re.compile(r"([a-z][a-z0-9+.-]+):/(?!/)")
"""What `pathlib` makes of an address."""
_LONG = 300
"""Characters of what a service says, which may be a page."""
_FULL = (errno.ENOSPC, errno.EDQUOT)


def is_remote(path: Address) -> bool:
    """Whether it is an address, not a path on this machine."""
    return "://" in _name(path) and not _name(path).startswith("file://")


def place(path: Address) -> Place:
    """The folder or file of that name, which need not exist. What others wrote at an address meanwhile is seen.

    Raises:
      UserError: a scheme that isn't known, or whose package isn't installed; an address that `pathlib` has mangled; a
        service that refuses.
    """
    name = _name(path)
    if not is_remote(path):
        if (found := _MANGLED.match(name)) and found[1] in known_implementations:
            raise UserError(f"{name} is an address that went through pathlib; give {found[1]}://… as a string")
        return Path(name.removeprefix("file://"))
    _check_scheme(name)
    with reaching(name):
        remote = path if isinstance(path, UPath) else UPath(name)
        remote.fs.invalidate_cache()
        # Not `exists`, for which a refusal is an absence.
        with contextlib.suppress(FileNotFoundError):
            remote.fs.info(remote.path)
    return remote


@contextlib.contextmanager
def reaching(path: Address) -> Iterator[None]:
    """Make one line of what goes wrong on the way to `path`; nothing is changed of a place on this machine.

    Raises:
      MissingError: nothing is there.
      UserError: a service that refuses, or can't be reached.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not is_remote(path):
            raise
        if isinstance(error, FileNotFoundError):
            raise MissingError(f"no such file: {path}") from error
        reason = textwrap.shorten(str(error), _LONG, placeholder=" …") or type(error).__name__
        raise UserError(
            f"{path} cannot be opened ({reason}); check the address, the connection, and that your credentials allow it"
        ) from error


def read_document(path: Place) -> Any:
    """The JSON there.

    Raises:
      MissingError: no such file.
      UserError: the file is not JSON, or cannot be reached.
    """
    if isinstance(path, Path):
        return files.read_json(path)
    with reaching(path):
        content = path.read_bytes()
    try:
        return json.loads(content.decode("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); fix or remove it") from error


def write_text(path: Place, text: str) -> None:
    """Write UTF-8 text, whole or not at all.

    Raises:
      UserError: it can't be written.
    """
    if isinstance(path, Path):
        files.write_text(path, text)
        return
    with reaching(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.fs.pipe_file(path.path, text.encode())


def write_document(path: Place, value: Any) -> None:
    """Write JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def copy_here(source: UPath, target: Path) -> None:
    """Copy a file to this machine, whole or not at all.

    Raises:
      MissingError: nothing is there.
      UserError: it can't be reached, or this machine has no room for it.
    """
    with reaching(source), files.atomic_path(target) as temporary:
        try:
            source.fs.get_file(source.path, os.fspath(temporary))
        except OSError as error:
            if error.errno in _FULL:
                raise UserError(f"{target} cannot be written ({error.strerror}); make room there") from error
            raise


def copy_there(source: Path, target: UPath) -> None:
    """Copy a file to an address. Object stores show it once it is whole.

    Raises:
      UserError: it can't be written.
    """
    with reaching(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.fs.put_file(os.fspath(source), target.path)


def publish(folder: Path, destination: UPath, last: str) -> None:
    """Make an address hold a folder's files, `last` copied after all others: with it the copy is whole.

    What lies there is removed first, of an older copy its `last` before all. The caller has looked what it is.
    """
    with reaching(destination):
        destination.mkdir(parents=True, exist_ok=True)
        for old in sorted(destination.iterdir(), key=lambda path: path.name != last):
            old.unlink()
    for path in sorted(folder.iterdir(), key=lambda path: (path.name == last, path.name)):
        copy_there(path, destination / path.name)


def _name(path: Address) -> str:
    return str(path) if isinstance(path, UPath) else os.fspath(path)


def _check_scheme(name: str) -> None:
    """That a package is there which opens such addresses."""
    scheme = name.partition("://")[0]
    try:
        fsspec.get_filesystem_class(scheme)
    except ValueError as error:
        raise UserError(
            f"{name} begins with {scheme}://, which fsspec doesn't know; use gs://, s3://, another that it knows, or a "
            "local folder"
        ) from error
    except ImportError as error:
        package = known_implementations[scheme]["class"].partition(".")[0]
        fix = str(error) if package == "fsspec" else f"pip install {package}"  # fsspec names what its own parts need
        raise UserError(f"{name} needs a package that is not installed: {fix}") from error
