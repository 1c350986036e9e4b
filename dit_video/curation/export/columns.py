"""Columns of a data set by what they hold: captions, or vectors and bytes."""

from collections.abc import Mapping

import pyarrow as pa

from dit_video.data.tables import Table

CAPTIONS = "captions"
"""Column of the captions of the source."""
MAX_SHOWN_VALUES = 24
"""Maximum number of numbers of a list that is read by people."""


def find_caption_columns(types: Mapping[str, pa.DataType]) -> tuple[str, ...]:
    """Return the columns of captions: `captions` first, then those of texts or lists of texts named `captions_*`.

    Columns of errors, `captions_*_error`, are none.

    Args:
      types: types of the columns by name.
    """
    others = (name for name in types if name.startswith(f"{CAPTIONS}_") and not name.endswith("_error"))
    return tuple(name for name in (CAPTIONS, *others) if name in types and is_text(types[name]))


def is_text(type: pa.DataType) -> bool:
    """Return whether values are texts or lists of texts."""
    if pa.types.is_list(type) or pa.types.is_large_list(type):
        type = type.value_type
    return pa.types.is_string(type) or pa.types.is_large_string(type)


def is_list(type: pa.DataType) -> bool:
    """Return whether values are lists, also those of one length."""
    return pa.types.is_list(type) or pa.types.is_large_list(type) or pa.types.is_fixed_size_list(type)


def is_binary(type: pa.DataType) -> bool:
    """Return whether values are bytes."""
    return pa.types.is_binary(type) or pa.types.is_large_binary(type) or pa.types.is_fixed_size_binary(type)


def is_bulky(table: Table, name: str) -> bool:
    """Return whether a column holds bytes, or lists of more than 24 numbers on average, which nobody reads."""
    type = table.types[name]
    if is_binary(type):
        return True
    if not is_list(type) or not (pa.types.is_integer(type.value_type) or pa.types.is_floating(type.value_type)):
        return False
    if pa.types.is_fixed_size_list(type):
        return type.list_size > MAX_SHOWN_VALUES
    if type.value_type in (pa.uint8(), pa.int8()):
        return True
    chunks = [chunk for chunk in table.arrow(name).chunks if len(chunk)]
    values = sum(chunk.offsets[-1].as_py() - chunk.offsets[0].as_py() for chunk in chunks)
    return values > MAX_SHOWN_VALUES * sum(len(chunk) - chunk.null_count for chunk in chunks)
