"""Values of a table's rows as JSON."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int64

from dit_video.curation.export.contents import is_bulky
from dit_video.data.tables import Table, take_rows

_MAX_TEXT = 4000
_MAX_LIST = 24
"""Number of values from which on a list is shown as its length."""
LISTED = ("name", "outcome", "reason", "split", "captions", "height", "width", "frames", "fps", "seconds")
"""Columns that tiles show."""
_ALWAYS = {"payload", "chosen", "why"}


def read_rows(table: Table, rows: Int64[np.ndarray, " n"], columns: Sequence[str]) -> list[dict[str, Any]]:
    """Return the values of rows in columns, and the rows' numbers as `row`.

    Columns that do not exist are left out, as are those of vectors and bytes.

    `media` is a part of the address of a row's clip, with which the address changes when the clip does; absent if there
    is no clip.
    """
    names = [name for name in dict.fromkeys((*LISTED, *columns, *_ALWAYS)) if name in table.types]
    names = [name for name in names if not is_bulky(table, name)]
    ascending, places = np.unique(rows, return_inverse=True)
    values = {name: take_rows(table.arrow(name), ascending).to_pylist() for name in names}
    result = []
    for row, index in zip(rows, places, strict=True):
        described = {name: _simplify(values[name][index]) for name in names if name != "payload"}
        payload = values["payload"][index] if "payload" in values else None
        result.append({"row": int(row), **described} | ({"media": payload[:16]} if payload else {}))
    return result


def read_row(table: Table, row: int) -> dict[str, Any]:
    """Return all values of a row that are not missing, but for vectors and bytes."""
    values = read_rows(table, np.array([row]), table.names)[0] | {"payload": table.arrow("payload")[row].as_py()}
    return {name: value for name, value in values.items() if value is not None}


def _simplify(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bool | None):
        return value
    if isinstance(value, int):
        return value if abs(value) < 1 << 53 else str(value)  # JavaScript's numbers are exact below 2^53
    if isinstance(value, str):
        return value if len(value) <= _MAX_TEXT else value[:_MAX_TEXT] + "…"
    if isinstance(value, list):
        if len(value) > _MAX_LIST and not isinstance(value[0], str):
            return f"{len(value)} values"
        return [_simplify(each) for each in value]
    return str(value)[:_MAX_TEXT]
