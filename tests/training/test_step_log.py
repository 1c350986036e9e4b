"""Which steps count for the estimate of the time left."""

import jax.numpy as jnp

from dit_video.training.step_log import LoopTimer


def test_steps_with_new_shapes_and_those_that_refill_the_queue_are_not_timed():
    timer = LoopTimer()
    step = timer.wrap_step(lambda state, _: (state, {}))
    timed = []
    for size in (1, 1, 1, 1, 2, 1, 2, 2, 1):
        step(None, {"pixels": jnp.zeros(size)})
        timed.append(timer.is_timed)
    assert timed == [False, False, False, True, False, False, False, True, True]
