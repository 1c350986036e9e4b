"""Rows of the table of clips, one for each outcome of an ingest."""

from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa

from dit_video.data.ingest.outcomes import Outcome
from dit_video.data.records import RecordPlace
from dit_video.data.tables import compute_row_id

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


def make_row(
    outcome: Outcome, place: RecordPlace | None, *, source: str, source_bytes: int, source_sha256: str
) -> dict[str, Any]:
    """Return the row of an outcome, without the values that it does not have."""
    row = {
        # The size identifies a file that could not be read.
        "id": compute_row_id(outcome.name, source_sha256 or source_bytes, outcome.start_us, outcome.duration_us),
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
