"""Inspection of one clip by reading all of it; runs in a process that may be lost."""

import dataclasses
import errno
import hashlib
import os
from pathlib import Path
from typing import Any, NamedTuple

from dit_video.core.errors import DecodeError, UserError
from dit_video.data.ingest.formats import ListedClip
from dit_video.data.ingest.measures import Borders
from dit_video.data.ingest.quality_filter import ScreeningConfig, Shot, screen
from dit_video.data.ingest.reencoder import ReencodeConfig, StoredFile, reencode
from dit_video.data.records.reference import MAX_EXAMPLE_BYTES


@dataclasses.dataclass(frozen=True, kw_only=True)
class InspectionConfig:
    """Configuration of the inspection of every clip."""

    screening: ScreeningConfig = dataclasses.field(default_factory=ScreeningConfig)
    """Steps of the screening."""
    reencode: ReencodeConfig = dataclasses.field(default_factory=ReencodeConfig)
    """Limits above which files are re-encoded."""
    folder: str = ""
    """Folder of re-encoded files."""


class Inspection(NamedTuple):
    """Verdict on a clip, and its facts."""

    reason: str = ""
    """Reason why the clip is quarantined; empty if it is not."""
    sha256: str = ""
    """SHA-256 of the clip's original bytes, in hexadecimal."""
    shots: tuple[Shot, ...] = ()
    """Shots that are kept, as in the file that is stored."""
    dropped: tuple[tuple[str, str], ...] = ()
    """Name and reason of each shot that the screening dropped."""
    stored: StoredFile | None = None
    """Re-encoded file that replaces the original; None if the original is used."""
    transient: bool = False
    """True if the reason is transient rather than the clip's own fault: a file that could not be read or was being
    written, too little memory, too little time. Such a clip is inspected again, and its verdict is not stored in
    the journal."""
    modified: int = -1
    """Modification time (`st_mtime_ns`) of the file whose bytes were read; -1 if unknown."""

    @property
    def codec(self) -> str:
        """Return the codec; empty if no shot is kept."""
        return self.shots[0].codec if self.shots else ""

    @property
    def transfer(self) -> str:
        """Return the transfer function of the original file; empty if no shot is kept."""
        return self.shots[0].transfer if self.shots else ""

    def to_json(self) -> dict[str, Any]:
        """Return a JSON value for the journal, and for exchange between processes."""
        return {**self._asdict(), "shots": [dataclasses.asdict(shot) for shot in self.shots]}

    @staticmethod
    def from_json(value: dict[str, Any]) -> "Inspection":
        """Return the verdict that `to_json` wrote."""
        dropped = tuple((name, reason) for name, reason in value["dropped"])
        stored = None if value["stored"] is None else StoredFile(*value["stored"])
        changed = {"shots": tuple(map(_parse_shot, value["shots"])), "dropped": dropped, "stored": stored}
        return Inspection(**{**value, **changed})


def _parse_shot(fields: dict[str, Any]) -> Shot:
    letterbox = None if fields["letterbox"] is None else Borders(*fields["letterbox"])
    bits = None if fields["hash"] is None else tuple(fields["hash"])
    return Shot(**{**fields, "letterbox": letterbox, "hash": bits})


def inspect(clip: ListedClip, config: InspectionConfig) -> Inspection:
    """Read, decode and screen a clip, and re-encode it if the config says so; every failure becomes its verdict.

    The verdict is for the bytes that the file had at its `modified` time; a file that changes while it is read has no
    valid verdict.

    Raises:
      UserError: the screening cannot work for any clip, or the disk is full.
    """
    try:
        modified = os.stat(clip.path).st_mtime_ns
        if clip.size > MAX_EXAMPLE_BYTES:
            too_large = f"{clip.size / 2**30:.1f} GiB in one file, 2 GiB is the limit; cut it into clips"
            return Inspection(too_large, modified=modified)
        encoded = clip.read()
        has_changed = os.stat(clip.path).st_mtime_ns != modified
    except OSError as error:
        return Inspection(f"cannot be read ({error.strerror or error})", transient=True)
    except MemoryError:
        return Inspection("needs more memory to read than there is", transient=True)
    if len(encoded) != clip.size:
        size = f"changed from {clip.size} to {len(encoded)} bytes since it was listed; leave it alone"
        return Inspection(size, transient=True)
    if has_changed:
        return Inspection("changed while it was read; leave it alone", transient=True)
    return _screen_clip(encoded, clip.name, config)._replace(modified=modified)


def _screen_clip(encoded: bytes, name: str, config: InspectionConfig) -> Inspection:
    operation = "decode"
    try:
        screened = screen(encoded, name, config.screening)
        verdict = Inspection("", hashlib.sha256(encoded).hexdigest(), screened.shots, screened.dropped)
        if not screened.shots or not config.reencode.is_enabled:
            return verdict
        operation = "re-encode"
        new = reencode(encoded, screened.facts, screened.shots, config.reencode, Path(config.folder))
        if new is None:
            return verdict
        return verdict._replace(shots=new.shots, dropped=(*verdict.dropped, *new.dropped), stored=new.stored)
    except DecodeError as error:
        return Inspection(str(error), transient=_is_out_of_memory(error.__cause__))
    except UserError:
        raise
    except Exception as error:  # from a decoder or encoder: an unforeseen kind of clip must not end the run
        if _is_out_of_memory(error):
            return Inspection(f"needs more memory to {operation} than there is", transient=True)
        message = " ".join(str(error).split())
        return Inspection(f"cannot be {operation}d ({type(error).__name__}: {message})")


def _is_out_of_memory(error: BaseException | None) -> bool:
    return isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
