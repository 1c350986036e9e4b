"""Sampling a rectified flow equals diffusers', step by step."""

import jax.numpy as jnp
import numpy as np
import pytest

from dit_video.diffusion import (
    Euler,
    RectifiedFlow,
    StepInterval,
    Velocity,
    make_estimator,
    make_uniform_times,
    stateless,
)

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("shift", [1.0, 3.0, 12.0])
@pytest.mark.parametrize("steps", [1, 4, 20])
def test_euler_equals_flow_match_euler(shift, steps):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps))
    process = RectifiedFlow(shift=shift)
    times = make_uniform_times(process, steps)
    np.testing.assert_allclose(np.asarray(times), scheduler.sigmas.numpy(), atol=1e-6)

    def velocity(x, time):
        return np.sin(3 * x) + time * x

    ours = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    theirs = torch.from_numpy(ours.copy())
    state = Euler().init(jnp.asarray(ours), steps=steps)
    for index, timestep in enumerate(scheduler.timesteps):
        sigma = float(scheduler.sigmas[index])
        prediction = torch.from_numpy(velocity(theirs.numpy(), sigma).astype(np.float32))
        theirs = scheduler.step(prediction, timestep, theirs).prev_sample
        estimate = make_estimator(
            stateless(lambda x, time: jnp.asarray(velocity(np.asarray(x), float(time)))), process, Velocity()
        )
        state = Euler().step(estimate, process, state, StepInterval(times[index], times[index + 1]))
        np.testing.assert_allclose(np.asarray(state.x), theirs.numpy(), rtol=1e-5, atol=1e-5)
