"""What is found out about one clip, by reading all of it. Runs in a process that may be lost."""

import dataclasses
import errno
import hashlib
import os
from pathlib import Path
from typing import Any, NamedTuple

from dit_video.core.errors import DecodeError, UserError
from dit_video.data.ingest.formats import Listed
from dit_video.data.ingest.measures import Borders
from dit_video.data.ingest.quality_filter import Screened, ScreeningConfig, Shot, screen
from dit_video.data.ingest.reencoder import Reencode, Stored, reencode
from dit_video.data.records import builder


@dataclasses.dataclass(frozen=True, kw_only=True)
class InspectionConfig:
    """What is done with every clip."""

    screening: ScreeningConfig = dataclasses.field(default_factory=ScreeningConfig)
    reencode: Reencode = dataclasses.field(default_factory=Reencode)
    folder: str = ""
    """where files that are stored anew are written"""


class Inspected(NamedTuple):
    """A clip's verdict and facts."""

    reason: str = ""
    """Why it is quarantined; empty where it is not."""
    sha256: str = ""
    """of its bytes, as they came"""
    shots: tuple[Shot, ...] = ()
    dropped: tuple[tuple[str, str], ...] = ()
    """(name, reason) of shots that the screening leaves out"""
    stored: Stored | None = None
    """The file that is used in its place; `shots` are of that."""
    passing: bool = False
    """Whether the reason may pass, as it is not the clip's own fault: a file that could not be read or was being
    written, too little memory, too little time. Such a clip is tried again, and its verdict is not kept."""
    modified: int = -1
    """When its file was last changed, as of the bytes that were read: `st_mtime_ns`; -1 where it could not be asked."""

    @property
    def codec(self) -> str:
        """Empty where no shot is left to say it."""
        return self.shots[0].codec if self.shots else ""

    def to_json(self) -> dict[str, Any]:
        """For the journal and between processes."""
        return {**self._asdict(), "shots": [dataclasses.asdict(shot) for shot in self.shots]}

    @staticmethod
    def from_json(value: dict[str, Any]) -> "Inspected":
        """What `to_json` wrote."""
        dropped = tuple((name, reason) for name, reason in value["dropped"])
        stored = None if value["stored"] is None else Stored(*value["stored"])
        changed = {"shots": tuple(map(_shot, value["shots"])), "dropped": dropped, "stored": stored}
        return Inspected(**{**value, **changed})


def _shot(fields: dict[str, Any]) -> Shot:
    letterbox, bits = fields["letterbox"], fields["hash"]
    return Shot(
        **{
            **fields,
            "letterbox": None if letterbox is None else Borders(*letterbox),
            "hash": None if bits is None else tuple(bits),
        }
    )


def inspect(clip: Listed, config: InspectionConfig) -> Inspected:
    """Read, decode and screen a clip, and store it anew where that is asked for. What it cannot be used for is its
    verdict, whatever goes wrong in a decoder or encoder.

    The verdict is of the bytes that lay in the file at its `modified`: a file that changes while it is read has none.

    Raises:
      UserError: the screening itself cannot work, for any clip, or the disk is full.
    """
    try:
        modified = os.stat(clip.path).st_mtime_ns
        if clip.size > builder.MAX_BYTES:
            too_large = f"{clip.size / 2**30:.1f} GiB in one file, 2 GiB is the limit; cut it into clips"
            return Inspected(too_large, modified=modified)
        encoded = clip.read()
        changed = os.stat(clip.path).st_mtime_ns != modified
    except OSError as error:
        return Inspected(f"cannot be read ({error.strerror or error})", passing=True)
    except MemoryError:
        return Inspected("needs more memory to read than there is", passing=True)
    if len(encoded) != clip.size:
        size = f"changed from {clip.size} to {len(encoded)} bytes since it was listed; leave it alone"
        return Inspected(size, passing=True)
    if changed:
        return Inspected("changed while it was read; leave it alone", passing=True)
    return _screened(encoded, clip.name, config)._replace(modified=modified)


def _screened(encoded: bytes, name: str, config: InspectionConfig) -> Inspected:
    work = "decode"
    try:
        screened = screen(encoded, name, config.screening)
        verdict = Inspected("", hashlib.sha256(encoded).hexdigest(), screened.shots, screened.dropped)
        work = "re-encode"
        return _stored_anew(encoded, screened, verdict, config)
    except DecodeError as error:
        return Inspected(str(error), passing=_lacks_memory(error.__cause__))
    except UserError:
        raise
    except Exception as error:  # a decoder's: clips that no rule foresaw must not end the run
        if _lacks_memory(error):
            return Inspected(f"needs more memory to {work} than there is", passing=True)
        message = " ".join(str(error).split())
        return Inspected(f"cannot be {work}d ({type(error).__name__}: {message})")


def _stored_anew(encoded: bytes, screened: Screened, verdict: Inspected, config: InspectionConfig) -> Inspected:
    """The verdict on what is stored in the clip's place, if anything is."""
    if not screened.shots or not config.reencode.asked:
        return verdict
    found = reencode(encoded, screened.facts, screened.shots, config.reencode, Path(config.folder))
    if found is None:
        return verdict
    return verdict._replace(shots=found.shots, dropped=(*verdict.dropped, *found.dropped), stored=found.stored)


def _lacks_memory(error: BaseException | None) -> bool:
    return isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
