"""Outcomes of an ingest, the rows of the table: each is a part of a source file, and what became of it.

The outcomes of a file partition its duration: every microsecond of the source is in exactly one row.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import pyarrow as pa

from dit_video.data.ingest.quality_filter import Shot
from dit_video.data.records import RecordPlace
from dit_video.data.tables import compute_row_id

OutcomeKind = Literal["kept", "dropped", "cut", "unreadable"]
"""A clip that is kept; one that the screening dropped; a part of a file that is in no clip; a file that is broken."""

_DURATION = ("start_us", "duration_us")
SCHEMA = pa.schema(
    {
        "id": pa.uint64(),
        "name": pa.string(),
        "source": pa.string(),
        "source_bytes": pa.int64(),
        "source_sha256": pa.string(),
        "outcome": pa.string(),
        "reason": pa.string(),
        "transient": pa.bool_(),
        **dict.fromkeys(_DURATION, pa.int64()),
        **dict.fromkeys(("height", "width", "frames"), pa.int32()),
        **dict.fromkeys(("fps", "seconds"), pa.float64()),
        **dict.fromkeys(("codec", "transfer", "audio_codec"), pa.string()),
        **dict.fromkeys(("audio_rate", "audio_channels"), pa.int32()),
        "audio_offset": pa.float64(),
        **dict.fromkeys(("motion", "black", "frozen", "sharpness", "letterbox"), pa.float32()),
        "bars": pa.list_(pa.int32()),
        "hash": pa.list_(pa.uint64()),
        "method": pa.string(),
        "payload": pa.string(),
        "payload_bytes": pa.int64(),
        **dict.fromkeys(("offset", "length"), pa.int64()),
        "crc32": pa.uint32(),
    }
)
"""Columns of the index. Numbers that a row does not have are 0 if they are integers, else null."""


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
    """How the bytes were made: "whole" file, stream "copy", or "encode"."""
    audio: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Facts of the sound by the names of columns: codec, rate, channels, offset."""

    def to_json(self) -> dict[str, Any]:
        """Return a JSON value, for exchange between processes."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> "Outcome":
        """Return the outcome that `to_json` wrote."""
        return Outcome(**value | {"shot": None if value["shot"] is None else Shot.from_json(value["shot"])})


def make_row(
    outcome: Outcome, place: RecordPlace | None, *, source: str, source_bytes: int, source_sha256: str
) -> dict[str, Any]:
    """Return the row of an outcome, without the values that it does not have."""
    row = {
        "id": compute_row_id(outcome.name, source_sha256, outcome.start_us, outcome.duration_us),
        "source": source,
        "source_bytes": source_bytes,
        "source_sha256": source_sha256,
        "outcome": outcome.kind,
        **{name: getattr(outcome, name) for name in ("name", "reason", "transient", *_DURATION)},
        **{name: getattr(outcome, name) for name in ("method", "payload", "payload_bytes")},
        **{f"audio_{name}": value for name, value in outcome.audio.items()},
    }
    if (shot := outcome.shot) is not None:
        row |= {name: getattr(shot, name) for name in SCHEMA.names if hasattr(shot, name) and name not in row}
        if shot.letterbox is not None:
            area = shot.letterbox.compute_area_share(shot.height, shot.width)
            row |= {"letterbox": area, "bars": list(shot.letterbox)}
    return row if place is None else row | place._asdict()


def make_table(rows: Iterable[Mapping[str, Any]]) -> pa.Table:
    """Return the rows as a table of the index."""
    rows = list(rows)
    columns = {}
    for field in SCHEMA:
        default = 0 if pa.types.is_integer(field.type) else False if pa.types.is_boolean(field.type) else None
        values = [row.get(field.name) for row in rows]
        columns[field.name] = pa.array([default if value is None else value for value in values], field.type)
    return pa.table(columns, schema=SCHEMA)
