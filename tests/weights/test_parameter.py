"""Parameters that go to devices in pieces, bit for bit."""

import numpy as np
import pytest

from dit_video.weights import parameter
from dit_video.weights.parameter import Parameter, place_on_device, place_on_host
from support.devices import check_on_eight_devices
from support.parameter_pieces import WHOLE, split_parameter


@pytest.mark.parametrize("sizes", [(), (1, 1, 1, 1), (2, 2)], ids=["whole", "layers", "rows"])
def test_pieces_are_one_parameter(monkeypatch, sizes):
    monkeypatch.setattr(parameter, "_MAX_HOST_BYTES", 0)
    pieces = split_parameter(WHOLE, *sizes)
    for placed in (place_on_host("path", pieces), place_on_device("path", pieces)):
        assert placed.dtype == np.float32
        np.testing.assert_array_equal(placed, WHOLE)


def test_pieces_are_cast_one_by_one(monkeypatch):
    monkeypatch.setattr(parameter, "_MAX_HOST_BYTES", 0)
    arrays = []

    def pieces():
        for each in WHOLE.astype(np.float16):
            arrays.append(each)
            yield each[None]

    whole = Parameter(WHOLE.shape, np.dtype(np.float32), pieces)
    np.testing.assert_array_equal(whole.to_device(), WHOLE.astype(np.float16).astype(np.float32))
    assert len(arrays) == 5


def test_scalars_and_arrays_in_memory_are_parameters_too():
    assert Parameter.from_array(np.float32(3)).to_device() == 3
    transposed = Parameter.from_array(WHOLE[0].T)
    assert transposed.to_host().flags.c_contiguous
    np.testing.assert_array_equal(transposed.to_device(), WHOLE[0].T)


def test_each_device_gets_its_own_shard():
    check_on_eight_devices("sharded_parameter.py")
