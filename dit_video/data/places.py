"""Where a data set lies: a local folder, or one in a bucket (`gs://`, `s3://`, …), which `etils.epath` opens.

Buckets are read and written through fsspec (for `gs://` install gcsfs, for `s3://` s3fs); records are read by
ArrayRecord itself, which knows local files and `gs://`.
"""

import os
from pathlib import Path
from typing import Any, TypeAlias

from etils import epath

from dit_video.data import shards
from dit_video.errors import UserError
from dit_video.files import read_json

Place: TypeAlias = Path | epath.Path


def place(path: str | os.PathLike) -> Place:
    """The folder or file of that name.

    Raises:
      UserError: a scheme that isn't known, whose package isn't installed, or a service that refuses.
    """
    name = os.fspath(path)
    if "://" not in name:
        return Path(name)
    try:
        found = epath.Path(name)
        found.exists()
    except Exception as error:  # of as many types as there are services
        reason = " ".join(str(error).split())
        raise UserError(
            f"{name} cannot be opened ({reason}); install what fsspec needs for it and check your credentials, or use "
            "a local folder"
        ) from error
    return found


def read_document(path: Place) -> Any:
    """The JSON there.

    Raises:
      MissingError: no such file.
      UserError: the file is not JSON.
    """
    return read_json(path) if isinstance(path, Path) else shards.read_document(path)


def publish(folder: Path, destination: Place, last: str) -> None:
    """Make a place in a bucket hold a folder's files, `last` copied after all others: with it the copy is whole."""
    destination.mkdir(parents=True, exist_ok=True)
    for old in destination.iterdir():
        old.unlink()
    for path in sorted(folder.iterdir(), key=lambda path: (path.name == last, path.name)):
        epath.Path(path).copy(destination / path.name, overwrite=True)
