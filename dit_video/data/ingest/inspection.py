"""What is found out about one clip, by reading all of it. Runs in a process that may be lost."""

import dataclasses
import hashlib
from typing import Any, NamedTuple

from dit_video.data import builder
from dit_video.data.ingest.listing import Listed
from dit_video.data.ingest.measures import Borders
from dit_video.data.ingest.screening import ScreeningConfig, Shot, screen
from dit_video.errors import DecodeError, UserError


class Inspected(NamedTuple):
    """A clip's verdict and facts."""

    reason: str = ""
    """Why it is quarantined; empty where it is not."""
    sha256: str = ""
    """of its bytes"""
    shots: tuple[Shot, ...] = ()
    dropped: tuple[tuple[str, str], ...] = ()
    """(name, reason) of shots that the screening leaves out"""

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
        return Inspected(value["reason"], value["sha256"], tuple(map(_shot, value["shots"])), dropped)


def _shot(fields: dict[str, Any]) -> Shot:
    letterbox, bits = fields["letterbox"], fields["hash"]
    return Shot(
        **{
            **fields,
            "letterbox": None if letterbox is None else Borders(*letterbox),
            "hash": None if bits is None else tuple(bits),
        }
    )


def inspect(clip: Listed, config: ScreeningConfig) -> Inspected:
    """Read, decode and screen a clip. What it cannot be used for is its verdict, whatever goes wrong in a decoder.

    Raises:
      UserError: the screening itself cannot work, for any clip.
    """
    if clip.size > builder.MAX_BYTES:
        return Inspected(f"{clip.size / 2**30:.1f} GiB in one file, 2 GiB is the limit; cut it into clips")
    try:
        encoded = clip.read()
    except OSError as error:
        return Inspected(f"cannot be read ({error.strerror or error})")
    if len(encoded) != clip.size:
        return Inspected(f"changed from {clip.size} to {len(encoded)} bytes since it was listed; leave it alone")
    try:
        screened = screen(encoded, clip.name, config)
    except DecodeError as error:
        return Inspected(str(error))
    except UserError:
        raise
    except MemoryError:
        return Inspected("needs more memory to decode than there is")
    except Exception as error:  # a decoder's: clips that no rule foresaw must not end the run
        message = " ".join(str(error).split())
        return Inspected(f"cannot be decoded ({type(error).__name__}: {message})")
    return Inspected("", hashlib.sha256(encoded).hexdigest(), screened.shots, screened.dropped)
