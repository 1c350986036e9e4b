import jax.numpy as jnp
import numpy as np
import pytest

from dit_video.nn import sinusoidal_embedding


def test_an_embedding_is_cosines_then_sines_of_falling_frequencies():
    values = np.asarray([[0.0, 1.5], [40.0, 999.0]], np.float32)
    frequencies = 10_000.0 ** -(np.arange(4) / 4)
    angles = values[..., None] * frequencies
    expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)
    np.testing.assert_allclose(sinusoidal_embedding(jnp.asarray(values), 8), expected, atol=1e-4)


def test_zero_is_embedded_as_ones_then_zeros():
    assert sinusoidal_embedding(jnp.zeros(()), 6).tolist() == [1, 1, 1, 0, 0, 0]


def test_integers_are_embedded_like_floats():
    np.testing.assert_array_equal(sinusoidal_embedding(jnp.arange(5), 8), sinusoidal_embedding(jnp.arange(5.0), 8))


def test_the_product_of_two_embeddings_depends_on_their_difference_only():
    code = np.asarray(sinusoidal_embedding(jnp.asarray([2.0, 5.0, 12.0, 15.0]), 64))
    assert code[0] @ code[1] == pytest.approx(code[2] @ code[3], rel=1e-4)
    assert code[0] @ code[1] != pytest.approx(code[0] @ code[2], rel=1e-2)


def test_the_slowest_frequency_follows_from_the_maximal_period():
    # The slowest pair of width 4 turns by sqrt(period) times less than the fastest.
    assert sinusoidal_embedding(jnp.asarray(1.0), 4, max_period=100.0)[1] == pytest.approx(np.cos(0.1), rel=1e-6)
