"""Parameters that go to devices in pieces, bit for bit."""

import numpy as np
import pytest

from dit_video.weights import parameter
from dit_video.weights.parameter import Parameter, place_on_device, place_on_host
from support.devices import check_on_eight_devices

WHOLE = np.random.default_rng(0).normal(size=(5, 8, 16)).astype(np.float32)


def in_pieces(array, *sizes):
    return Parameter(array.shape, array.dtype, lambda: iter(np.split(array, np.cumsum(sizes))))


@pytest.mark.parametrize("sizes", [(), (1, 1, 1, 1), (2, 2)], ids=["whole", "layers", "rows"])
def test_pieces_are_one_parameter(monkeypatch, sizes):
    monkeypatch.setattr(parameter, "_MAX_HOST_BYTES", 0)
    given = in_pieces(WHOLE, *sizes)
    for placed in (place_on_host("path", given), place_on_device("path", given)):
        assert placed.dtype == np.float32
        np.testing.assert_array_equal(placed, WHOLE)


def test_pieces_are_cast_one_by_one(monkeypatch):
    monkeypatch.setattr(parameter, "_MAX_HOST_BYTES", 0)
    held = []

    def pieces():
        for each in WHOLE.astype(np.float16):
            held.append(each)
            yield each[None]

    given = Parameter(WHOLE.shape, np.dtype(np.float32), pieces)
    np.testing.assert_array_equal(given.to_device(), WHOLE.astype(np.float16).astype(np.float32))
    assert len(held) == 5


def test_a_single_number_and_what_is_in_memory():
    assert Parameter.from_array(np.float32(3)).to_device() == 3
    transposed = Parameter.from_array(WHOLE[0].T)
    assert transposed.to_host().flags.c_contiguous
    np.testing.assert_array_equal(transposed.to_device(), WHOLE[0].T)


ON_EIGHT_DEVICES = """
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
    from weights.test_parameter import WHOLE, in_pieces
    from dit_video.weights import parameter

    parameter._MAX_HOST_BYTES = 0
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "fsdp"))
    rows = np.swapaxes(WHOLE, 0, 1)
    stacked = [(WHOLE, P(None, None, "fsdp")), (WHOLE, P(None, "data", "fsdp")), (WHOLE, P())]
    for array, spec in [*stacked, (rows, P("fsdp"))]:
        sharding = NamedSharding(mesh, spec)
        placed = in_pieces(array, 1, 2).on(sharding)
        assert placed.sharding == sharding and len(placed.addressable_shards) == 8
        np.testing.assert_array_equal(placed, array)
        for shard in placed.addressable_shards:
            np.testing.assert_array_equal(shard.data, array[shard.index])
    print("done")
"""


def test_each_device_gets_its_part():
    check_on_eight_devices(ON_EIGHT_DEVICES)
