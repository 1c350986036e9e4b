import jax.numpy as jnp
import numpy as np

from dit_video.nn import layer_norm, modulate

DRAW = np.random.default_rng(0)
X, SHIFT, SCALE = (jnp.asarray(DRAW.normal(size=(2, 3, 16)), jnp.float32) for _ in range(3))


def test_modulation_scales_and_shifts_the_norm():
    np.testing.assert_allclose(modulate(X, SHIFT, SCALE), layer_norm(X) * (1 + SCALE) + SHIFT, rtol=1e-6, atol=1e-6)


def test_zero_modulation_is_the_norm():
    np.testing.assert_array_equal(modulate(X, 0 * SHIFT, 0 * SCALE), layer_norm(X))


def test_modulation_is_computed_in_float32_and_keeps_the_dtype():
    x = X.astype(jnp.bfloat16)
    result = modulate(x, SHIFT, SCALE)
    assert result.dtype == jnp.bfloat16
    expected = (layer_norm(x.astype(jnp.float32)) * (1 + SCALE) + SHIFT).astype(jnp.bfloat16)
    np.testing.assert_array_equal(result.astype(jnp.float32), expected.astype(jnp.float32))
