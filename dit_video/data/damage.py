"""Reading of clips of which some are damaged: they are logged, and do not count."""

import logging
from collections.abc import Callable
from typing import TypeVar

from dit_video.core.errors import DecodeError, UserError

T = TypeVar("T")


def read_undamaged(name: str, read: Callable[[], T]) -> T | None:
    """Return the result of `read`; if the clip of this name is damaged, log a warning and return None."""
    try:
        return read()
    except DecodeError as error:
        log_damaged_clip(name, error)
        return None


def log_damaged_clip(name: str, error: UserError) -> None:
    """Log a warning that a clip is damaged."""
    logging.getLogger(__name__).warning("%s is damaged and does not count in the loss: %s", name, error)
