"""Columns that are too large for one of Arrow's arrays, in memory that is never touched."""

import numpy as np
import pyarrow as pa


def make_huge_texts() -> pa.ChunkedArray:
    """Return six texts of more than 2 GB in three chunks, each of which has one of 4 bytes and a long one."""
    zeros = pa.py_buffer(np.zeros(1 << 30, np.uint8))
    ends = pa.py_buffer(np.array([0, 4, 1 << 30], np.int32))
    return pa.chunked_array([pa.StringArray.from_buffers(2, ends, zeros)] * 3)
