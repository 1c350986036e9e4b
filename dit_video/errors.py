"""Errors that a user can act on, and how a script ends on one."""

import functools
import os
import sys
from collections.abc import Callable


class UserError(ValueError):
    """A mistake in what was asked for. The message states the rule, the value and the fix, on one line."""


class MissingError(UserError):
    """A file, folder, run or field that was named does not exist."""


class DecodeError(UserError):
    """Bytes that are not a readable video or image. Ingest sets such a clip aside and goes on."""


def script(main: Callable[..., None]) -> Callable[..., None]:
    """Decorate a script's `main`: a `UserError` becomes one line on stderr and exit code 2, Ctrl-C exit code 130."""

    @functools.wraps(main)
    def guarded(*args, **kwargs):
        try:
            main(*args, **kwargs)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("\ninterrupted: the same command continues where this one stopped", file=sys.stderr)
            sys.stderr.flush()
            sys.exit(130)
        except BrokenPipeError:
            os._exit(141)

    return guarded
