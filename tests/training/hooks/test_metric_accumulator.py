"""Which steps count for the estimate of the time left."""

import jax.numpy as jnp

from dit_video.training.hooks.logging import MetricAccumulator


def test_steps_with_new_shapes_and_those_that_refill_the_queue_are_not_timed():
    accumulator = MetricAccumulator(7, max_consecutive_skips=10)
    timed = []
    for size in (1, 1, 1, 1, 2, 1, 2, 2, 1):
        accumulator.add({"pixels": jnp.zeros(size)}, {"loss": jnp.zeros(())})
        timed.append(accumulator.is_timed)
    assert timed == [False, False, False, True, False, False, False, True, True]
