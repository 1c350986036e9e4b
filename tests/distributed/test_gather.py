import jax.numpy as jnp
import numpy as np
import pytest

from dit_video.distributed.gather import GatheredArray
from support.devices import run_together


@pytest.mark.parametrize("max_bytes", [1, 40, 100, 10_000])
def test_the_parts_of_an_array_are_the_array(max_bytes):
    array = jnp.arange(7 * 5, dtype=jnp.float32).reshape(7, 5)
    parts = list(GatheredArray.from_array(array, max_bytes=max_bytes).read_chunks())
    assert max(part.nbytes for part in parts) <= max(max_bytes, 20)
    np.testing.assert_array_equal(np.concatenate(parts), array)
    np.testing.assert_array_equal(GatheredArray.from_array(array)[3], array[3])
    np.testing.assert_array_equal(np.asarray(GatheredArray.from_array(array)), array)


@pytest.mark.slow
def test_two_processes_write_weights_of_which_neither_holds_all(tmp_path):
    outputs = run_together("gathered_weights.py", str(tmp_path), devices=2)
    assert all("done" in output for output in outputs)
