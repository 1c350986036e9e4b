"""Check that two processes of two devices make one global batch."""

import jax
import numpy as np
import pytest

from dit_video.core.errors import UserError
from dit_video.distributed import Parallelism, make_mesh, shard_batch
from support.devices import join_processes


def main() -> None:
    """Sum batches, of which each process has one half."""
    join_processes()
    rows = np.arange(24, dtype=np.float32).reshape(8, 3)
    start = 4 * jax.process_index()
    for config in (Parallelism(), Parallelism(fsdp=2), Parallelism(fsdp=2, context=2)):
        batch = shard_batch({"x": rows[start : start + 4]}, make_mesh(config))["x"]
        assert batch.shape == (8, 3), batch.shape
        total = jax.jit(lambda x: (x * np.arange(8)[:, None]).sum(axis=0))(batch)
        np.testing.assert_array_equal(total, (rows * np.arange(8)[:, None]).sum(axis=0))
    with pytest.raises(UserError, match="3 rows for 2 devices"):
        shard_batch({"x": rows[:3]}, make_mesh(Parallelism()))
    print("done")


if __name__ == "__main__":
    main()
