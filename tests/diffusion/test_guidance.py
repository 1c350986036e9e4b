import jax.numpy as jnp
import numpy as np
import pytest

from dit_video.diffusion import classifier_free

NOISY = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4)), jnp.float32)
TIME = jnp.asarray(0.7)


def conditional(noisy, time):
    return 2 * noisy + time


def unconditional(noisy, time):
    return jnp.sin(noisy) - time


def test_scale_1_is_conditional_and_0_unconditional():
    one, zero = (classifier_free(conditional, unconditional, scale)(NOISY, TIME) for scale in (1.0, 0.0))
    np.testing.assert_allclose(one, conditional(NOISY, TIME), atol=1e-6)
    np.testing.assert_array_equal(zero, unconditional(NOISY, TIME))


@pytest.mark.parametrize("scale", [2.0, 7.5, -1.0])
def test_guidance_is_linear_in_the_scale(scale):
    found = classifier_free(conditional, unconditional, jnp.asarray(scale))(NOISY, TIME)
    expected = scale * conditional(NOISY, TIME) + (1 - scale) * unconditional(NOISY, TIME)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_equal_branches_are_not_moved_by_any_scale():
    found = classifier_free(conditional, conditional, 9.0)(NOISY, TIME)
    np.testing.assert_allclose(found, conditional(NOISY, TIME), rtol=1e-6)
