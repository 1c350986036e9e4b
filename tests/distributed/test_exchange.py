import dataclasses
from typing import NamedTuple

import numpy as np
import pytest

from dit_video.core.errors import TransientError
from dit_video.distributed.exchange import decode, encode


class Pair(NamedTuple):
    first: float
    second: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Rows:
    names: list[str]
    values: np.ndarray


def test_values_come_back_with_their_types():
    values = np.arange(6, dtype=np.float64).reshape(2, 3).T  # not contiguous
    state = [(), None, float("nan"), 0.1, True, "é", Pair(1.5, (1, 2)), {"dict": {"tuple": (None,)}}, np.float32(0.5)]
    own = (TransientError("storage is away"), state, Rows(["a"], values), np.zeros((0, 4), np.int32))
    error, back, rows, empty = decode(encode(own))
    assert type(error) is TransientError
    assert str(error) == "storage is away"
    assert repr(back) == repr(state)
    assert list(map(type, back)) == list(map(type, state))
    assert type(rows) is Rows
    assert rows.names == ["a"]
    np.testing.assert_array_equal(rows.values, values)
    assert rows.values.dtype == values.dtype
    assert (empty.shape, empty.dtype) == ((0, 4), np.int32)


def test_other_values_are_refused():
    with pytest.raises(TypeError, match="a set"):
        encode([1, {2}])
