"""Options of Apache Beam, and the transfer of its workers' errors to the process that started the pipeline.

That process gets an error of Beam's own, with some runners without the text of the original one. So a worker writes the
original error into a file on the disk that all machines share.
"""

import contextlib
import dataclasses
import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dit_video.core.errors import UserError
from dit_video.core.files import read_json, write_json
from dit_video.data.records.reference import ChangedError

ERROR_FILE = "error.json"
"""Name of the file with the error that stopped a Beam worker, in the temporary folder."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BeamOptions:
    """Options of Apache Beam: runner and pipeline options as TFDS accepts them; requires the `[beam]` extra."""

    runner: Any = None
    options: Any = None


@contextlib.contextmanager
def save_worker_errors(path: Path) -> Iterator[None]:
    """Write an error that a user can act on into the file `path`; for use in a worker."""
    try:
        yield
    except (UserError, OSError) as error:
        with contextlib.suppress(UserError, OSError):  # a full disk cannot hold the file either
            write_json(path, _error_to_json(error))
        raise


@contextlib.contextmanager
def raise_worker_errors(path: Path) -> Iterator[None]:
    """Raise the error that a worker wrote, or else one line of Beam's own; for use where a pipeline is started.

    Raises:
      UserError: the pipeline failed.
      OSError: a worker or this process could not write.
    """
    path.unlink(missing_ok=True)
    try:
        yield
    except Exception as error:  # raised by Beam, its runner, or an RPC
        if path.is_file():
            written = read_json(path)
            raise _ERRORS[written["kind"]](*written["arguments"]) from error
        if isinstance(error, OSError) and error.filename is not None:  # a local file, which no worker wrote
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
        fix = "Check the options of --beam and the logs of the workers, and start the command again."
        raise UserError(f"Apache Beam's pipeline failed ({reason}). {fix}") from error


_ERRORS = {each.__name__: each for each in (ChangedError, OSError, UserError)}
"""Kinds of errors that a worker passes on."""


def _error_to_json(error: UserError | OSError) -> dict[str, Any]:
    if isinstance(error, ChangedError):
        return {"kind": "ChangedError", "arguments": [error.path, error.reason]}
    if isinstance(error, OSError):
        return {"kind": "OSError", "arguments": [error.errno or errno.EIO, error.strerror or str(error)]}
    return {"kind": "UserError", "arguments": [str(error)]}
