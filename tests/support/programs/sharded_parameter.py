"""Put a parameter that is read in pieces on eight devices, and compare the shards."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dit_video.weights import parameter
from support.parameter_pieces import WHOLE, split_parameter

parameter._MAX_HOST_BYTES = 0
mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "fsdp"))
layouts = [
    (WHOLE, P(None, None, "fsdp")),
    (WHOLE, P(None, "data", "fsdp")),
    (WHOLE, P()),
    (np.swapaxes(WHOLE, 0, 1), P("fsdp")),
]
for array, spec in layouts:
    sharding = NamedSharding(mesh, spec)
    placed = split_parameter(array, 1, 2).to_device(sharding)
    assert placed.sharding == sharding
    assert len(placed.addressable_shards) == 8
    np.testing.assert_array_equal(placed, array)
    for shard in placed.addressable_shards:
        np.testing.assert_array_equal(shard.data, array[shard.index])
print("done")
