import jax.numpy as jnp
import numpy as np

from dit_video.diffusion import FlowMatching, RectifiedFlow, stateless

DRAW = np.random.default_rng(0)
DATA, NOISE = (jnp.asarray(DRAW.normal(size=(2, 4, 5)), jnp.float32) for _ in range(2))
TIME = jnp.asarray(DRAW.uniform(size=(2, 4)), jnp.float32)
OBJECTIVE = FlowMatching()


def test_the_model_gets_noisy_tokens_and_their_times():
    seen = {}

    def denoise(noisy, time):
        seen.update(noisy=noisy, time=time)
        return noisy

    OBJECTIVE.loss(stateless(denoise), DATA, NOISE, TIME)
    np.testing.assert_array_equal(seen["time"], TIME)
    np.testing.assert_allclose(seen["noisy"], (1 - TIME[..., None]) * DATA + TIME[..., None] * NOISE, atol=1e-6)


def test_a_perfect_prediction_has_no_loss():
    assert not OBJECTIVE.loss(stateless(lambda noisy, time: NOISE - DATA), DATA, NOISE, TIME).any()


def test_the_loss_is_the_mean_squared_error_of_every_token():
    error = jnp.asarray(DRAW.normal(size=(2, 4, 5)), jnp.float32)
    result = OBJECTIVE.loss(stateless(lambda noisy, time: NOISE - DATA + error), DATA, NOISE, TIME)
    assert result.shape == (2, 4)
    np.testing.assert_allclose(result, np.square(error).mean(axis=-1), rtol=1e-4)


def test_a_bfloat16_prediction_is_compared_in_float32():
    result = OBJECTIVE.loss(stateless(lambda noisy, time: (NOISE - DATA).astype(jnp.bfloat16)), DATA, NOISE, TIME)
    assert result.dtype == jnp.float32
    assert (result < 1e-4).all()


def test_the_shift_is_applied_to_drawn_times_once():
    objective = FlowMatching(process=RectifiedFlow(shift=4.0))
    # The median of logit-normal times of mean 0 is 1/2; shifted by 4 it is 4/5.
    np.testing.assert_allclose(objective.compute_time(jnp.asarray([0.5])), [0.8], rtol=1e-5)
