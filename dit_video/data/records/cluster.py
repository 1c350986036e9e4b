"""Apache Beam as an ingest is given it, and what its workers say when they fail.

Beam raises errors of its own where a pipeline was started, with some runners without the text of the one that it was: a
worker notes that one in a file on the disk that all machines share.
"""

import contextlib
import dataclasses
import errno
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dit_video.core.errors import UserError
from dit_video.core.files import read_json, write_json
from dit_video.data.records.reference import ChangedError

NOTE = "error.json"
"""What ended a worker of Beam, in a folder of work."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Beam:
    """Apache Beam's runner and options, as TFDS takes them; needs the `[beam]` extra."""

    runner: Any = None
    options: Any = None


@contextlib.contextmanager
def note_errors(note: Path) -> Iterator[None]:
    """In a worker: write what a user can act on into the file `note`."""
    try:
        yield
    except (UserError, OSError) as error:
        with contextlib.suppress(UserError, OSError):  # of the disk that is full
            write_json(note, _noted(error))
        raise


@contextlib.contextmanager
def pipeline_errors(note: Path) -> Iterator[None]:
    """Where a pipeline is started: raise what a worker noted, or else what Beam says of its failure, in one line.

    Raises:
      UserError: the pipeline failed.
      OSError: a worker could not write, or this process.
    """
    note.unlink(missing_ok=True)
    try:
        yield
    except Exception as error:  # Beam's, its runner's, or an RPC's
        if note.is_file():
            raise _as_it_was(read_json(note)) from error
        if isinstance(error, OSError) and error.filename is not None:  # of a file here
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UserError(
            f"Apache Beam's pipeline failed ({lines[-1] if lines else type(error).__name__}); look at the options of "
            "--beam and at what its workers wrote, and start the command again"
        ) from error


def _noted(error: UserError | OSError) -> dict[str, Any]:
    if isinstance(error, ChangedError):
        return {"changed": error.path, "reason": error.reason}
    if isinstance(error, OSError):
        return {"errno": error.errno or errno.EIO, "reason": error.strerror or str(error)}
    return {"reason": str(error)}


def _as_it_was(noted: Mapping[str, Any]) -> UserError | OSError:
    if "changed" in noted:
        return ChangedError(noted["changed"], noted["reason"])
    if "errno" in noted:
        return OSError(noted["errno"], noted["reason"])
    return UserError(noted["reason"])
