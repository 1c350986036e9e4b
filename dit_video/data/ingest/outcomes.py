"""Outcomes of an ingest: each is a part of a source file, and what became of it.

The outcomes of a file partition its duration: every microsecond of the source is in exactly one row.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from dit_video.data.ingest.screening import Shot

OutcomeKind = Literal["kept", "dropped", "cut", "unreadable"]
"""A clip that is kept; one that the screening dropped; a part too short for a clip; a file that is broken."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """A part of a source file, and what became of it."""

    name: str
    """Name of the file, followed by `#0`, `#1`, … if it has several parts."""
    kind: OutcomeKind
    reason: str = ""
    """Reason why the part is not kept."""
    transient: bool = False
    """True if the reason is transient rather than the file's own fault: a file that could not be read or was being
    written, too little memory, too little time."""
    start_us: int = 0
    """Start of the part in the file, in microseconds after its first frame."""
    duration_us: int = 0
    """Duration of the part in microseconds: each frame is shown until the next one."""
    shot: Shot | None = None
    """Facts and measures of the clip as it is stored; None if the file is broken."""
    payload: str = ""
    """SHA-256 of the clip's bytes, in hexadecimal; empty if none are stored."""
    payload_bytes: int = 0
    """Number of these bytes."""
    file: str | None = None
    """File that holds the bytes until they are stored; None if they are the source file."""
    method: str = ""
    """Origin of the bytes: the "whole" file, a "copy" of packets, or "encode" for encoded pictures."""
    audio: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Facts of the sound by the names of columns: codec, rate, channels, offset."""

    def to_json(self) -> dict[str, Any]:
        """Return a JSON value, for exchange between processes."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> "Outcome":
        """Return the outcome that `to_json` wrote."""
        return Outcome(**value | {"shot": None if value["shot"] is None else Shot.from_json(value["shot"])})
